"""Finds the shards that a job reads: `data.shards` (a path, glob, braces, or a list of them) to a ShardList."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.errors import NoShards

LOOKUPS = 32  # threads that look up shards named one by one


@dataclass(frozen=True)
class Shard:
    """One WebDataset tar. num_bytes is None if it is missing or we may not read it; reading it raises the reason.

    version: the ETag, or the mtime in ns of a local file; None if storage has neither, or in lists of older versions.
    """

    url: str
    num_bytes: int | None
    version: str | None = None

    @property
    def name(self) -> str:
        """Stem and a hash of the URL. Names the output files of the shard."""
        stem = re.sub(r"(\.tar)?(\.(gz|bz2|xz)|\.tgz)?$", "", PurePosixPath(self.url).name)
        return f"{stem}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"


SHARD_FIELDS = frozenset(Shard.__dataclass_fields__)


@dataclass(frozen=True)
class ShardList:
    """The input shards of a job. The id changes when a shard is added, removed, or changes its size."""

    shards: list[Shard]

    @cached_property
    def id(self) -> str:
        # without versions: a copy of the corpus with other dates, or with new fields in Shard, is the same input
        named = [{"url": shard.url, "num_bytes": shard.num_bytes} for shard in self.shards]
        return hashlib.sha256(json.dumps(named, indent=1).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps([asdict(shard) for shard in self.shards], indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ShardList":
        """Ignores unknown fields, which a newer version may have added."""
        known = [{name: shard[name] for name in SHARD_FIELDS & shard.keys()} for shard in json.loads(text)]
        return cls([Shard(**shard) for shard in known])


def find_shards(spec: str | list[str]) -> ShardList:
    """The shards sorted by URL, without duplicates. Raises NoShards if a glob matches nothing or the list is empty.

    A missing shard that is named without a glob stays in the list, so that the job reports it as failed.
    """
    shards: dict[str, Shard] = {}
    for pattern in [spec] if isinstance(spec, str) else spec:
        shards.update((shard.url, shard) for shard in _expand(pattern))
    if not shards:
        raise NoShards("data.shards names no shards; set it to a path, a glob, braces, or a list of them")
    return ShardList([shards[url] for url in sorted(shards)])


def look_up(urls: list[str]) -> ShardList:
    """The current size and version of the shards at these URLs, which are not patterns."""
    return ShardList(_look_up(sorted(urls)))


def _expand(pattern: str) -> list[Shard]:
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # readers do without it

    try:
        urls = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise NoShards(f"data.shards: {error}") from error
    shards = _look_up([storage.normalise(url) for url in urls if not _is_glob(url)])
    for url in filter(_is_glob, urls):
        matches = storage.glob(url)
        if not matches:
            raise NoShards(f"data.shards: nothing matches {url!r}")
        shards += [Shard(found.url, found.num_bytes, found.version) for found in matches]
    return shards


def _is_glob(url: str) -> bool:
    wildcards = "*[" if url.lower().startswith(("http://", "https://")) else "*?["  # there, ? begins the query
    return any(wild in url for wild in wildcards)


def _look_up(urls: list[str]) -> list[Shard]:
    with ThreadPoolExecutor(LOOKUPS) as threads:
        found = threads.map(storage.find, urls)
        return [
            Shard(url, one.num_bytes, one.version) if one else Shard(url, None)
            for url, one in zip(urls, found, strict=True)
        ]
