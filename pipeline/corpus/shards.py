"""Finds the shards that a job reads: `data.shards` (a path, glob, braces, or a list of them) to a ShardList."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.errors import NoShards

NOT_SHARDS = {  # extensions of pictures, sounds, tables and other files that are no tars
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "avif", "wav", "flac", "mp3", "ogg", "opus"),
    *("m4a", "aac", "aiff", "parquet", "csv", "tsv", "json", "jsonl", "txt", "zip"),
}
PACK_FIRST = "a folder of pictures or sounds, or a table of them, becomes shards by `tokenmill pack pack.source=...`"
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
        stem = re.sub(r"(\.tar)?(\.(gz|bz2|xz|zst)|\.tgz|\.tzst)?$", "", PurePosixPath(self.url).name)
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
        """Ignores unknown fields, which a newer version may have added. Raises ValueError for anything but a list of
        shards."""
        listed = json.loads(text)
        if not isinstance(listed, list) or not all(isinstance(shard, dict) for shard in listed):
            raise ValueError("it is not a list of shards")
        return cls([_shard({name: shard[name] for name in SHARD_FIELDS & shard.keys()}) for shard in listed])


def _shard(fields: dict[str, Any]) -> Shard:
    types = {"url": str, "num_bytes": int | None, "version": str | None}
    if "url" not in fields or not all(isinstance(value, types[name]) for name, value in fields.items()):
        raise ValueError(f"{fields} is not a shard")
    return Shard(**{"num_bytes": None, **fields})


def find_shards(spec: str | list[str]) -> ShardList:
    """The shards sorted by URL, without duplicates.

    Raises NoShards for an empty list, and for a pattern or name that leads to no file. Where only some of the names
    between braces are missing, those stay in the list, so that the job reports them as failed. So does a shard that we
    may not read.
    """
    shards: dict[str, Shard] = {}
    for pattern in [spec] if isinstance(spec, str) else spec:
        shards.update((shard.url, shard) for shard in _expand(pattern))
    if not shards:
        raise NoShards("data.shards names no shards; set it to a path, a glob, braces, or a list of them")
    _refuse_media(shards)
    return ShardList([shards[url] for url in sorted(shards)])


def _refuse_media(urls: Iterable[str]) -> None:
    """Raises NoShards for pictures, sounds and tables, which would all be quarantined as damaged tars."""
    for url in urls:
        suffix = PurePosixPath(url).suffix.lower().removeprefix(".")
        if suffix in NOT_SHARDS:
            raise NoShards(f"data.shards: {url} is no WebDataset tar; {PACK_FIRST}")


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
    if shards and not any(storage.is_file(shard.url) for shard in shards):
        raise NoShards(_nothing_at(shards[0].url))
    for url in filter(_is_glob, urls):
        matches = storage.glob(url)
        if not matches:
            folder = re.split(r"[*?\[]", storage.normalise(url))[0].rpartition("/")[0]
            relative = "" if "://" in url or os.path.isabs(url) else f"; relative paths start in {os.getcwd()}"
            raise NoShards(f"data.shards: nothing matches {url!r}{_did_you_mean(folder) or relative}")
        shards += [Shard(found.url, found.num_bytes, found.version) for found in matches]
    return shards


def _nothing_at(url: str) -> str:
    """Says that there is no shard at this URL, and where the nearest ones are."""
    if not storage.is_folder(url):
        return f"data.shards: {url} does not exist{_did_you_mean(url)}"
    return f"data.shards: {url} is a folder, not a shard{_did_you_mean(url) or f'; {PACK_FIRST}'}"


def _did_you_mean(url: str) -> str:
    """A proposal: the shards in this folder or in a folder of it, or the name most like it; empty if there is none."""
    for pattern in (f"{url}/*.tar*", f"{url}/*/*.tar*"):
        if found := storage.glob(pattern):
            suffix = found[0].url.partition(".tar")[2]
            return f"; did you mean {found[0].url.rsplit('/', 1)[0]}/*.tar{suffix}?"
    folder, _, name = url.rpartition("/")
    near = difflib.get_close_matches(name, [other.rsplit("/", 1)[1] for other in storage.list_files(folder)], n=1)
    return f"; did you mean {folder}/{near[0]}?" if near else ""


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
