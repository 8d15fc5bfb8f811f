"""The input: a list of shards, the samples in a shard, a training rank's stream of samples."""
