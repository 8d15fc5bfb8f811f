"""Errors of the data layer. Each message names the URL, what is wrong, and what to do."""


class ShardError(OSError):
    """A shard cannot be read to its end: missing, forbidden, truncated, no tar. Nothing of it is committed."""


class StorageError(OSError):
    """Storage failed in a way that passes by itself, but did not within the time that we wait."""


class ReplacedObject(OSError):
    """An object is no longer the one that was listed or opened."""


class UnsafeStorage(ValueError):
    """The storage overwrites objects that it is told only to create, so that two writers could undo each other."""


class OutputMismatch(ValueError):
    """An output belongs to another tokenizer, corpus or setting than the one at hand."""


class BrokenOutput(ValueError):
    """A file of an output is not what its place says it is."""


class NoShards(ValueError):
    """What data.shards says names no shards at all: a mistake in the configuration."""
