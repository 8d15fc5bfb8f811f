"""A sample on its way into a shard."""

from dataclasses import dataclass
from pathlib import Path

Content = bytes | Path | str  # the bytes themselves, a local file, or the URL of a file


@dataclass(frozen=True)
class Packed:
    """members: name without the key -> content. Files are read when the shard is written."""

    key: str
    members: dict[str, Content]
