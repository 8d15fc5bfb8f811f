"""The mathematics of tokenizers: quantizers, autoencoders, k-means, metrics. Imports neither Ray nor storage."""
