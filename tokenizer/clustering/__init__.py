"""k-means and nearest neighbours, over latents in memory or on many nodes."""
