"""Manifest entries: one for the first commit of a shard, and one for each retry of its quarantined samples."""

import collections
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.corpus.shards import Shard
from pipeline.errors import BrokenOutput
from pipeline.tokens.fields import wrong_field

REFUSE, NEW = "refuse", "new"  # values of tokens.same_names
RETRY_NAME = re.compile(r"^(.+)\+([1-9][0-9]*)$")  # a shard's own name ends in a dash and 12 hex digits


@dataclass
class Commit:
    """One manifest entry. Fields with a default may be missing from entries written by older versions.

    The entry of a retry counts only the samples that were in quarantine when the retry started.
    """

    name: str
    source_shard: str
    source_num_bytes: int | None  # None if the storage did not report it
    num_samples: int
    num_rows: int
    num_quarantined: int
    num_tokens: int
    tokens_sha256: str
    quarantine_sha256: str | None
    tokenizer_id: str
    codebook_id: str
    committed_at: float = 0.0  # seconds since 1970
    seconds: dict[str, float] = field(default_factory=dict)  # by stage: read, decode, encode, write; total
    source_version: str | None = None  # ETag or modification time
    tokens_num_bytes: int | None = None
    worker: dict[str, Any] = field(default_factory=dict)  # host and pid
    reasons: dict[str, int] = field(default_factory=dict)  # "stage error" -> number of quarantined samples
    retry: int = 0
    notes: dict[str, int] = field(default_factory=dict)  # what a reader should know -> number of rows or members
    settled: list[int] = field(default_factory=list)  # retries only: the source_index of each recovered row
    quarantine_num_bytes: int | None = None
    samples_sha256: str | None = None  # first commits only: see `hash_samples`; None for a shard without samples
    same_names: str = REFUSE  # tokens.same_names of the run that committed it


COUNTS = tuple(known.name for known in fields(Commit) if known.type is int)
MAX_COUNT = 2**48  # of samples or tokens in one shard; larger numbers would overflow in sums
KNOWN_FIELDS = frozenset(known.name for known in fields(Commit))


@dataclass
class CommittedShard:
    """All entries of one shard: the first commit, then its retries in order."""

    entries: list[Commit]

    @property
    def first(self) -> Commit:
        return self.entries[0]

    @property
    def last(self) -> Commit:
        """The entry with the current quarantine file."""
        return self.entries[-1]

    @property
    def num_rows(self) -> int:
        return sum(entry.num_rows for entry in self.entries)

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def num_quarantined(self) -> int:
        return self.last.num_quarantined

    @property
    def notes(self) -> collections.Counter[str]:
        return sum((collections.Counter(entry.notes) for entry in self.entries), collections.Counter())


def group_by_shard(entries: list[Commit]) -> list[CommittedShard]:
    """One CommittedShard per shard, sorted by name."""
    by_shard: dict[str, list[Commit]] = {}
    for entry in sorted(entries, key=sort_key):
        by_shard.setdefault(shard_name(entry.name), []).append(entry)
    return [CommittedShard(of_one) for of_one in by_shard.values()]


def sort_key(entry: Commit) -> tuple[str, int]:
    """Sorts entries by shard, with the retries of a shard after its first commit."""
    return shard_name(entry.name), entry.retry


def retry_name(name: str, retry: int) -> str:
    return f"{name}+{retry}" if retry else name


def shard_name(name: str) -> str:
    """The name of the shard that an entry belongs to."""
    match = RETRY_NAME.match(name)
    return match[1] if match else name


def parse_commit(name: str, text: bytes) -> Commit:
    """The entry in manifest/NAME.json. Ignores unknown fields, which a newer version may have added.

    Raises BrokenOutput if the text is not a valid entry of that name.
    """
    try:
        values = json.loads(text)
        entry = Commit(**{known: values[known] for known in KNOWN_FIELDS & values.keys()})
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise BrokenOutput(f"manifest/{name}.json is not a manifest entry: {error}") from error
    for count in COUNTS:
        value = getattr(entry, count)
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            raise BrokenOutput(f"manifest/{name}.json is not a manifest entry: {count} is {value!r}, not a count")
    if wrong := wrong_field(entry):
        raise BrokenOutput(f"manifest/{name}.json is not a manifest entry: {wrong}")
    if entry.name != name:
        raise BrokenOutput(f"manifest/{name}.json is the entry of {entry.name!r}: readers would get its rows twice")
    if entry.name != retry_name(shard_name(name), entry.retry):
        raise BrokenOutput(f"manifest/{name}.json says retry {entry.retry}, but its name does not")
    return entry


def hash_samples(samples: Iterable[tuple[str, bytes | None]]) -> str | None:
    """A hash of the keys and tokens of a shard, by which the same shard is recognised under another URL.

    samples: key, and tokens as bytes (None if quarantined), in the order of source_index. None if there are none.
    """
    digest, empty = hashlib.sha256(), True
    for key, tokens in samples:
        name = key.encode()
        digest.update(f"{len(name)} {-1 if tokens is None else len(tokens)} ".encode() + name + (tokens or b""))
        empty = False
    return None if empty else digest.hexdigest()


def what_changed(entry: Commit, shard: Shard) -> str | None:
    """How a shard differs from the one that was tokenized. None if storage reports no difference."""
    if None not in (entry.source_num_bytes, shard.num_bytes) and entry.source_num_bytes != shard.num_bytes:
        return f"has {shard.num_bytes} bytes now, but had {entry.source_num_bytes}"
    if None not in (entry.source_version, shard.version) and entry.source_version != shard.version:
        return f"is version {shard.version} now, but was {entry.source_version}"
    return None
