"""The full form: `python -m tests.faults [--trials 114] [--seed 0] [--kind NAME] [--results results/faults]`.

Trials cycle through the kinds; trial i has the seed `seed + i`. Each is written to faults.json when it ends. After an
interruption, rerun the same command; it runs only the missing trials. README.md is generated from faults.json.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import storage
from tests.faults.corpus import NUM_SAMPLES, NUM_SHARDS
from tests.faults.kinds import KINDS, run
from tests.faults.lab import Lab, open_lab
from tests.s3 import start_s3

Record = dict[str, Any]  # kind, seed, wall_s, failure ("" if none), and the fields of Report
ABOUT = """# Fault injection

Result of `make faults` ({trials} trials in {hours:.1f} h on {cpus} CPUs). Each trial injects faults into a running
`tokenmill tokenize` of {samples} samples, some of them bad, in {shards} shards. It runs on a Ray cluster with a head
and two nodes, and writes to disk or to a SeaweedFS server. If the fault ends the command, the trial reruns the same
command. Finally it compares every row and quarantine row with those of an undisturbed run.

faults: kills, and requests with a wrong response or none. lost: samples in no row. doubled: additional rows of a
sample. wrong: rows that differ from those of the undisturbed run. failed: trials with lost, doubled or wrong rows, with
a failed `verify --deep`, or with an unexpected exit code of a job.

| kind | trials | faults | reruns | lost | doubled | wrong rows | failed | median s |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster and the server are stopped
    arguments = _arguments()
    results = Path(arguments.results)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "faults.json"
    records = json.loads(file.read_text()) if file.exists() else []
    todo = list(_left(arguments, records))
    print(f"faults: {len(records)} trials done before, {len(todo)} to do; results in {results}", flush=True)
    for record in _run(todo):
        records.append(record)
        storage.replace(
            str(file), (json.dumps(records, indent=1) + "\n").encode()
        )  # atomic, in case this process is killed
        (results / "README.md").write_text(readme(records))
    failed = [record for record in records if record["failure"]]
    for record in failed:
        print(f"faults: {record['kind']}, seed {record['seed']}: {record['failure'].splitlines()[0]}")
    print(f"faults: {len(records)} trials, {len(failed)} failed")
    return 1 if failed else 0


def readme(records: list[Record]) -> str:
    lines = [_line(kind, [record for record in records if record["kind"] == kind]) for kind in KINDS]
    hours = sum(record["wall_s"] for record in records) / 3600
    about = ABOUT.format(trials=len(records), hours=hours, cpus=os.cpu_count(), samples=NUM_SAMPLES, shards=NUM_SHARDS)
    redone = [record["seconds"] for record in records if record.get("seconds") is not None]
    recovery = f"\nA node killed with all workers: the next commit came after {_spread(redone)}.\n" if redone else ""
    return about + "\n".join([*lines, _line("**all**", records)]) + "\n" + recovery


def _line(kind: str, records: list[Record]) -> str:
    sums = [sum(record.get(name, 0) for record in records) for name in ("faults", "reruns")]
    damage = [
        sum((record.get("damage") or {}).get(name, 0) for record in records) for name in ("lost", "doubled", "wrong")
    ]
    failed = sum(bool(record["failure"]) for record in records)
    seconds = f"{median(record['wall_s'] for record in records):.0f}" if records else ""
    return "| " + " | ".join(map(str, [kind, len(records), *sums, *damage, failed, seconds])) + " |"


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.1f} s (median of {len(seconds)}; {min(seconds):.1f} to {max(seconds):.1f} s)"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6 * len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="run only this kind")
    parser.add_argument("--results", default="results/faults")
    return parser.parse_args()


def _left(arguments: argparse.Namespace, done: list[Record]) -> Iterator[tuple[str, int]]:
    """Kind and seed of the missing trials."""
    finished = {(record["kind"], record["seed"]) for record in done}
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    for i in range(arguments.trials):
        planned = (kinds[i % len(kinds)], arguments.seed + i)
        if planned not in finished:
            yield planned


def _run(todo: list[tuple[str, int]]) -> Iterator[Record]:
    """Runs all trials in one lab. After a failure starts a new lab, because the old one may be in any state."""
    while todo:
        with tempfile.TemporaryDirectory(prefix="tm-faults-", ignore_cleanup_errors=True) as place:
            yield from _in_new_lab(Path(place), todo)


def _in_new_lab(folder: Path, todo: list[tuple[str, int]]) -> Iterator[Record]:
    """Runs trials from `todo` until one fails or none is left."""
    with start_s3(folder / "s3") as server:
        os.environ.update(server.environment())
        with open_lab(folder / "lab", server) as lab:
            failed = False
            while todo and not failed:
                record = _one(lab, *todo.pop(0))
                failed = bool(record["failure"])
                yield record


def _one(lab: Lab, kind: str, seed: int) -> Record:
    """Runs one trial and returns its record."""
    start = time.monotonic()
    record: Record = {"kind": kind, "seed": seed, "failure": ""}
    try:
        report = run(lab, kind, seed)
        record |= asdict(report)
        if not report.is_correct():
            record["failure"] = f"{report.damage}, verified: {report.verified}"
    except Exception as error:  # a failed trial is a result; run the others
        record["failure"] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    record["wall_s"] = round(time.monotonic() - start, 1)
    print(f"faults: {kind}, seed {seed}: {record['failure'] or 'correct'}, {record['wall_s']} s", flush=True)
    return record


if __name__ == "__main__":
    sys.exit(main())
