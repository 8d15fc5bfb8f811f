"""Proves that an output is complete and correct: `output`. `--deep` also reads all tokens and the input shards.

The default check reads manifest entries, listings and the footers of the Parquet files, which takes minutes for a large
output. It proves that every shard of every run is committed, that files exist with the committed size, tokenizer
and number of rows, and that rows and quarantined samples add up to the number of input samples. The deep check proves
that every sample is in exactly one row or one quarantine row, with the key of the input, that checksums match the
commits, and that tokens fit the codebook and the shape.
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

    proof = verify(output, deep=config.verify.deep, progress=progress)
    bar.close()
    _print_proof(proof, output.layout.tokenizer_id)
    if proof.problems:
        print(f"verify: FAILED: {len(proof.problems)} problems")
        return 3
    if config.verify.deep:
        print("verify: deep: every input sample is in exactly one row or one quarantine row")
    else:
        print("verify: every shard is completely committed: files, sizes, ids and counts agree")
        print(f"verify: not checked: {LEFT_TO_DEEP}; add --deep to check these too")
    return 0


def _print_proof(proof: Proof, tokenizer_id: str) -> None:
    for problem in proof.problems[:SHOWN_PROBLEMS]:
        print(f"verify: {problem}")
    if len(proof.problems) > SHOWN_PROBLEMS:
        print(f"verify: and {len(proof.problems) - SHOWN_PROBLEMS} more")
    shards = group_by_shard(proof.entries)
    rows, bad = sum(shard.num_rows for shard in shards), sum(shard.num_quarantined for shard in shards)
    print(f"verify: {len(shards)} shards, {rows} rows, {bad} quarantined, tokenizer {tokenizer_id}")
    if retries := len(proof.entries) - len(shards):
        print(f"verify: {retries} of the manifest entries come from retries")
    if proof.num_leftovers:
        print(
            f"verify: {proof.num_leftovers} files belong to no manifest entry; interrupted or running jobs left them, "
            "and no reader sees them"
        )
    if proof.num_without_ranges:
        print(
            f"verify: {proof.num_without_ranges} files of an older version do not record which samples they hold; only "
            "--deep can check that"
        )
