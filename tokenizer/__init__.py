"""Mathematics of tokenizers: quantizers, autoencoders, k-means, metrics. Knows neither Ray nor storage."""
