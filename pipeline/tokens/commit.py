"""Manifest entries: one for the first commit of a shard, and one for each retry of its quarantined samples."""

import collections
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.corpus.shards import Shard
from pipeline.errors import BrokenOutput

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
    notes: dict[str, int] = field(default_factory=dict)  # what was not used of samples -> number of samples
    retry: int = 0
    settled: list[int] = field(default_factory=list)  # retries only: the source_index of each recovered row


COUNTS = tuple(known.name for known in fields(Commit) if known.type is int)
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


def group_by_shard(entries: list[Commit]) -> list[CommittedShard]:
    """One CommittedShard per shard, sorted by name."""
    by_shard: dict[str, list[Commit]] = {}
    for entry in sorted(entries, key=sort_key):
        by_shard.setdefault(shard_name(entry.name), []).append(entry)
    return [CommittedShard(of_one) for of_one in by_shard.values()]


def total_notes(entries: list[Commit]) -> dict[str, int]:
    """What was not used of the samples of all these entries, with the number of samples, most frequent first."""
    total: collections.Counter[str] = collections.Counter()
    for entry in entries:
        total.update(entry.notes)
    return dict(total.most_common())


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
    except (AttributeError, TypeError, ValueError) as error:
        raise BrokenOutput(f"manifest/{name}.json is not a manifest entry: {error}") from error
    for count in COUNTS:
        value = getattr(entry, count)
        if type(value) is not int or value < 0:
            raise BrokenOutput(f"manifest/{name}.json is not a manifest entry: {count} is {value!r}, not a count")
    if entry.name != name:
        raise BrokenOutput(f"manifest/{name}.json is the entry of {entry.name}: readers would get its rows twice")
    if entry.name != retry_name(shard_name(name), entry.retry):
        raise BrokenOutput(f"manifest/{name}.json says retry {entry.retry}, but its name does not")
    return entry


def what_changed(entry: Commit, shard: Shard) -> str | None:
    """How a shard differs from the one that was tokenized. None if storage reports no difference."""
    if None not in (entry.source_num_bytes, shard.num_bytes) and entry.source_num_bytes != shard.num_bytes:
        return f"has {shard.num_bytes} bytes now, but had {entry.source_num_bytes}"
    if None not in (entry.source_version, shard.version) and entry.source_version != shard.version:
        return f"is version {shard.version} now, but was {entry.source_version}"
    return None
