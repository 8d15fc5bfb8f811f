"""Ray Data actors: callable classes for `map_batches`."""
