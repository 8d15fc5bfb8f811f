"""Errors of the data layer. Each message names the URL, what is wrong, and what to do."""


class ShardError(OSError):
    """A shard cannot be read to its end: missing, forbidden, truncated, or not a tar. Nothing of it is committed."""


class StorageError(OSError):
    """A transient storage error lasted longer than we retry."""


class ReplacedObject(OSError):
    """An object is not the version that was listed or opened."""


class UnsafeStorage(OSError):
    """The storage overwrites objects on create-only writes, so two writers could destroy each other's work."""


class UnknownStorage(OSError):
    """A URL has a protocol that is unknown or lacks its package, or options that its client does not accept."""


class OutputMismatch(ValueError):
    """An output belongs to a different tokenizer, corpus or setting."""


class UnsupportedSchema(OutputMismatch):
    """An output was written with a newer schema than this version can read."""


class BrokenOutput(ValueError):
    """A file of an output has invalid content."""


class BrokenDataset(BrokenOutput):
    """dataset.json is damaged, so nothing of the output can be read."""


class NoShards(ValueError):
    """data.shards matches no shards: a mistake in the configuration."""


def one_line(error: BaseException) -> str:
    """The message of an error without the line breaks and control characters that Arrow copies from damaged files."""
    text = " ".join(str(error).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
