"""The deep check of one shard: every byte of its files, every sample, and the keys of the input shard."""

import collections
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError, StorageError
from pipeline.tokens.checks import (
    MISSING,
    WRONG_COLUMNS,
    CheckResult,
    check_entries,
    check_footer,
    check_quarantine_footer,
)
from pipeline.tokens.commit import Commit, CommittedShard, hash_samples, shard_name, what_changed
from pipeline.tokens.footer import parse_footer
from pipeline.tokens.output import Output
from pipeline.tokens.schema import read_parquet, tokens_as_lists


def check_deep(output: Output, shard: CommittedShard, *, read_input: bool = True) -> CheckResult:
    """read_input: also compares the keys with those of the input shard."""
    result = CheckResult(shard_name(shard.first.name))
    check_entries(output, shard, result)
    readable = True
    for entry in shard.entries:
        tokens = _read_tokens(output, entry, result)
        readable &= tokens is not None
        readable &= _read_quarantine(output, entry, result)
        if tokens is not None and not entry.retry:
            result.samples_sha256 = _hash(tokens, result)
    if readable:
        result.problems += _check_samples(shard, result)
        if read_input:
            _check_input(shard.first, dict(result.rows + result.quarantined), result)
    return result


def _read_tokens(output: Output, entry: Commit, result: CheckResult) -> dict[int, list[bytes]] | None:
    """Checks a whole token file. Returns the tokens of the rows of each source_index as bytes; None if it cannot be
    read.
    """
    views = output.layout.views
    try:
        data = _with_checksum(output.read_tokens(entry.name), entry.tokens_sha256)
        problems = list(check_footer(output, entry, parse_footer(data), result))
        if WRONG_COLUMNS in problems:
            raise ValueError("; ".join(problems))
        table = read_parquet(
            data, ["key", "source_shard", "source_index", "tokens", "shape", *(["view"] if views else [])]
        )
        problems += _check_tokens(output, entry, table)
        if views:
            problems += _check_views(table, views.count)
        indices = table["source_index"].to_pylist()
        rows = list(zip(indices, table["key"].to_pylist(), strict=True))
        tokens = collections.defaultdict(list)
        for index, of_row in zip(indices, _as_bytes(table["tokens"], output.layout.token_dtype), strict=True):
            tokens[index].append(of_row)
    except (StorageError, PermissionError):
        raise  # they say nothing about the output
    except FileNotFoundError:
        result.add(f"tokens/{entry.name}.parquet", [MISSING])
        return None
    except (OSError, ValueError) as error:
        result.add(f"tokens/{entry.name}.parquet", [str(error)])
        return None
    result.add(f"tokens/{entry.name}.parquet", problems)
    result.rows += dict.fromkeys(rows) if views else rows
    return dict(tokens)


def _as_bytes(column: pa.ChunkedArray, dtype: np.dtype) -> Iterator[bytes]:
    """The tokens of each row, little-endian."""
    for chunk in column.chunks:
        lists = tokens_as_lists(chunk, dtype)
        values = lists.values.to_numpy(zero_copy_only=False).astype(dtype.newbyteorder("<"), copy=False)
        for start, stop in itertools.pairwise(lists.offsets.to_numpy().tolist()):
            yield values[start:stop].tobytes()


def _hash(tokens: dict[int, list[bytes]], result: CheckResult) -> str | None:
    """See `hash_samples`; of a first commit, whose rows and quarantine result holds."""
    samples = sorted(result.rows + result.quarantined)
    return hash_samples((key, of_row) for index, key in samples for of_row in tokens.get(index, [None]))


