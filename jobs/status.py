"""How far a tokenize job is, from its output alone: `output`. Needs no cluster.

Shards done, left and failed, samples, quarantined, and the rate over the last commits.
"""

from jobs.config import Config, ConfigError
from jobs.progress import clock
from pipeline.tokens.output import Commit, Output

RATE_OVER = 50  # last commits


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    entries = output.commits()
    done = {entry.name for entry in entries}
    left = [shard for shard in output.inputs() if shard.name not in done]
    failed = [note for note in output.failures() if note["name"] not in done]
    print(f"output       {output.url}")
    print(f"tokenizer    {output.layout.tokenizer_id}, {output.layout.codebook_size} codes")
    print(f"shards       {len(done)} done, {len(left)} left, {len(failed)} of them failed last time")
    rows, bad = sum(e.num_rows for e in entries), sum(e.num_quarantined for e in entries)
    print(f"samples      {rows} tokenized, {bad} quarantined")
    print(f"tokens       {sum(e.num_tokens for e in entries)}")
    print(f"rate         {_rate(entries, len(left))}")
    for note in failed:
        print(f"failed       {note['message'].splitlines()[0]}")
    return 0


def open_output(url: str) -> Output:
    """Raises ConfigError if there is no output."""
    try:
        return Output.open(url)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error


def _rate(entries: list[Commit], left: int) -> str:
    recent = sorted(entries, key=lambda entry: entry.committed_at)[-RATE_OVER:]
    passed = recent[-1].committed_at - recent[0].committed_at if recent else 0.0
    if passed <= 0:
        return "too few commits to tell"
    samples, tokens = (sum(getattr(e, name) for e in recent[1:]) / passed for name in ("num_rows", "num_tokens"))
    remaining = left * passed / (len(recent) - 1)
    return (
        f"{samples:.0f} samples/s, {tokens:.0f} tokens/s over the last {len(recent)} commits; {clock(remaining)} left"
    )
