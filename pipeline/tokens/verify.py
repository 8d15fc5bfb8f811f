"""The proof of an output: every input sample is in exactly one row or one quarantine row, made by one tokenizer.

Shallow, from the manifest entries, listings and the ends of the Parquet files: nothing is missing, sizes, ids and
counts agree. Deep, from every byte of the output and of the input: it is so for each single sample.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError, StorageError
from pipeline.tokens.commit import Commit, History, histories, shard_name, what_changed
from pipeline.tokens.files import column_ranges, footer, footer_fields, sizes
from pipeline.tokens.output import READERS, Output
from pipeline.tokens.quarantine import QUARANTINE_SCHEMA
from pipeline.tokens.schema import tokens_as_lists

FOOTER_IDS = (
    "tokenizer_id",
    "codebook_id",
    "codebook_size",
    "token_dtype",
    "encoding",
    "schema_version",
    "index_order",
)
OTHER_COLUMNS = "its columns are not those of the dataset"
DEEP_READERS = 4  # shards in memory at a time
LEFT_TO_DEEP = "checksums, single rows, token values and keys, and whether the input still has these samples"


class Proof(NamedTuple):
    """problems: sentences that name the file; [] is the proof. entries: those that were looked at.

    num_leftovers: files that no entry names, of runs that died or are at work; no reader sees them.
    num_without_ranges: files of older versions, which do not note the range of source_index that shallow looks at.
    """

    problems: list[str]
    entries: list[Commit]
    num_leftovers: int = 0
    num_without_ranges: int = 0


@dataclass
class _Finding:
    """What the check of one shard's files came to. rows and quarantined: key by source_index, when reading deep."""

    problems: list[str] = field(default_factory=list)
    num_without_ranges: int = 0
    rows: list[tuple[int, str]] = field(default_factory=list)
    quarantined: list[tuple[int, str]] = field(default_factory=list)


def verify(output: Output, *, deep: bool = False, progress: Callable[[int, int], None] = lambda *_: None) -> Proof:
    """Checks that each shard ever given is committed, and the files of each. progress: shards checked, of how many."""
    entries, problems = output.commits_and_problems()
    given = output.input_versions()
    problems += _missing(given, entries)
    problems += _changed(given, entries)
    shards = histories(entries)
    listed = {folder: sizes(storage.join(output.url, folder)) for folder in ("tokens", "quarantine")}
    check = partial(_check_deep, output) if deep else partial(_check_shallow, output, listed)
    num_without_ranges = 0
    for done, found in enumerate(map_in_threads(check, shards, DEEP_READERS if deep else READERS), start=1):
        problems += found.problems
        num_without_ranges += found.num_without_ranges
        progress(done, len(shards))
    num_leftovers = len(listed["tokens"].keys() - {entry.name for entry in entries})
    num_leftovers += len(listed["quarantine"].keys() - {entry.name for entry in entries if entry.quarantine_sha256})
    return Proof(problems, entries, num_leftovers, num_without_ranges)


def _missing(given: list[Shard], entries: list[Commit]) -> Iterator[str]:
    if not given:  # killed right after dataset.json: nothing tells what should be there
        yield "inputs/: no list of input shards; run the same `tokenmill tokenize` again"
    done = {entry.name for entry in entries}
    for url, name in {shard.url: shard.name for shard in given}.items():
        if name not in done:
            yield f"{url}: not tokenized; run the same `tokenmill tokenize` again"


def _changed(given: list[Shard], entries: list[Commit]) -> Iterator[str]:
    """Entries of shards that no list of inputs has, or not in the version that was tokenized."""
    versions: dict[str, list[Shard]] = {}
    for shard in given:
        versions.setdefault(shard.url, []).append(shard)
    for entry in entries:
        if entry.source_shard not in versions:
            yield f"manifest/{entry.name}.json: no run was given the shard {entry.source_shard}"
            continue
        # sizes alone: a list of inputs is not written again where only the dates have changed
        changes = [what_changed(entry, replace(shard, version=None)) for shard in versions[entry.source_shard]]
        if all(changes):
            yield f"manifest/{entry.name}.json: {entry.source_shard} {changes[-1]}: no run was given that one"


# -- entries ------------------------------------------------------------------------------------------------------


def _check_entries(output: Output, history: History) -> Iterator[str]:
    """Ids and counts of a shard's entries, and that each retry goes on where the one before it ended."""
    settled = [index for entry in history.entries for index in entry.settled]
    if len(set(settled)) != len(settled):
        yield f"{history.first.name}: two retries settled the same sample; lost or doubled"
    for number, entry in enumerate(history.entries):
        for what in (*_check_ids(output, entry), *_check_counts(entry)):
            yield f"manifest/{entry.name}.json: {what}"
        if entry.retry != number:
            yield f"manifest/{entry.name}.json: the entry before this retry is missing"
        elif number and entry.num_samples != history.entries[number - 1].num_quarantined:
            yield (
                f"manifest/{entry.name}.json: took up {entry.num_samples} samples, but "
                f"{history.entries[number - 1].num_quarantined} were in quarantine"
            )