def _read_quarantine(output: Output, entry: Commit, result: CheckResult) -> bool:
    """Checks a quarantine file, which replaces the one of the entry before. Returns whether it could be read."""
    settled = set(entry.settled)
    before, result.quarantined = result.quarantined, []
    if not entry.quarantine_sha256:
        return True
    try:
        data = _with_checksum(output.read_quarantine(entry.name), entry.quarantine_sha256)
        problems = list(check_quarantine_footer(entry, parse_footer(data)))
        table = read_parquet(data, ["source_index", "key"])
    except (StorageError, PermissionError):
        raise  # they say nothing about the output
    except FileNotFoundError:
        result.add(f"quarantine/{entry.name}.parquet", [MISSING])
        return False
    except (OSError, ValueError) as error:
        result.add(f"quarantine/{entry.name}.parquet", [str(error)])
        return False
    result.quarantined = list(zip(table["source_index"].to_pylist(), table["key"].to_pylist(), strict=True))
    if entry.retry and result.quarantined != [sample for sample in before if sample[0] not in settled]:
        problems.append("it is not the quarantine before it minus the samples that this retry recovered")
    result.add(f"quarantine/{entry.name}.parquet", problems)
    return True


def _with_checksum(data: bytes, sha256: str) -> bytes:
    """The data. Raises ValueError if its checksum is another."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the file is not the one that was committed (its checksum differs)")
    return data


def _check_tokens(output: Output, entry: Commit, table: pa.Table) -> Iterator[str]:
    if set(table["source_shard"].to_pylist()) - {entry.source_shard}:
        yield f"rows of another shard than {entry.source_shard}"
    samples: Sequence[int] = table["source_index"].to_pylist()
    if entry.retry and (list(dict.fromkeys(samples)) if output.layout.views else samples) != entry.settled:
        yield "its rows are not the samples that the manifest lists"
    column = tokens_as_lists(table["tokens"].combine_chunks(), output.layout.token_dtype)
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) != entry.num_tokens:
        yield f"{len(values)} tokens, the manifest says {entry.num_tokens}"
    if output.layout.codebook_size and len(values) and int(values.max()) >= output.layout.codebook_size:
        yield f"token {int(values.max())} is not below {output.layout.codebook_size}"
    shapes = table["shape"].to_pylist()
    if any(side < 0 for shape in shapes for side in shape):
        yield "a row has a shape with a negative side"
    elif [math.prod(shape) for shape in shapes] != column.value_lengths().to_pylist():
        yield "a row has a different number of tokens than its shape says"


def _check_views(table: pa.Table, count: int) -> Iterator[str]:
    found: dict[int, list[int]] = {}
    for index, view in zip(table["source_index"].to_pylist(), table["view"].to_pylist(), strict=True):
        found.setdefault(index, []).append(view)
    wrong = {index: views for index, views in found.items() if views != list(range(count))}
    for index, views in itertools.islice(wrong.items(), 1):
        yield (
            f"{len(wrong)} samples do not have the views 0 to {count - 1} once each, in this order; sample {index} has "
            f"{', '.join(map(str, views))}; lost or doubled"
        )


def _check_samples(shard: CommittedShard, result: CheckResult) -> Iterator[str]:
    """Over all entries of a shard: every sample is in one row or in the current quarantine."""
    first = shard.first
    keys = [key for _, key in result.rows]
    if len(set(keys)) != len(keys):
        yield f"{first.name}: a key occurs twice"
    if first.samples_sha256 not in (None, result.samples_sha256):
        yield f"{first.name}: its keys and tokens are not those in the manifest"
    if sorted(index for index, _ in result.rows + result.quarantined) != list(range(first.num_samples)):
        yield f"{first.name}: samples 0..{first.num_samples - 1} are not each in one row; lost or doubled"


def _check_input(entry: Commit, found: dict[int, str], result: CheckResult) -> None:
    """Compares the keys with those of the input shard itself."""
    url = entry.source_shard
    try:
        expected = {sample.index: sample.key for sample in read_samples(url)}
    except ShardError as error:
        result.input_problems.append(str(error))
        return
    if found == expected:
        return
    now = storage.find(url)
    changed = what_changed(entry, Shard(url, now.num_bytes, now.version)) if now else "is gone"
    if changed:
        result.input_problems.append(
            f"{url}: its keys are not those of the output; was it replaced? It {changed}. Restore the old shard, or "
            f"withdraw its rows with verify.withdraw={url}"
        )
    else:
        result.problems.append(f"{url}: its keys are not those of the output, and it did not change")
