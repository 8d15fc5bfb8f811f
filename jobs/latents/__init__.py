"""The latents of a corpus: drawn or cached by one pass over it, and k-means over all of them."""