def _check_ids(output: Output, entry: Commit) -> Iterator[str]:
    for name in ("tokenizer_id", "codebook_id"):
        if getattr(entry, name) != getattr(output.layout, name):
            yield f"{name} {getattr(entry, name)} is not the dataset's {getattr(output.layout, name)}"
    if shard_name(entry.name) != Shard(entry.source_shard, None).name:
        yield f"the name is not that of its shard {entry.source_shard}"


def _check_counts(entry: Commit) -> Iterator[str]:
    if entry.num_rows + entry.num_quarantined != entry.num_samples:
        yield f"{entry.num_rows} rows and {entry.num_quarantined} quarantined are not {entry.num_samples} samples"
    if bool(entry.quarantine_sha256) != bool(entry.num_quarantined):
        yield f"{entry.num_quarantined} quarantined, but the checksum of their file is {entry.quarantine_sha256}"
    if entry.reasons and sum(entry.reasons.values()) != entry.num_quarantined:
        yield f"reasons of {sum(entry.reasons.values())} samples, but {entry.num_quarantined} quarantined"
    if entry.retry and not len(set(entry.settled)) == len(entry.settled) == entry.num_rows:
        yield f"{entry.num_rows} rows, but it settled {len(set(entry.settled))} samples"


# -- shallow ------------------------------------------------------------------------------------------------------


def _check_shallow(output: Output, listed: dict[str, dict[str, int]], history: History) -> _Finding:
    finding = _Finding(list(_check_entries(output, history)))
    for entry in history.entries:
        for folder in ("tokens", "quarantine") if entry.quarantine_sha256 else ("tokens",):
            try:
                for what in _check_end(output, listed[folder], folder, history, entry, finding):
                    finding.problems.append(f"{folder}/{entry.name}.parquet: {what}")
            except StorageError:
                raise  # an outage proves nothing
            except (OSError, ValueError) as error:
                finding.problems.append(f"{folder}/{entry.name}.parquet: {error}")
    return finding


def _check_end(
    output: Output, listed: dict[str, int], folder: str, history: History, entry: Commit, finding: _Finding
) -> Iterator[str]:
    """The size and the footer of one file."""
    if entry.name not in listed:
        yield "the file is missing"
        return
    num_bytes = listed[entry.name]
    if folder == "quarantine":
        metadata = footer(output.quarantine_url(entry.name), num_bytes)
        yield from _check_quarantine_footer(entry, metadata)
    else:
        if entry.tokens_num_bytes not in (None, num_bytes):
            yield f"the file has {num_bytes} bytes, the manifest says {entry.tokens_num_bytes}"
        metadata = footer(output.tokens_url(entry.name), num_bytes)
        yield from _check_footer(output, entry, metadata)
    ranges = column_ranges(metadata, "source_index")
    if ranges is None:
        finding.num_without_ranges += 1
        return
    yield from _check_ranges(ranges, history.first.num_samples)
    ends = [ranges[0][1], ranges[-1][2]] if ranges else []
    if folder == "tokens" and entry.retry and ends != [*entry.settled[:1], *entry.settled[-1:]]:
        yield f"rows of samples {ends[:1]} to {ends[1:]}, not of those that the manifest says"


def _check_footer(output: Output, entry: Commit, metadata: pq.FileMetaData) -> Iterator[str]:
    layout = output.layout
    there = footer_fields(metadata)
    for name in FOOTER_IDS:
        if there.get(name) != str(layout.to_dict()[name]):
            yield f"footer says {name} {there.get(name)}, the dataset {layout.to_dict()[name]}"
    said = {"source_shard": entry.source_shard, "num_tokens": entry.num_tokens}
    said |= {"source_num_bytes": entry.source_num_bytes, "source_version": entry.source_version}
    for name, value in said.items():
        if there.get(name, str(value)) != str(value):  # older files lack some
            yield f"footer says {name} {there[name]}, the manifest {value}"
    if metadata.num_rows != entry.num_rows:
        yield f"{metadata.num_rows} rows, the manifest says {entry.num_rows}"
    if not metadata.schema.to_arrow_schema().equals(layout.schema(entry.source_shard)):
        yield OTHER_COLUMNS


def _check_quarantine_footer(entry: Commit, metadata: pq.FileMetaData) -> Iterator[str]:
    if metadata.num_rows != entry.num_quarantined:
        yield f"{metadata.num_rows} rows, not {entry.num_quarantined}"
    if not metadata.schema.to_arrow_schema().equals(QUARANTINE_SCHEMA):
        yield "its columns are not those of a quarantine"


