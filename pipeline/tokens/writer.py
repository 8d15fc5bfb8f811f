"""Commits shards to an output. Any number of writers may work on the same shard, and any of them may die midway.

The files of a commit are created in this order: tokens, quarantine, manifest entry. The entry is the commit.
"""

import collections
import contextlib
import hashlib
import io
import os
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError
from pipeline.tokens.commit import REFUSE, Commit, CommittedShard, hash_samples, retry_name
from pipeline.tokens.output import Output, to_json
from pipeline.tokens.quarantine import Quarantined, quarantine_table
from pipeline.tokens.schema import ShardLayout, TokenRow, read_parquet, to_parquet, views_of

RETRY_S = 3600  # a token file of a retry that is older than this, and not committed, belongs to a retry that died


def commit_shard(
    output: Output,
    shard: Shard,
    rows: list[TokenRow],
    quarantined: list[Quarantined],
    seconds: dict[str, float],
    now: float,
    *,
    num_samples: int | None = None,
    same_names: str = REFUSE,
    notes: dict[str, int] | None = None,
) -> Commit:
    """Writes tokens, quarantine, and last the manifest entry. A second commit of a shard changes nothing.

    num_samples: the number of samples that the reader of the shard counted; None if unknown. seconds: by stage, and
    "total" so far; the time of writing is added. same_names: tokens.same_names of the run. notes: see Commit. Returns
    the entry in storage: another worker's if it was first.
    Raises ValueError, and writes nothing, unless each of the samples 0..num_samples - 1 is given exactly once: as a row
    (or one row for each view of the layout), or as a quarantined sample.
    """
    if (existing := output.read_entry(shard.name)) is not None:
        return existing
    per_sample = output.layout.rows_per_sample
    expected = range(len(rows) // per_sample + len(quarantined) if num_samples is None else num_samples)
    _check_samples(output.layout, shard, rows, quarantined, expected)
    start, table = time.monotonic(), _tokens_table(output, shard, rows)
    tokens = _create_file(output, shard.name, output.tokens_url(shard.name), to_parquet(table))
    entry, quarantine = _write_quarantine(output, shard, 0, tokens.data, quarantined, now)
    entry.samples_sha256 = hash_of_shard(output.layout, rows, quarantined)
    entry.same_names = same_names
    entry.seconds, entry.notes = _with_writing(seconds, time.monotonic() - start), notes or {}
    committed = _write_entry(output, entry, tokens, quarantine)
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
    was first, or is writing: its result is kept, and this one is dropped. Raises ValueError like `commit_shard`.
    """
    before = output.quarantined(committed.last)
    retried = [sample.source_index for sample in before]
    _check_samples(output.layout, shard, rows, quarantined, retried)
    if not rows:
        return None
    start, retry, table = time.monotonic(), committed.last.retry + 1, _tokens_table(output, shard, rows)
    name = retry_name(shard.name, retry)
    url = output.tokens_url(name)
    try:
        tokens = _create_file(output, name, url, to_parquet(table), partial(_is_proven, url=url, table=table))
    except _OtherRetry:
        return None
    settled = set(_source_indices(tokens.data))
    reasons = {sample.source_index: sample for sample in [*before, *quarantined]}
    remaining = [sample for index, sample in reasons.items() if index not in settled]
    entry, quarantine = _write_quarantine(output, shard, retry, tokens.data, remaining, now)
    entry.seconds, entry.notes = _with_writing(seconds, time.monotonic() - start), notes or {}
    return entry if _write_entry(output, entry, tokens, quarantine) is entry else None


Unit = tuple[int, int | None]  # source_index, and the number of the view


def _check_samples(
    layout: ShardLayout,
    shard: Shard,
    rows: list[TokenRow],
    quarantined: list[Quarantined],
    samples: Collection[int],
) -> None:
    """Checks before anything is written that each sample, or each view of it, is there once. Afterwards it could only
    be reported.
    """
    expected = _units(samples, layout)
    found = collections.Counter[Unit]((row.source_index, row.view) for row in rows)
    found.update(_units([sample.source_index for sample in quarantined], layout))
    lost = [unit for unit in expected if unit not in found]
    doubled = [unit for unit, times in found.items() if times > 1]
    unknown = sorted(found.keys() - set(expected), key=str)
    if lost or doubled or unknown:
        wanted = f"{len(samples)} samples" + (f" in {layout.views.count} views each" if layout.views else "")
        raise ValueError(
            f"{shard.url}: {len(rows)} rows and {len(quarantined)} quarantined are not its {wanted} "
            f"(source_index lost: {_few(lost)}; twice: {_few(doubled)}; unknown: {_few(unknown)}). Nothing was "
            "committed. Either the shard changed while it was read, or this is a bug in tokenmill"
        )


def _units(samples: Collection[int], layout: ShardLayout) -> list[Unit]:
    return [(index, view) for index in samples for view in layout.view_numbers]


def _few(units: list[Unit]) -> str:
    names = [str(index) if view is None else f"{index} view {view}" for index, view in units[:5]]
    shown = ", ".join(names) or "none"
    return f"{shown} and {len(units) - 5} more" if len(units) > 5 else shown


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
) -> "tuple[Commit, _Written | None]":
    """Writes the quarantine file if there is one. Returns the entry to commit, and the file.

    tokens: the written token file.
    """
    name, written = retry_name(shard.name, retry), None
    if quarantined:
        data = to_parquet(quarantine_table(shard.url, quarantined))
        written = _create_file(output, name, output.quarantine_url(name), data)
    indices = _source_indices(tokens)
    samples = list(dict.fromkeys(indices))
    entry = Commit(
        name=name,
        source_shard=shard.url,
        source_num_bytes=shard.num_bytes,
        source_version=shard.version,
        num_samples=len(samples) + len(quarantined),
        num_rows=len(indices),
        num_quarantined=len(quarantined),
        num_tokens=int(pq.read_schema(io.BytesIO(tokens)).metadata[b"num_tokens"]),
        tokens_sha256=_sha256(tokens),
        tokens_num_bytes=len(tokens),
        quarantine_sha256=_sha256(written.data) if written else None,
        quarantine_num_bytes=len(written.data) if written else None,
        tokenizer_id=output.layout.tokenizer_id,
        codebook_id=output.layout.codebook_id or "",
        committed_at=now,
        worker={"host": socket.gethostname(), "pid": os.getpid()},
        reasons=dict(collections.Counter(f"{sample.stage} {sample.error}" for sample in quarantined)),
        retry=retry,
        settled=samples if retry else [],
    )
    return entry, written


def _write_entry(output: Output, entry: Commit, *written: "_Written | None") -> Commit:
    """Commits. Returns the entry in storage: another writer's if it was first; its files are then put back.

    written: the files of the entry.
    """
    try:
        storage.write_once(output.entry_url(entry.name), to_json(asdict(entry)))
    except FileExistsError:
        existing = output.read_entry(entry.name)
        if existing is None:  # withdrawn in this moment
            raise ShardError(f"{entry.source_shard}: its manifest entry was removed during its commit") from None
        for file in written:
            if file is not None:
                file.put_back({existing.tokens_sha256, existing.quarantine_sha256})
        return existing
    return entry


def _with_writing(seconds: dict[str, float], writing: float) -> dict[str, float]:
    total = {"total": seconds["total"] + writing} if "total" in seconds else {}
    return {stage: round(spent, 4) for stage, spent in {**seconds, "write": writing, **total}.items()}


def _source_indices(tokens: bytes) -> list[int]:
    return pq.read_table(io.BytesIO(tokens), columns=["source_index"])["source_index"].to_pylist()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_of_shard(layout: ShardLayout, rows: list[TokenRow], quarantined: list[Quarantined]) -> str | None:
    """See `hash_samples`."""
    samples: list[TokenRow | Quarantined] = sorted([*rows, *quarantined], key=_place)
    dtype = layout.token_dtype.newbyteorder("<")
    return hash_samples(
        (sample.key, sample.tokens.astype(dtype).tobytes() if isinstance(sample, TokenRow) else None)
        for sample in samples
    )


def _place(sample: TokenRow | Quarantined) -> tuple[int, int]:
    return sample.place if isinstance(sample, TokenRow) else (sample.source_index, 0)


# -- files of other writers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written:
    """A file in storage. replaced: the bytes of another writer that it replaced."""

    url: str
    data: bytes
    replaced: bytes | None = None

    def put_back(self, committed: set[str | None]) -> None:
        """Restores the replaced file if its checksum is among the committed ones: its writer was still running."""
        if self.replaced is not None and _sha256(self.replaced) in committed:
            storage.replace(self.url, self.replaced)


def _create_file(
    output: Output, name: str, url: str, data: bytes, accept: Callable[[bytes], bool] = lambda existing: False
) -> _Written:
    """Creates the file with these bytes.

    A file without a manifest entry, from a run that died or from another writer, proves nothing: it is kept only if
    it has the same bytes, or if `accept` can prove its rows. Any other file is replaced, and so is an empty folder.
    """
    try:
        storage.write_once(url, data)
        return _Written(url, data)
    except FileExistsError:
        existing = _existing(url)
    if existing is not None and (existing == data or accept(existing)):
        return _Written(url, existing)
    if output.read_entry(name) is not None:  # never replace a committed file
        return _Written(url, data)
    storage.replace(url, data)
    return _Written(url, data, existing)


def _existing(url: str) -> bytes | None:
    """The content of the file; None if it is gone. An empty folder in its place is removed."""
    try:
        return storage.read_if_exists(url)
    except IsADirectoryError:
        storage.remove(url)
        return None


class _OtherRetry(Exception):
    """Another retry is writing rows that this one does not have."""


def _is_proven(existing: bytes, url: str, table: pa.Table) -> bool:
    """Whether each row in the file of another retry is one of the table's rows, tokens included.

    Raises _OtherRetry for a recent file with other rows too: we cannot prove these, and if we replaced the file of a
    retry that still runs, its entry would lack its file. The writer of an old file has died.
    """
    parsed = _parse(existing)
    if parsed is None or not len(parsed) or not _same_origin(parsed, table) or _contradicts(parsed, table):
        return False
    found, ours = _units_of(parsed), _units_of(table)
    if set(found) <= set(ours):
        samples = {index for index, _ in found}  # each with all of its views
        return sorted(found) == sorted(unit for unit in ours if unit[0] in samples)
    with contextlib.suppress(FileNotFoundError):
        if storage.age_s(url) < RETRY_S:
            raise _OtherRetry
    return False


def _contradicts(existing: pa.Table, table: pa.Table) -> bool:
    """Whether they have different rows for the same sample."""
    ours, theirs = (
        dict(zip(_units_of(one), one.replace_schema_metadata(None).to_pylist(), strict=True))
        for one in (table, existing)
    )
    return any(ours[unit] != theirs[unit] for unit in ours.keys() & theirs.keys())


def _units_of(table: pa.Table) -> list[tuple[int, int]]:
    """(source_index, view) of each row; view is 0 without views."""
    return [(index, view or 0) for index, view in zip(table["source_index"].to_pylist(), views_of(table), strict=True)]


def _same_origin(existing: pa.Table, table: pa.Table) -> bool:
    # footers are compared separately: check_metadata would also compare names of list items, which Parquet changes
    return existing.schema.equals(table.schema) and _origin(existing) == _origin(table)


def _origin(table: pa.Table) -> dict[bytes, bytes]:
    return {name: value for name, value in (table.schema.metadata or {}).items() if name != b"num_tokens"}


def _parse(parquet: bytes) -> pa.Table | None:
    try:
        return read_parquet(parquet)
    except (ValueError, OSError):
        return None
