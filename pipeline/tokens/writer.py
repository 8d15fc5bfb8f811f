"""Commits shards to an output. Any number of writers may work on the same shard, and any of them may die midway.

The files of a commit are created in this order: tokens, quarantine, manifest entry. The entry is the commit.
"""

import collections
import hashlib
import io
import os
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.tokens.commit import Commit, CommittedShard, retry_name
from pipeline.tokens.output import Output, to_json
from pipeline.tokens.quarantine import Quarantined, quarantine_table
from pipeline.tokens.schema import TokenRow, to_parquet


def commit_shard(
    output: Output,
    shard: Shard,
    rows: list[TokenRow],
    quarantined: list[Quarantined],
    seconds: dict[str, float],
    now: float,
    *,
    num_samples: int | None = None,
    notes: dict[str, int] | None = None,
) -> Commit:
    """Writes tokens, quarantine, and last the manifest entry. A second commit of a shard changes nothing.

    num_samples: the number of samples that the reader of the shard counted; None if unknown. seconds: by stage, and
    "total" so far; the time of writing is added. notes: see Commit. Returns the entry in storage: another worker's if
    it was first.
    Raises ValueError, and writes nothing, unless each of the samples 0..num_samples - 1 is given exactly once.
    """
    if (existing := output.read_entry(shard.name)) is not None:
        return existing
    expected = range(len(rows) + len(quarantined) if num_samples is None else num_samples)
    _check_samples(shard, rows, quarantined, expected)
    start, table = time.monotonic(), _tokens_table(output, shard, rows)
    tokens = _create_file(output, shard.name, output.tokens_url, table, partial(_same_samples, table=table))
    entry = _write_quarantine(output, shard, 0, tokens, quarantined, now)
    entry.seconds = _with_writing(seconds, time.monotonic() - start)
    entry.notes = notes or {}
    committed = _write_entry(output, entry)
    if committed is entry:
        output.remove_failure(shard.name)
    return committed


def commit_retry(
    output: Output,
    shard: Shard,
    committed: CommittedShard,
    rows: list[TokenRow],
    quarantined: list[Quarantined],
    seconds: dict[str, float],
    now: float,
    *,
    notes: dict[str, int] | None = None,
) -> Commit | None:
    """Adds the rows that a retry recovered, and the remaining quarantine, under a new name.

    committed: the entries of the shard when the retry started; rows and quarantined are the samples that were in
    quarantine then. Returns None if there are no rows: then nothing is written. Also returns None if another retry
    was first: its result is kept, and this one is dropped. Raises ValueError like `commit_shard`.
    """
    before = output.quarantined(committed.last)
    retried = [sample.source_index for sample in before]
    _check_samples(shard, rows, quarantined, retried)
    if not rows:
        return None
    start, retry, table = time.monotonic(), committed.last.retry + 1, _tokens_table(output, shard, rows)
    # Another retry may have written its token file and died, or may still be running. Removing its file could leave
    # its entry without one. So we commit its rows instead, and the samples that only we recovered wait for the next
    # retry.
    name = retry_name(shard.name, retry)
    accept = partial(_subset_of_samples, table=table, indices=retried)
    tokens = _create_file(output, name, output.tokens_url, table, accept)
    settled = set(_source_indices(tokens))
    reasons = {sample.source_index: sample for sample in [*before, *quarantined]}
    remaining = [sample for index, sample in reasons.items() if index not in settled]
    entry = _write_quarantine(output, shard, retry, tokens, remaining, now)
    entry.seconds = _with_writing(seconds, time.monotonic() - start)
    entry.notes = notes or {}
    return entry if _write_entry(output, entry) is entry else None


def _check_samples(
    shard: Shard, rows: list[TokenRow], quarantined: list[Quarantined], expected: Collection[int]
) -> None:
    """Checks before anything is written that each sample is there once. Afterwards it could only be reported."""
    samples: list[TokenRow | Quarantined] = [*rows, *quarantined]
    found = collections.Counter(sample.source_index for sample in samples)
    lost = [index for index in expected if index not in found]
    doubled = [index for index, times in found.items() if times > 1]
    unknown = sorted(found.keys() - set(expected))
    if lost or doubled or unknown:
        raise ValueError(
            f"{shard.url}: {len(rows)} rows and {len(quarantined)} quarantined are not its {len(expected)} samples "
            f"(source_index lost: {_few(lost)}; twice: {_few(doubled)}; unknown: {_few(unknown)}). Nothing was "
            "committed. Either the shard changed while it was read, or this is a bug in tokenmill"
        )


def _few(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:5])) or "none"
    return f"{shown} and {len(indices) - 5} more" if len(indices) > 5 else shown


# -- the three steps of a commit ----------------------------------------------------------------------------------


