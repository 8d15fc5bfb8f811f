"""Proves that an output is complete and sound: `output`. `deep=true` reads the input shards again and compares keys.

Every input sample is in one row or one quarantine row, once; files are those committed; ids, ranges, shapes hold.
"""

from jobs.config import Config
from jobs.status import open_output
from pipeline.tokens.verify import verify


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    problems, entries = verify(output, against_input=config.deep)
    for problem in problems[:50]:
        print(f"verify: {problem}")
    rows, bad = sum(e.num_rows for e in entries), sum(e.num_quarantined for e in entries)
    print(f"verify: {len(entries)} shards, {rows} rows, {bad} quarantined, tokenizer {output.layout.tokenizer_id}")
    if problems:
        print(f"verify: FAILED: {len(problems)} problems")
        return 3
    print("verify: every sample is in exactly one row or one quarantine row" + (", as the input has it" * config.deep))
    return 0
