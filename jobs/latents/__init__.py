"""The latents of a corpus: a sample or a cache of all, made in one pass, and the view of them that k-means needs."""
