"""k-means and nearest neighbours, for latents in memory or on the nodes of a cluster."""
