"""The input: the list of shards, the samples of a shard, batches, and the sample stream of a training rank."""
