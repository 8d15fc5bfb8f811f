"""Shows the progress of a tokenize job: `output`. It reads the output only and needs no cluster.

It prints the shards done, left and failed, the samples, the quarantined samples with reasons, the rate over the last
commits and the time left, the seconds by stage, and the share of time in which the encoders were idle. `--json` prints
the same for programs.
"""

import collections
import json
from typing import Any

from jobs.config import Config
from jobs.outputs import open_output
from jobs.reports.progress import clock
from pipeline.tokens.checks import damaged_files
from pipeline.tokens.commit import Commit, group_by_shard
from pipeline.tokens.output import Output

RATE_OVER = 50  # last commits
TOP_REASONS = 10
NO_REASON = "reason only in the quarantine file (older entry)"


def run(config: Config) -> int:
    config.require("output")
    summary = summarise(open_output(config.output))
    if config.status.json:
        print(json.dumps(summary, indent=1))
        return 0
    for name, value in _lines(summary):
        print(f"{name:<13}{value}")
    return 0


def summarise(output: Output) -> dict[str, Any]:
    """Everything that `status` prints, as JSON values. rate is None with too few commits."""
    shards = group_by_shard(output.commits())
    entries = [entry for shard in shards for entry in shard.entries]
    done = {shard.first.name for shard in shards}
    left = [shard for shard in output.inputs() if shard.name not in done]
    reasons: collections.Counter[str] = collections.Counter()
    for shard in shards:
        if shard.num_quarantined:
            reasons.update(shard.last.reasons or {NO_REASON: shard.num_quarantined})
    return {
        "output": output.url,
        "tokenizer_id": output.layout.tokenizer_id,
        "codebook_size": output.layout.codebook_size,
        "shards": {"done": len(done), "left": len(left), "retries": len(entries) - len(shards)},
        "failed": [note["message"].splitlines()[0] for note in output.failures() if note["name"] not in done],
        "samples": sum(shard.num_rows for shard in shards) // output.layout.rows_per_sample,
        "tokens": sum(shard.num_tokens for shard in shards),
        "quarantined": sum(shard.num_quarantined for shard in shards),
        "notes": dict(sum((shard.notes for shard in shards), collections.Counter())),
        "reasons": dict(reasons.most_common(TOP_REASONS)),
        "rate": _rate([shard.first for shard in shards], len(left), output.layout.rows_per_sample),
        "damaged": damaged_files(output, shards),
        "unfinished_files": len(output.temporary_files()),
        "stray_files": len(output.strays()),
        "seconds": _seconds(entries),
        "encoder_idle": encoder_idle(entries),
    }


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    shards, rate = summary["shards"], summary["rate"]
    retries = f", {shards['retries']} retries" if shards["retries"] else ""
    lines = [
        ("output", summary["output"]),
        ("tokenizer", f"{summary['tokenizer_id']}, {summary['codebook_size']} codes"),
        (
            "shards",
            f"{shards['done']} done, {shards['left']} left ({len(summary['failed'])} failed last time){retries}",
        ),
        ("samples", f"{summary['samples']} tokenized, {summary['quarantined']} quarantined"),
        ("tokens", str(summary["tokens"])),
        ("rate", _rate_in_words(rate) if rate else "unknown: too few commits"),
    ]
    if summary["seconds"]:
        lines.append(("seconds", "  ".join(f"{stage} {spent:.0f}" for stage, spent in summary["seconds"].items())))
    if summary["encoder_idle"] is not None:
        lines.append(("encoder", f"idle for {summary['encoder_idle']:.0%} of the workers' time"))
    lines += [("quarantined", f"{count} {reason}") for reason, count in summary["reasons"].items()]
    lines += [("note", f"{count} {note}") for note, count in summary["notes"].items()]
    lines += [("failed", message) for message in summary["failed"]]
    if damaged := summary["damaged"]:
        repair = f"`tokenmill verify output={summary['output']} verify.repair=true`"
        lines.append(("damaged", f"{len(damaged)} files; {repair} withdraws their shards"))
        lines += [("damaged", what) for what in damaged[:TOP_REASONS]]
    if summary["unfinished_files"]:
        lines.append(("unfinished", f"{summary['unfinished_files']} files of writers that run or were killed"))
    if summary["stray_files"]:
        lines.append(
            ("stray", f"{summary['stray_files']} files of other programs, such as .DS_Store, were passed over")
        )
    return lines


def _rate_in_words(rate: dict[str, float]) -> str:
    return (
        f"{rate['samples_per_s']:.0f} samples/s, {rate['tokens_per_s']:.0f} tokens/s over the last "
        f"{rate['commits']} commits; {clock(rate['left_s'])} left"
    )


def _rate(entries: list[Commit], left: int, rows_per_sample: int) -> dict[str, float] | None:
    recent = sorted(entries, key=lambda entry: entry.committed_at)[-RATE_OVER:]
    passed = recent[-1].committed_at - recent[0].committed_at if recent else 0.0
    if passed <= 0:
        return None
    rows, tokens = (sum(getattr(e, name) for e in recent[1:]) / passed for name in ("num_rows", "num_tokens"))
    left_s = left * passed / (len(recent) - 1)
    return {"samples_per_s": rows / rows_per_sample, "tokens_per_s": tokens, "left_s": left_s, "commits": len(recent)}


def _seconds(entries: list[Commit]) -> dict[str, float]:
    """Summed over all workers."""
    spent: collections.Counter[str] = collections.Counter()
    for entry in entries:
        spent.update(entry.seconds)
    return {stage: round(spent[stage], 3) for stage in sorted(spent, key=lambda stage: (stage == "total", stage))}


def encoder_idle(entries: list[Commit]) -> float | None:
    """Share of the time with at least one shard in work in which a worker did not encode; None for old entries.

    A worker may process several shards at a time; overlapping times count once.
    """
    by_worker: dict[tuple[Any, Any], list[Commit]] = {}
    for entry in entries:
        if entry.worker and "encode" in entry.seconds:
            by_worker.setdefault((entry.worker.get("host"), entry.worker.get("pid")), []).append(entry)
    busy = sum(_covered([_span(entry) for entry in own]) for own in by_worker.values())
    encoding = sum(entry.seconds["encode"] for own in by_worker.values() for entry in own)
    return max(0.0, 1 - encoding / busy) if busy > 0 else None


def _span(entry: Commit) -> tuple[float, float]:
    """Start and end of the work on a shard, in seconds since 1970. committed_at is just before the write."""
    stages = {stage: spent for stage, spent in entry.seconds.items() if stage != "total"}
    total = entry.seconds.get("total", sum(stages.values()))
    end = entry.committed_at + stages.get("write", 0.0)
    return end - total, end


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    covered, end = 0.0, -float("inf")
    for low, high in sorted(spans):
        covered += max(0.0, high - max(low, end))
        end = max(end, high)
    return covered
