"""Which shards a job reads: `data.shards` (path, glob, braces, or a list of them) to a Manifest with an id."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.errors import NoShards

LOOKUPS = 32  # at a time, of shards that are named one by one


@dataclass(frozen=True)
class Shard:
    """One WebDataset tar. num_bytes is None if it is not there, or not ours to read; reading it tells which.

    version: the ETag, or a local file's mtime in ns; None where storage has neither, or an older manifest said nothing.
    """

    url: str
    num_bytes: int | None
    version: str | None = None

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
        # without versions: a copy of the corpus with other dates, or a tool's new field, is the same input
        named = [{"url": shard.url, "num_bytes": shard.num_bytes} for shard in self.shards]
        return hashlib.sha256(json.dumps(named, indent=1).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps([asdict(shard) for shard in self.shards], indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        return cls([Shard(**shard) for shard in json.loads(text)])


def find_shards(spec: str | list[str]) -> Manifest:
    """Sorted by URL, each once. Raises NoShards if a glob matches nothing or nothing is named at all.

    A shard that is named but missing stays in the manifest: the job reports it as failed, rather than not at all.
    """
    shards: dict[str, Shard] = {}
    for pattern in [spec] if isinstance(spec, str) else spec:
        shards.update((shard.url, shard) for shard in _expand(pattern))
    if not shards:
        raise NoShards("data.shards names no shards; give a path, a glob, braces, or a list of them")
    return Manifest([shards[url] for url in sorted(shards)])


def look_up(urls: list[str]) -> Manifest:
    """The shards of these URLs, which are names and no patterns, as they are now."""
    return Manifest(_look_up(sorted(urls)))


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
    return any(wild in url for wild in "*?[")


def _look_up(urls: list[str]) -> list[Shard]:
    with ThreadPoolExecutor(LOOKUPS) as threads:
        found = threads.map(storage.find, urls)
        return [
            Shard(url, one.num_bytes, one.version) if one else Shard(url, None)
            for url, one in zip(urls, found, strict=True)
        ]
