"""The data layer: storage, shards, samples, batches and token shards. Imports neither Ray nor any model."""
