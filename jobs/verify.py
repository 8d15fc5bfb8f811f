"""Proves that an output is complete and sound: `output`. `deep=true` (or --deep) reads everything, input included.

By default: manifest entries, listings and the footers of the Parquet files, so minutes for a large output. Every
shard that any run was given is committed; files are there, of the size, tokenizer and number of rows that was
committed; rows and quarantine are together as many as the samples. Deep: every sample is in one row or one quarantine
row, once, with the key that the input has; files are those committed, by checksum; tokens fit codebook and shape.
"""

from jobs.config import Config
from jobs.reports.progress import Progress
from jobs.status import open_output
from pipeline.tokens.commit import group_by_shard
from pipeline.tokens.verify import LEFT_TO_DEEP, Proof, verify

SHOWN_PROBLEMS = 50


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    bar = Progress("verify", total=0, unit="shards")

    def progress(_: int, total: int) -> None:
        bar.total = total
        bar.advance()

    proof = verify(output, deep=config.deep, progress=progress)
    bar.close()
    _tell(proof, output.layout.tokenizer_id)
    if proof.problems:
        print(f"verify: FAILED: {len(proof.problems)} problems")
        return 3
    if config.deep:
        print("verify: deep: every sample is in exactly one row or one quarantine row, as the input has it")
    else:
        print("verify: every shard is committed whole: files, sizes, ids and counts agree")
        print(f"verify: not read: {LEFT_TO_DEEP}; `deep=true` proves these too")
    return 0


def _tell(proof: Proof, tokenizer_id: str) -> None:
    for problem in proof.problems[:SHOWN_PROBLEMS]:
        print(f"verify: {problem}")
    if len(proof.problems) > SHOWN_PROBLEMS:
        print(f"verify: and {len(proof.problems) - SHOWN_PROBLEMS} more")
    shards = group_by_shard(proof.entries)
    rows, bad = sum(shard.num_rows for shard in shards), sum(shard.num_quarantined for shard in shards)
    print(f"verify: {len(shards)} shards, {rows} rows, {bad} quarantined, tokenizer {tokenizer_id}")
    if retries := len(proof.entries) - len(shards):
        print(f"verify: {retries} of the entries are of retries")
    if proof.num_leftovers:
        print(
            f"verify: {proof.num_leftovers} files that no entry names, of runs that died or are at work: no reader "
            "sees them"
        )
    if proof.num_without_ranges:
        print(
            f"verify: {proof.num_without_ranges} files of an older version do not note which samples they hold; only "
            "deep=true proves that"
        )
