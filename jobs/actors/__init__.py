"""Ray Data actors: a pool of workers over shards, what all commands over shards share, a tokenizer for your pipeline."""
