"""Ray Data actors: a pool of workers over shards, what such commands share, a tokenizer for your pipeline."""
