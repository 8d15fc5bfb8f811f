"""Errors of the data layer. Each message names the URL, what is wrong, and what to do."""


class ShardError(OSError):
    """A shard cannot be read to its end: missing, forbidden, truncated, no tar. Nothing of it is committed."""


class OutputMismatch(ValueError):
    """An output belongs to another tokenizer, corpus or setting than the one at hand."""


class BrokenOutput(ValueError):
    """A file of an output is not what its place says it is."""


class NoShards(ValueError):
    """What data.shards says names no shards at all: a mistake in the configuration."""
