"""Removes from an output what `verify` found damaged, so that the next `tokenize` makes it again.

A shard is withdrawn with all its files: first tokens and quarantine, then its entries, the last retry first. A repair
that is killed leaves an entry without its files, which `verify` finds; the next repair continues. As long as the entry
is there, no `tokenize` writes files of the shard.
"""

import itertools
from dataclasses import dataclass

from pipeline import storage
from pipeline.tokens.commit import RETRY_NAME, shard_name
from pipeline.tokens.output import Output
from pipeline.tokens.repeats import lists_by_url
from pipeline.tokens.verify import Proof

OLD_S = 3600  # a temporary file that is older than this belongs to a writer that was killed


@dataclass
class Removal:
    """Something to remove. urls: its files, in the order in which they must go."""

    what: str
    reason: str
    urls: list[str]

    def remove(self) -> None:
        """Raises OSError for a folder that holds files."""
        for url in self.urls:
            storage.remove(url)


def plan_repair(output: Output, proof: Proof) -> list[Removal]:
    """What to remove because of the problems in the proof.

    If dataset.json is damaged, no shard is removed: none can be judged without it.
    """
    removals = [_list_removal(output, name, why) for name, why in proof.damaged_lists.items()]
    for name, why in proof.damaged_notes.items():
        removals.append(Removal(f"failed/{name}.json", why, [output.failure_url(name)]))
    old = [url for url in proof.temporary if _is_old(url)]
    removals += [Removal(url, "an unfinished file of a writer that was killed", [url]) for url in old]
    if proof.damaged_dataset:
        return [*removals, dataset_removal(output.url, proof.damaged_dataset)]
    return removals + _shard_removals(output, proof.damaged_shards)


def dataset_removal(output_url: str, reason: str) -> Removal:
    return Removal("dataset.json", reason, [storage.join(storage.normalise(output_url), "dataset.json")])


def plan_withdrawal(output: Output, what: str) -> list[Removal]:
    """Withdraws a list of inputs by its id, or the rows of a shard by its URL or name.

    With a list go the rows of the shards that no other list has. Raises ValueError if there is no such list or shard.
    """
    lists, damaged = output.input_lists_and_problems()
    entries, invalid = output.commits_and_problems()
    by_url = {entry.source_shard: shard_name(entry.name) for entry in entries}
    done = {shard_name(name) for name in (*by_url.values(), *invalid)}
    if what in lists or what in damaged:
        listed = lists_by_url(lists)
        only = [shard.name for shard in lists.get(what, []) if listed[shard.url] == {what}]
        reason = f"no list but {what} has this shard"
        removals = _shard_removals(output, {name: reason for name in only if name in done})
        return [*removals, _list_removal(output, what, "you withdrew it")]  # last, so that a killed run can be repeated
    name = by_url.get(what, by_url.get(storage.normalise(what), what))
    if name not in done:
        raise ValueError(
            f"verify.withdraw: {what} is no list and no tokenized shard of {output.url}; the lists are "
            f"{', '.join([*lists, *damaged]) or 'none'}"
        )
    return _shard_removals(output, {name: "you withdrew it"})


def _shard_removals(output: Output, reasons: dict[str, str]) -> list[Removal]:
    """reasons: by the names of shards."""
    files: dict[str, set[str]] = {name: {name} for name in reasons}
    sizes = output.file_sizes()
    for name in (*output.committed_names(), *sizes["tokens"], *sizes["quarantine"]):
        if shard_name(name) in files:
            files[shard_name(name)].add(name)
    removals = []
    for shard, names in files.items():
        ordered = sorted(names, key=_retry_number, reverse=True)
        data = [(output.tokens_url(name), output.quarantine_url(name)) for name in ordered]
        urls = [*itertools.chain(*data), *map(output.entry_url, ordered)]
        removals.append(Removal(f"shard {shard}", reasons[shard], urls))
    return removals


def _list_removal(output: Output, list_id: str, reason: str) -> Removal:
    return Removal(f"inputs/{list_id}.json", reason, [output.list_url(list_id)])


def _is_old(url: str) -> bool:
    try:
        return storage.age_s(url) > OLD_S
    except FileNotFoundError:  # its writer has just finished
        return False


def _retry_number(name: str) -> int:
    match = RETRY_NAME.match(name)
    return int(match[2]) if match else 0
