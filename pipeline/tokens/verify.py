"""Verifies an output: every input sample is in exactly one row or one quarantine row, all from one tokenizer.

The shallow check reads manifest entries, listings and Parquet footers: it finds missing files, and sizes, ids and
counts that disagree. The deep check also reads every byte of the output and of the input, and checks each sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from pipeline import storage
from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.shards import Shard
from pipeline.tokens.checks import check_shallow
from pipeline.tokens.commit import Commit, group_by_shard, what_changed
from pipeline.tokens.deep_checks import check_deep
from pipeline.tokens.output import READERS, Output

DEEP_READERS = 4  # shards in memory at a time
LEFT_TO_DEEP = "checksums, single rows, token values and keys, and whether the input still has these samples"


class Proof(NamedTuple):
    """The result of `verify`. problems: messages that name the file; empty if the output is correct.

    entries: the manifest entries that were checked. num_leftovers: files without a manifest entry, from runs that died
    or are still running; readers ignore them. num_without_ranges: files of older versions without statistics for
    source_index; the shallow check proves less about them.
    """

    problems: list[str]
    entries: list[Commit]
    num_leftovers: int = 0
    num_without_ranges: int = 0


def verify(output: Output, *, deep: bool = False, progress: Callable[[int, int], None] = lambda *_: None) -> Proof:
    """Checks that every input shard is committed, and checks its files. progress(checked, total) counts shards."""
    entries, problems = output.commits_and_problems()
    inputs = output.input_versions()
    problems += _missing(inputs, entries)
    problems += _changed(inputs, entries)
    shards = group_by_shard(entries)
    sizes = {folder: _file_sizes(storage.join(output.url, folder)) for folder in ("tokens", "quarantine")}
    check = partial(check_deep, output) if deep else partial(check_shallow, output, sizes)
    num_without_ranges = 0
    for done, result in enumerate(map_in_threads(check, shards, DEEP_READERS if deep else READERS), start=1):
        problems += result.problems
        num_without_ranges += result.num_without_ranges
        progress(done, len(shards))
    num_leftovers = len(sizes["tokens"].keys() - {entry.name for entry in entries})
    num_leftovers += len(sizes["quarantine"].keys() - {entry.name for entry in entries if entry.quarantine_sha256})
    return Proof(problems, entries, num_leftovers, num_without_ranges)


def _file_sizes(folder: str) -> dict[str, int]:
    """Bytes of each file in the folder, by its name without the extension; {} if there is no such folder."""
    named = {found.url.rsplit("/", 1)[1]: found.num_bytes for found in storage.scan(folder)}
    return {name.rsplit(".", 1)[0]: size for name, size in named.items() if size is not None}


def _missing(inputs: list[Shard], entries: list[Commit]) -> Iterator[str]:
    if not inputs:  # the run was killed right after it wrote dataset.json
        yield "inputs/: no list of input shards; run the same `tokenmill tokenize` again"
    done = {entry.name for entry in entries}
    for url, name in {shard.url: shard.name for shard in inputs}.items():
        if name not in done:
            yield f"{url}: not tokenized; run the same `tokenmill tokenize` again"


def _changed(inputs: list[Shard], entries: list[Commit]) -> Iterator[str]:
    """Entries of shards that are not in any list of inputs, or not in the version that was tokenized."""
    versions: dict[str, list[Shard]] = {}
    for shard in inputs:
        versions.setdefault(shard.url, []).append(shard)
    for entry in entries:
        if entry.source_shard not in versions:
            yield f"manifest/{entry.name}.json: no run was given the shard {entry.source_shard}"
            continue
        # compare sizes only: a list of inputs is not written again if only dates have changed
        changes = [what_changed(entry, replace(shard, version=None)) for shard in versions[entry.source_shard]]
        if all(changes):
            yield f"manifest/{entry.name}.json: {entry.source_shard} {changes[-1]}: no run was given that version"
