"""Ray Data actors: a pool of workers over shards, and what all commands over shards share."""
