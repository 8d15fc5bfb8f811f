"""The proof of an output: every input sample is in exactly one row or one quarantine row, made by one tokenizer."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ShardError
from pipeline.manifest import Shard
from pipeline.samples import read_samples
from pipeline.tokens.layout import tokens_as_lists
from pipeline.tokens.output import READERS, Commit, Output

FOOTER_IDS = (
    "tokenizer_id",
    "codebook_id",
    "codebook_size",
    "token_dtype",
    "encoding",
    "schema_version",
    "index_order",
)


def verify(output: Output, against_input: bool = False) -> tuple[list[str], list[Commit]]:
    """What is wrong, in sentences that name the file ([] if nothing is), and the entries that were looked at.

    Checks each entry's files by checksum, ids, row by row; and that every shard ever given has its entry.
    against_input reads the input shards once more and compares their keys too.
    """
    entries, problems = output.commits_and_problems()
    inputs = output.inputs()
    problems += _missing(inputs, entries)
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda entry: _check_entry(output, entry), entries):
            problems += found
        if against_input:
            given = {shard.url: shard for shard in inputs}
            checked = [entry for entry in entries if entry.source_shard in given]
            for found in pool.map(lambda entry: _check_input(output, entry), checked):
                problems += found
    return problems, entries


def _missing(inputs: list[Shard], entries: list[Commit]) -> Iterator[str]:
    if not inputs:  # killed right after dataset.json: nothing tells what should be there
        yield "inputs/: no list of input shards; run the same `tokenmill tokenize` again"
    done = {entry.name: entry for entry in entries}
    for shard in inputs:
        if shard.name not in done:
            yield f"{shard.url}: not tokenized; run the same `tokenmill tokenize` again"
    names = {shard.name for shard in inputs}
    for entry in entries:
        if entry.name not in names:
            yield f"manifest/{entry.name}.json: no run was given the shard {entry.source_shard}"


def _check_entry(output: Output, entry: Commit) -> list[str]:
    problems = [f"manifest/{entry.name}.json: {what}" for what in _check_ids(output, entry)]
    try:
        tokens = _table(output.read_tokens(entry.name), entry.tokens_sha256)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        return [*problems, f"tokens/{entry.name}.parquet: {error}"]
    problems += [f"tokens/{entry.name}.parquet: {what}" for what in _check_tokens(output, entry, tokens)]
    quarantined: list[int] = []
    if entry.quarantine_sha256:
        try:
            table = _table(output.read_quarantine(entry.name), entry.quarantine_sha256)
            quarantined = table["source_index"].to_pylist()
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            return [*problems, f"quarantine/{entry.name}.parquet: {error}"]
    if len(quarantined) != entry.num_quarantined:
        problems.append(f"quarantine/{entry.name}.parquet: {len(quarantined)} rows, not {entry.num_quarantined}")
    every = sorted(tokens["source_index"].to_pylist() + quarantined)
    if every != list(range(entry.num_samples)):
        problems.append(f"{entry.name}: samples 0..{entry.num_samples - 1} are not each in one row; lost or doubled")
    return problems


def _check_ids(output: Output, entry: Commit) -> Iterator[str]:
    for name in ("tokenizer_id", "codebook_id"):
        if getattr(entry, name) != getattr(output.layout, name):
            yield f"{name} {getattr(entry, name)} is not the dataset's {getattr(output.layout, name)}"
    if Shard(entry.source_shard, None).name != entry.name:
        yield f"the name is not that of its shard {entry.source_shard}"
    if entry.num_rows + entry.num_quarantined != entry.num_samples:
        yield f"{entry.num_rows} rows and {entry.num_quarantined} quarantined are not {entry.num_samples} samples"


def _table(data: bytes, sha256: str) -> pa.Table:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the file is not the one that was committed (its checksum differs)")
    return pq.read_table(io.BytesIO(data))


def _check_tokens(output: Output, entry: Commit, table: pa.Table) -> Iterator[str]:
    layout = output.layout
    footer = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    for name in FOOTER_IDS:
        if footer.get(name) != str(layout.to_dict()[name]):
            yield f"footer says {name} {footer.get(name)}, the dataset {layout.to_dict()[name]}"
    if set(table["source_shard"].to_pylist()) - {entry.source_shard}:
        yield f"rows of another shard than {entry.source_shard}"
    if table.num_rows != entry.num_rows:
        yield f"{table.num_rows} rows, the manifest says {entry.num_rows}"
    keys = table["key"].to_pylist()
    if len(set(keys)) != len(keys):
        yield "a key is there twice"
    yield from _check_token_values(layout.codebook_size, entry, table, layout.token_dtype)


def _check_token_values(codebook_size: int, entry: Commit, table: pa.Table, dtype: np.dtype) -> Iterator[str]:
    column = tokens_as_lists(table["tokens"].combine_chunks(), dtype)
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) != entry.num_tokens:
        yield f"{len(values)} tokens, the manifest says {entry.num_tokens}"
    if len(values) and int(values.max()) >= codebook_size:
        yield f"token {int(values.max())} is not below {codebook_size}"
    shapes = [int(np.prod(shape)) for shape in table["shape"].to_pylist()]
    if shapes != column.value_lengths().to_pylist():
        yield "a row has another number of tokens than its shape says"


def _check_input(output: Output, entry: Commit) -> list[str]:
    """Compares the keys with those of the input shard itself."""
    try:
        given = {sample.index: sample.key for sample in read_samples(entry.source_shard)}
    except ShardError as error:
        return [str(error)]
    found: dict[int, str] = {}
    try:
        tables = [output.read_tokens(entry.name)]
        if entry.quarantine_sha256:
            tables.append(output.read_quarantine(entry.name))
        parsed = [pq.read_table(io.BytesIO(data), columns=["source_index", "key"]) for data in tables]
    except (OSError, pa.ArrowInvalid):
        return []  # told already, by the check of the files
    for table in parsed:
        found.update(zip(table["source_index"].to_pylist(), table["key"].to_pylist(), strict=True))
    return [] if found == given else [f"{entry.source_shard}: its keys are not those of the output; was it replaced?"]
