"""The deep check of one shard: every byte of its files, every sample, and the keys of the input shard."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.samples import read_samples
from pipeline.errors import ShardError, StorageError
from pipeline.tokens.checks import WRONG_COLUMNS, CheckResult, check_entries, check_footer, check_quarantine_footer
from pipeline.tokens.commit import Commit, CommittedShard
from pipeline.tokens.output import Output
from pipeline.tokens.schema import tokens_as_lists


def check_deep(output: Output, shard: CommittedShard) -> CheckResult:
    result = CheckResult(list(check_entries(output, shard)))
    readable = True
    for entry in shard.entries:
        readable &= _read_tokens(output, entry, result)
        readable &= _read_quarantine(output, entry, result)
    if readable:
        result.problems += _check_samples(shard, result)
        result.problems += _check_input(shard.first, dict(result.rows + result.quarantined))
    return result


def _read_tokens(output: Output, entry: Commit, result: CheckResult) -> bool:
    """Checks a whole token file. Returns whether its rows could be read."""
    try:
        data = _with_checksum(output.read_tokens(entry.name), entry.tokens_sha256)
        problems = list(check_footer(output, entry, pq.read_metadata(io.BytesIO(data))))
        if WRONG_COLUMNS in problems:
            raise ValueError("; ".join(problems))
        table = pq.read_table(io.BytesIO(data), columns=["key", "source_shard", "source_index", "tokens", "shape"])
        problems += _check_tokens(output, entry, table)
        rows = list(zip(table["source_index"].to_pylist(), table["key"].to_pylist(), strict=True))
    except StorageError:
        raise  # an outage says nothing about the output
    except (OSError, ValueError) as error:
        problems, rows = [str(error)], None
    result.problems += [f"tokens/{entry.name}.parquet: {what}" for what in problems]
    result.rows += rows or []
    return rows is not None


def _read_quarantine(output: Output, entry: Commit, result: CheckResult) -> bool:
    """Checks a quarantine file, which replaces the one of the entry before. Returns whether it could be read."""
    settled = set(entry.settled)
    before, result.quarantined = result.quarantined, []
    if not entry.quarantine_sha256:
        return True
    try:
        data = _with_checksum(output.read_quarantine(entry.name), entry.quarantine_sha256)
        problems = list(check_quarantine_footer(entry, pq.read_metadata(io.BytesIO(data))))
        table = pq.read_table(io.BytesIO(data), columns=["source_index", "key"])
    except StorageError:
        raise  # an outage says nothing about the output
    except (OSError, ValueError) as error:
        result.problems.append(f"quarantine/{entry.name}.parquet: {error}")
        return False
    result.quarantined = list(zip(table["source_index"].to_pylist(), table["key"].to_pylist(), strict=True))
    if entry.retry and result.quarantined != [sample for sample in before if sample[0] not in settled]:
        problems.append("it is not the quarantine before it minus the samples that this retry recovered")
    result.problems += [f"quarantine/{entry.name}.parquet: {what}" for what in problems]
    return True


def _with_checksum(data: bytes, sha256: str) -> bytes:
    """The data. Raises ValueError if its checksum is another."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the file is not the one that was committed (its checksum differs)")
    return data


def _check_tokens(output: Output, entry: Commit, table: pa.Table) -> Iterator[str]:
    if set(table["source_shard"].to_pylist()) - {entry.source_shard}:
        yield f"rows of another shard than {entry.source_shard}"
    if entry.retry and table["source_index"].to_pylist() != entry.settled:
        yield "its rows are not the samples that the manifest lists"
    column = tokens_as_lists(table["tokens"].combine_chunks(), output.layout.token_dtype)
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) != entry.num_tokens:
        yield f"{len(values)} tokens, the manifest says {entry.num_tokens}"
    if output.layout.codebook_size and len(values) and int(values.max()) >= output.layout.codebook_size:
        yield f"token {int(values.max())} is not below {output.layout.codebook_size}"
    shapes = [int(np.prod(shape)) for shape in table["shape"].to_pylist()]
    if shapes != column.value_lengths().to_pylist():
        yield "a row has a different number of tokens than its shape says"


def _check_samples(shard: CommittedShard, result: CheckResult) -> Iterator[str]:
    """Over all entries of a shard: every sample is in one row or in the current quarantine."""
    first = shard.first
    keys = [key for _, key in result.rows]
    if len(set(keys)) != len(keys):
        yield f"{first.name}: a key occurs twice"
    if sorted(index for index, _ in result.rows + result.quarantined) != list(range(first.num_samples)):
        yield f"{first.name}: samples 0..{first.num_samples - 1} are not each in one row; lost or doubled"


def _check_input(entry: Commit, found: dict[int, str]) -> Iterator[str]:
    """Compares the keys with those of the input shard itself."""
    try:
        expected = {sample.index: sample.key for sample in read_samples(entry.source_shard)}
    except ShardError as error:
        yield str(error)
        return
    if found != expected:
        yield f"{entry.source_shard}: its keys are not those of the output; was it replaced?"
