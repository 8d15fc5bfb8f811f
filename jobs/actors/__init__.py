"""Ray Data actors: a pool of workers over shards, the code all such commands share, and an actor for your pipeline."""