def _check_ranges(ranges: list[tuple[int, int, int]], num_samples: int) -> Iterator[str]:
    """Row groups as (rows, smallest, largest source_index): each has room for its rows, and none overlaps the next."""
    end = -1
    for rows, low, high in ranges:
        if low <= end or high >= num_samples or high - low + 1 < rows:
            yield f"{rows} rows of samples {low}..{high}, after {end}, of {num_samples} samples; lost or doubled"
        end = max(end, high)


# -- deep ---------------------------------------------------------------------------------------------------------


def _check_deep(output: Output, history: History) -> _Finding:
    finding = _Finding(list(_check_entries(output, history)))
    complete = True
    for entry in history.entries:
        complete &= _read_tokens(output, entry, finding)
        complete &= _read_quarantine(output, entry, finding)
    if complete:
        finding.problems += _check_samples(history, finding)
        finding.problems += _check_input(history.first, dict(finding.rows + finding.quarantined))
    return finding


def _read_tokens(output: Output, entry: Commit, finding: _Finding) -> bool:
    """Checks a token file from end to end. Whether its rows could be read."""
    try:
        data = _checked(output.read_tokens(entry.name), entry.tokens_sha256)
        problems = list(_check_footer(output, entry, pq.read_metadata(io.BytesIO(data))))
        if OTHER_COLUMNS in problems:
            raise ValueError("; ".join(problems))
        table = pq.read_table(io.BytesIO(data), columns=["key", "source_shard", "source_index", "tokens", "shape"])
        problems += _check_tokens(output, entry, table)
        rows = list(zip(table["source_index"].to_pylist(), table["key"].to_pylist(), strict=True))
    except StorageError:
        raise  # an outage proves nothing
    except (OSError, ValueError) as error:
        problems, rows = [str(error)], None
    finding.problems += [f"tokens/{entry.name}.parquet: {what}" for what in problems]
    finding.rows += rows or []
    return rows is not None


def _read_quarantine(output: Output, entry: Commit, finding: _Finding) -> bool:
    """Checks a quarantine file, which takes the place of the one before. Whether it could be read."""
    settled = set(entry.settled)
    before, finding.quarantined = finding.quarantined, []
    if not entry.quarantine_sha256:
        return True
    try:
        data = _checked(output.read_quarantine(entry.name), entry.quarantine_sha256)
        problems = list(_check_quarantine_footer(entry, pq.read_metadata(io.BytesIO(data))))
        table = pq.read_table(io.BytesIO(data), columns=["source_index", "key"])
    except StorageError:
        raise  # an outage proves nothing
    except (OSError, ValueError) as error:
        finding.problems.append(f"quarantine/{entry.name}.parquet: {error}")
        return False
    finding.quarantined = list(zip(table["source_index"].to_pylist(), table["key"].to_pylist(), strict=True))
    if entry.retry and finding.quarantined != [sample for sample in before if sample[0] not in settled]:
        problems.append("not what the retry left of the quarantine before it")
    finding.problems += [f"quarantine/{entry.name}.parquet: {what}" for what in problems]
    return True


def _checked(data: bytes, sha256: str) -> bytes:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the file is not the one that was committed (its checksum differs)")
    return data


def _check_tokens(output: Output, entry: Commit, table: pa.Table) -> Iterator[str]:
    if set(table["source_shard"].to_pylist()) - {entry.source_shard}:
        yield f"rows of another shard than {entry.source_shard}"
    if entry.retry and table["source_index"].to_pylist() != entry.settled:
        yield "its rows are not of the samples that the manifest says"
    column = tokens_as_lists(table["tokens"].combine_chunks(), output.layout.token_dtype)
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) != entry.num_tokens:
        yield f"{len(values)} tokens, the manifest says {entry.num_tokens}"
    if output.layout.codebook_size and len(values) and int(values.max()) >= output.layout.codebook_size:
        yield f"token {int(values.max())} is not below {output.layout.codebook_size}"
    shapes = [int(np.prod(shape)) for shape in table["shape"].to_pylist()]
    if shapes != column.value_lengths().to_pylist():
        yield "a row has another number of tokens than its shape says"


def _check_samples(history: History, finding: _Finding) -> Iterator[str]:
    """Over all entries of a shard: every sample in one row or in the quarantine that stands."""
    first = history.first
    keys = [key for _, key in finding.rows]
    if len(set(keys)) != len(keys):
        yield f"{first.name}: a key is there twice"
    if sorted(index for index, _ in finding.rows + finding.quarantined) != list(range(first.num_samples)):
        yield f"{first.name}: samples 0..{first.num_samples - 1} are not each in one row; lost or doubled"


def _check_input(entry: Commit, found: dict[int, str]) -> Iterator[str]:
    """Compares the keys with those of the input shard itself."""
    try:
        given = {sample.index: sample.key for sample in read_samples(entry.source_shard)}
    except ShardError as error:
        yield str(error)
        return
    if found != given:
        yield f"{entry.source_shard}: its keys are not those of the output; was it replaced?"
