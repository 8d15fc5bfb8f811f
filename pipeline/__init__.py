"""Data: storage, shards, samples, batches, token shards. Knows neither Ray nor any model."""
