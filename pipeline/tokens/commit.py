"""Manifest entries: what is proven of a shard by its first commit, and what each retry added to that."""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.corpus.shards import Shard
from pipeline.errors import BrokenOutput

RETRY_NAME = re.compile(r"^(.+)\+([1-9][0-9]*)$")  # no shard's name ends so: they end in a dash and 12 hex digits


@dataclass
class Commit:
    """One manifest entry. What is None or empty by default is missing from entries of older versions.

    A retry's entry counts the samples that it took up: those which were in quarantine until then.
    """

    name: str
    source_shard: str
    source_num_bytes: int | None  # None where the storage did not tell
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
    source_version: str | None = None  # ETag or time of change
    tokens_num_bytes: int | None = None
    worker: dict[str, Any] = field(default_factory=dict)  # host and pid
    reasons: dict[str, int] = field(default_factory=dict)  # "stage error" of what is in quarantine, and how many
    retry: int = 0
    settled: list[int] = field(default_factory=list)  # a retry: the source_index of each of its rows


COUNTS = tuple(known.name for known in fields(Commit) if known.type is int)


@dataclass
class History:
    """All entries of one shard: the first commit, and its retries in order."""

    entries: list[Commit]

    @property
    def first(self) -> Commit:
        return self.entries[0]

    @property
    def last(self) -> Commit:
        """Whose quarantine is the one that stands."""
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


def histories(entries: list[Commit]) -> list[History]:
    """The entries by shard, in the order of their names."""
    by_shard: dict[str, list[Commit]] = {}
    for entry in sorted(entries, key=in_order):
        by_shard.setdefault(shard_name(entry.name), []).append(entry)
    return [History(of_one) for of_one in by_shard.values()]


def in_order(entry: Commit) -> tuple[str, int]:
    """Sorts entries by shard, and each shard's retries after its first commit."""
    return shard_name(entry.name), entry.retry


def retry_name(name: str, retry: int) -> str:
    return f"{name}+{retry}" if retry else name


def shard_name(name: str) -> str:
    """The name of the shard that an entry is of."""
    match = RETRY_NAME.match(name)
    return match[1] if match else name


def parse_commit(name: str, text: bytes) -> Commit:
    """Raises BrokenOutput if manifest/NAME.json does not hold what belongs there."""
    try:
        entry = Commit(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise BrokenOutput(f"manifest/{name}.json is no manifest entry: {error}") from error
    for count in COUNTS:
        value = getattr(entry, count)
        if type(value) is not int or value < 0:
            raise BrokenOutput(f"manifest/{name}.json is no manifest entry: {count} is {value!r}, not a count")
    if entry.name != name:
        raise BrokenOutput(f"manifest/{name}.json is the entry of {entry.name}: readers would get its rows twice")
    if entry.name != retry_name(shard_name(name), entry.retry):
        raise BrokenOutput(f"manifest/{name}.json says retry {entry.retry}, which its name does not")
    return entry


def what_changed(entry: Commit, shard: Shard) -> str | None:
    """How a shard differs from the one that was tokenized; None if it does not, as far as the storage tells."""
    if None not in (entry.source_num_bytes, shard.num_bytes) and entry.source_num_bytes != shard.num_bytes:
        return f"has {shard.num_bytes} bytes now, and had {entry.source_num_bytes}"
    if None not in (entry.source_version, shard.version) and entry.source_version != shard.version:
        return f"is version {shard.version} now, and was {entry.source_version}"
    return None