def _tokens_table(output: Output, shard: Shard, rows: list[TokenRow]) -> pa.Table:
    table = output.layout.to_table(rows, shard.url)
    about = {
        # identifies the version of the shard, so that a file left by a run over an older version is not reused
        "source_num_bytes": str(shard.num_bytes),
        "source_version": str(shard.version),
        "num_tokens": str(sum(row.tokens.size for row in rows)),
    }
    return table.replace_schema_metadata({**table.schema.metadata, **about})


def _write_quarantine(
    output: Output, shard: Shard, retry: int, tokens: bytes, quarantined: list[Quarantined], now: float
) -> Commit:
    """Writes the quarantine file if there is one, and returns the entry to commit. tokens: the written token file."""
    name, quarantine_sha256 = retry_name(shard.name, retry), None
    if quarantined:
        table = quarantine_table(shard.url, quarantined)
        written = _create_file(output, name, output.quarantine_url, table, partial(_same_samples, table=table))
        quarantine_sha256 = _sha256(written)
    indices = _source_indices(tokens)
    return Commit(
        name=name,
        source_shard=shard.url,
        source_num_bytes=shard.num_bytes,
        source_version=shard.version,
        num_samples=len(indices) + len(quarantined),
        num_rows=len(indices),
        num_quarantined=len(quarantined),
        num_tokens=int(pq.read_schema(io.BytesIO(tokens)).metadata[b"num_tokens"]),
        tokens_sha256=_sha256(tokens),
        tokens_num_bytes=len(tokens),
        quarantine_sha256=quarantine_sha256,
        tokenizer_id=output.layout.tokenizer_id,
        codebook_id=output.layout.codebook_id or "",
        committed_at=now,
        worker={"host": socket.gethostname(), "pid": os.getpid()},
        reasons=dict(collections.Counter(f"{sample.stage} {sample.error}" for sample in quarantined)),
        retry=retry,
        settled=indices if retry else [],
    )


def _write_entry(output: Output, entry: Commit) -> Commit:
    """Commits. Returns the entry in storage: another writer's if it was first."""
    try:
        storage.write_once(output.entry_url(entry.name), to_json(asdict(entry)))
    except FileExistsError:
        existing = output.read_entry(entry.name)
        assert existing is not None
        return existing
    return entry


def _with_writing(seconds: dict[str, float], writing: float) -> dict[str, float]:
    total = {"total": seconds["total"] + writing} if "total" in seconds else {}
    return {stage: round(spent, 4) for stage, spent in {**seconds, "write": writing, **total}.items()}


def _source_indices(tokens: bytes) -> list[int]:
    return pq.read_table(io.BytesIO(tokens), columns=["source_index"])["source_index"].to_pylist()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- files of other writers ---------------------------------------------------------------------------------------


def _create_file(
    output: Output, name: str, url_of: Callable[[str], str], table: pa.Table, accept: Callable[[pa.Table], bool]
) -> bytes:
    """Creates the Parquet file and returns the bytes in storage.

    A file of another writer without a manifest entry is kept if `accept` accepts it, so that two writers that race
    end up committing the same file. A file that is torn or not accepted is replaced.
    """
    url, data = url_of(name), to_parquet(table)
    while True:  # another writer may replace the same torn file at the same time
        try:
            storage.write_once(url, data)
            return data
        except FileExistsError:
            existing = storage.read_if_exists(url)
        if existing is None:
            continue
        if (parsed := _parse(existing)) is not None and accept(parsed):
            return existing
        if output.read_entry(name) is not None:  # never remove a committed file
            return existing
        storage.remove(url)


def _same_samples(existing: pa.Table, table: pa.Table) -> bool:
    """Whether both hold the same samples of the same shard, written by the same tokenizer."""
    return _same_origin(existing, table) and all(existing[name].equals(table[name]) for name in ("key", "source_index"))


def _subset_of_samples(existing: pa.Table, table: pa.Table, indices: Collection[int]) -> bool:
    """Whether the existing file holds some of these samples of the same shard, each once."""
    found = existing["source_index"].to_pylist() if _same_origin(existing, table) else []
    return bool(found) and len(set(found)) == len(found) and set(found) <= set(indices)


def _same_origin(existing: pa.Table, table: pa.Table) -> bool:
    # footers are compared separately: check_metadata would also compare names of list items, which Parquet changes
    return existing.schema.equals(table.schema) and _origin(existing) == _origin(table)


def _origin(table: pa.Table) -> dict[bytes, bytes]:
    return {name: value for name, value in (table.schema.metadata or {}).items() if name != b"num_tokens"}


def _parse(parquet: bytes) -> pa.Table | None:
    try:
        return pq.read_table(io.BytesIO(parquet))
    except (pa.ArrowInvalid, OSError):
        return None
