"""Which shards a job reads: `data.shards` (path, glob, braces, or a list of them) to a Manifest with an id."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from pipeline import storage
from pipeline.errors import NoShards


@dataclass(frozen=True)
class Shard:
    """One WebDataset tar. num_bytes is None if it is not there, or not ours to read; reading it tells which."""

    url: str
    num_bytes: int | None

    @property
    def name(self) -> str:
        """Stem and a hash of the URL: what the shard's output files are called."""
        stem = re.sub(r"(\.tar)?(\.(gz|bz2|xz)|\.tgz)?$", "", PurePosixPath(self.url).name)
        return f"{stem}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Manifest:
    """The input of a job. Its id changes when a shard comes, goes, or changes its size."""

    shards: list[Shard]

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps([asdict(shard) for shard in self.shards], indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        return cls([Shard(**shard) for shard in json.loads(text)])


def find_shards(spec: str | list[str]) -> Manifest:
    """Sorted by URL, each once. Raises NoShards if a glob matches nothing or nothing is named at all.

    A shard that is named but missing stays in the manifest: the job reports it as failed, rather than not at all.
    """
    urls: set[str] = set()
    for pattern in [spec] if isinstance(spec, str) else spec:
        urls.update(_expand(pattern))
    if not urls:
        raise NoShards("data.shards names no shards; give a path, a glob, braces, or a list of them")
    return Manifest([Shard(url, storage.num_bytes(url)) for url in sorted(urls)])


def _expand(pattern: str) -> list[str]:
    found: list[str] = []
    try:
        urls = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise NoShards(f"data.shards: {error}") from error
    for url in urls:
        if not any(wild in url for wild in "*?["):
            found.append(storage.normalise(url))
            continue
        matches = storage.glob(url)
        if not matches:
            raise NoShards(f"data.shards: nothing matches {url!r}")
        found += matches
    return found
