"""Proves that an output is complete and correct: `output`. `--deep` also reads all tokens and the input shards.

The default check reads manifest entries, listings and the footers of the Parquet files, which takes minutes for a large
output. It proves that every shard of every run is committed, that files exist with the committed size, tokenizer
and number of rows, and that rows and quarantined samples add up to the number of input samples. The deep check proves
that every sample is in exactly one row or one quarantine row, with the key of the input, that checksums match the
commits, and that tokens fit the codebook and the shape.

`--repair` reads every byte of the output (with `--deep` of the input too) and removes what is damaged; the next
`tokenize` makes it again. `verify.withdraw` removes a list of inputs, or the rows of a shard. `--dry-run` only shows
what they would remove. Do not run them while another command writes to the output.
"""

import shlex
from typing import Any

from jobs.config import Config, ConfigError
from jobs.config.schema import all_keys
from jobs.outputs import open_output
from jobs.reports.progress import Progress
from pipeline.errors import BrokenDataset
from pipeline.tokens import Output, ShardLayout
from pipeline.tokens.commit import group_by_shard
from pipeline.tokens.repair import Removal, dataset_removal, plan_repair, plan_withdrawal
from pipeline.tokens.verify import DEEP, FILES, FOOTERS, LEFT_TO_DEEP, Proof, verify

SHOWN_PROBLEMS = 50
RERUN_KEYS = ("run", "tokenizer", "data.shards", "tokens.")  # keys that a rerun of tokenize needs


def run(config: Config) -> int:
    config.require("output")
    try:
        output = open_output(config.output)
    except BrokenDataset as error:
        if not (config.verify.repair or config.verify.dry_run):
            raise
        _remove([dataset_removal(config.output, str(error))], config, then=_rerun(None, config))
        return 3
    if config.verify.withdraw:
        _remove(_withdrawals(output, config.verify.withdraw), config, then=_after_withdrawal(output, config))
        return 0
    repairs = config.verify.repair or config.verify.dry_run
    proof = _verified(output, DEEP if config.verify.deep else FILES if repairs else FOOTERS)
    _print_proof(proof, output.layout)
    if repairs and (removals := plan_repair(output, proof)):
        _remove(removals, config, then=_rerun(output, config) if proof.problems else "")
        return 3 if proof.problems else 0
    if proof.problems:
        print(f"verify: FAILED: {len(proof.problems)} problems")
        print(_advice(proof, repairs))
        return 3
    if config.verify.deep:
        rows = "one row for each view" if output.layout.views else "exactly one row"
        print(f"verify: deep: every input sample is in {rows} or one quarantine row")
    elif repairs:
        print("verify: nothing to repair: every file is the one that was committed")
    else:
        print("verify: every shard is completely committed: files, sizes, ids and counts agree")
        print(f"verify: not checked: {LEFT_TO_DEEP}; add --deep to check these too")
    return 0


def _verified(output: Output, level: str) -> Proof:
    bar = Progress("verify", total=0, unit="shards")

    def progress(_: int, total: int) -> None:
        bar.total = total
        bar.advance()

    proof = verify(output, level=level, progress=progress)
    bar.close()
    return proof


def _advice(proof: Proof, repairs: bool) -> str:
    damaged = [*proof.damaged_shards, *proof.damaged_lists, *proof.damaged_notes]
    if not repairs and (damaged or proof.damaged_dataset):
        return f"verify: add --repair to remove what is damaged ({len(damaged)} shards and files); --dry-run shows it"
    return "verify: a repair cannot solve these; each line above says what to do"


def _print_proof(proof: Proof, layout: ShardLayout) -> None:
    for problem in proof.problems[:SHOWN_PROBLEMS]:
        print(f"verify: {problem}")
    if len(proof.problems) > SHOWN_PROBLEMS:
        print(f"verify: and {len(proof.problems) - SHOWN_PROBLEMS} more")
    shards = group_by_shard(proof.entries)
    rows, bad = sum(shard.num_rows for shard in shards), sum(shard.num_quarantined for shard in shards)
    views = f" ({layout.views.count} views of each sample)" if layout.views else ""
    print(f"verify: {len(shards)} shards, {rows} rows{views}, {bad} quarantined, tokenizer {layout.tokenizer_id}")
    if retries := len(proof.entries) - len(shards):
        print(f"verify: {retries} of the manifest entries come from retries")
    for note in proof.notes:
        print(f"verify: {note}")
    for count, what in _passed_over(proof):
        if count:
            print(f"verify: {count} files {what}")


def _passed_over(proof: Proof) -> list[tuple[int, str]]:
    strays = ", ".join(proof.strays[:3])
    return [
        (
            proof.num_leftovers,
            "belong to no manifest entry; interrupted or running jobs left them, and no reader sees them",
        ),
        (len(proof.temporary), "are unfinished; their writers run or were killed. --repair removes the old ones"),
        (len(proof.strays), f"belong to other programs and were passed over: {strays}"),
        (
            proof.num_without_ranges,
            "of an older version do not record which samples they hold; only --deep can check that",
        ),
    ]


# -- repair -------------------------------------------------------------------------------------------------------


def _withdrawals(output: Output, names: list[str]) -> list[Removal]:
    try:
        return [removal for name in names for removal in plan_withdrawal(output, name)]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _remove(removals: list[Removal], config: Config, *, then: str) -> None:
    """Removes them, or with dry_run only prints them. then: the next command."""
    for removal in removals:
        print(f"verify: {'would remove' if config.verify.dry_run else 'removing'} {removal.what}: {removal.reason}")
        if not config.verify.dry_run:
            removal.remove()
    if config.verify.dry_run:
        print(f"verify: {len(removals)} to remove; nothing was changed (dry run)")
        return
    print(f"verify: removed {len(removals)}" + ("; now run this, and verify again:" if then else ""))
    if then:
        print(then)


def _after_withdrawal(output: Output, config: Config) -> str:
    """A shard that was withdrawn is made again by tokenize; those of a list of inputs are no longer asked for."""
    lists = output.input_lists_and_problems()[0]
    if all(name in lists for name in config.verify.withdraw):
        return f"tokenmill verify output={output.url}"
    return _rerun(output, config)


def _rerun(output: Output | None, config: Config) -> str:
    """The command that makes again what was removed, from the configuration in dataset.json."""
    if output is not None and output.layout.holds_latents:
        return "tokenmill codebook codebook.cache=true  # with the keys of the run"
    given = output.about().get("config") if output else None
    if not given or output is None:
        return f"the same `tokenmill tokenize ... output={config.output}` as before"
    settings = [f"{name}={_as_text(value)}" for name, value in _changed(given) if name.startswith(RERUN_KEYS)]
    several = "" if len(output.input_lists_and_problems()[0]) < 2 else "  # and the other runs with other data.shards"
    return shlex.join(["tokenmill", "tokenize", *settings, f"output={output.url}"]) + several


def _changed(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """The keys of a stored configuration that do not have their default."""
    found = []
    for key in all_keys():
        value: Any = given
        for part in key.name.split("."):
            value = value.get(part, key.default) if isinstance(value, dict) else key.default
        if value != key.default:
            found.append((key.name, value))
    return found


def _as_text(value: Any) -> str:
    return f"[{','.join(map(_as_text, value))}]" if isinstance(value, list) else str(value)
