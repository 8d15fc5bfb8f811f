"""Verifies an output: every input sample is in exactly one row or one quarantine row, all from one tokenizer.

The shallow check reads manifest entries, listings and Parquet footers: it finds missing files, and sizes, ids and
counts that disagree. The deep check also reads every byte of the output and of the input, and checks each sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.shards import Shard
from pipeline.tokens.checks import CheckResult, check_shallow
from pipeline.tokens.commit import Commit, CommittedShard, group_by_shard, shard_name, what_changed
from pipeline.tokens.deep_checks import check_deep
from pipeline.tokens.output import READERS, REPAIR_AND_RERUN, Output, sorted_versions
from pipeline.tokens.repeats import KeyCounter, find_twins

FOOTERS, FILES, DEEP = "footers", "files", "deep"  # what `verify` reads: DEEP is every byte of output and input
DEEP_READERS = 4  # shards in memory at a time
LEFT_TO_DEEP = "checksums, single rows, token values and keys, and whether the input still has these samples"
RERUN = "run the same `tokenmill tokenize` again"


@dataclass
class Proof:
    """The result of `verify`. problems: messages that name the file; empty if the output is correct.

    entries: the manifest entries that were checked. num_leftovers: files without a manifest entry, from runs that died
    or are still running; readers ignore them. num_without_ranges: files of older versions without statistics for
    source_index; the shallow check proves less about them. temporary: URLs of unfinished files. strays: files of other
    programs. notes: what may be right or wrong.

    What `repair` removes, each with its reason: damaged_shards by name, damaged_lists by id, damaged_notes by name, and
    dataset.json if damaged_dataset is not empty.
    """

    problems: list[str] = field(default_factory=list)
    entries: list[Commit] = field(default_factory=list)
    num_leftovers: int = 0
    num_without_ranges: int = 0
    temporary: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged_shards: dict[str, str] = field(default_factory=dict)
    damaged_lists: dict[str, str] = field(default_factory=dict)
    damaged_notes: dict[str, str] = field(default_factory=dict)
    damaged_dataset: str = ""


def verify(
    output: Output, *, deep: bool = False, level: str = "", progress: Callable[[int, int], None] = lambda *_: None
) -> Proof:
    """Checks that every input shard is committed, and checks its files. progress(checked, total) counts shards.

    level: FOOTERS, FILES (every byte of the output) or DEEP; by default it follows from deep.
    """
    level = level or (DEEP if deep else FOOTERS)
    proof, sizes = Proof(strays=output.strays(), temporary=output.temporary_files()), output.file_sizes()
    proof.entries, invalid = output.commits_and_problems()
    proof.damaged_shards = {shard_name(name): what for name, what in reversed(invalid.items())}
    lists, proof.damaged_lists = output.input_lists_and_problems()
    _, proof.damaged_notes = output.failures_and_problems()
    proof.problems += [*invalid.values(), *proof.damaged_lists.values(), *proof.damaged_notes.values()]
    if not proof.damaged_lists:  # otherwise we do not know what was asked for
        proof.problems += _missing(lists, {*invalid, *(entry.name for entry in proof.entries)})
        proof.problems += _changed(sorted_versions(lists), proof.entries)
    shards = group_by_shard(proof.entries)
    results = _check(output, shards, sizes, level, proof, progress)
    proof.problems += find_twins(shards, {result.name: result.samples_sha256 for result in results}, lists)
    names = {*invalid, *(entry.name for entry in proof.entries)}
    quarantines = {*invalid, *(entry.name for entry in proof.entries if entry.quarantine_sha256)}
    proof.num_leftovers = len(sizes["tokens"].keys() - names) + len(sizes["quarantine"].keys() - quarantines)
    return proof


def _check(
    output: Output,
    shards: list[CommittedShard],
    sizes: dict[str, dict[str, int]],
    level: str,
    proof: Proof,
    progress: Callable[[int, int], None],
) -> list[CheckResult]:
    """Checks each shard, and adds what was found to the proof. The results are without their rows."""
    if level == FOOTERS:
        check, readers = partial(check_shallow, output, sizes), READERS
    else:
        check, readers = partial(check_deep, output, read_input=level == DEEP), DEEP_READERS
    results, keys = [], KeyCounter()
    for done, result in enumerate(map_in_threads(check, shards, readers), start=1):
        keys.add(shards[done - 1].first.source_shard, [key for _, key in result.rows + result.quarantined])
        result.rows, result.quarantined = [], []
        proof.problems += [*result.problems, *result.input_problems]
        proof.num_without_ranges += result.num_without_ranges
        if result.problems:
            proof.damaged_shards.setdefault(result.name, result.problems[0])
        results.append(result)
        progress(done, len(shards))
    proof.notes += keys.repeats()
    if results and all(result.foreign for result in results):
        proof.damaged_dataset = f"dataset.json is not the one of these shards: none of {len(results)} agrees with it"
        proof.problems.append(f"{proof.damaged_dataset}; {REPAIR_AND_RERUN}")
    return results


def _missing(lists: dict[str, list[Shard]], done: set[str]) -> Iterator[str]:
    if not lists:  # the run was killed right after it wrote dataset.json
        yield f"inputs/: no list of input shards; {RERUN}"
    listed_in = {shard.url: list_id for list_id, shards in lists.items() for shard in shards}
    for url, list_id in sorted(listed_in.items()):
        if Shard(url, None).name not in done:
            yield f"{url}: not tokenized; {RERUN}, or withdraw its list with verify.withdraw={list_id}"


def _changed(inputs: list[Shard], entries: list[Commit]) -> Iterator[str]:
    """Entries of shards that are not in any list of inputs, or not in the version that was tokenized."""
    versions: dict[str, list[Shard]] = {}
    for shard in inputs:
        versions.setdefault(shard.url, []).append(shard)
    for entry in entries:
        advice = f"{RERUN} with it, or withdraw its rows with verify.withdraw={shard_name(entry.name)}"
        if entry.source_shard not in versions:
            yield f"manifest/{entry.name}.json: no run was given the shard {entry.source_shard}; {advice}"
            continue
        # compare sizes only: a list of inputs is not written again if only dates have changed
        changes = [what_changed(entry, replace(shard, version=None)) for shard in versions[entry.source_shard]]
        if all(changes):
            yield (
                f"manifest/{entry.name}.json: {entry.source_shard} {changes[-1]}: no run was given that version; "
                f"{advice}"
            )
