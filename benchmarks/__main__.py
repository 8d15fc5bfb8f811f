"""`python -m benchmarks [name...]`: runs the benchmarks, prints their tables, and writes results/<name>.md, or
results/<name>_gpu.md on a machine with a GPU.

results/<name>.json has every single measurement; git ignores it.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import Table, about_this_run

NAMES = ("vp_perturb", "layers", "train_step", "kmeans", "read_tokens", "tokenize", "engine", "scale", "soak")
RESULTS = Path(__file__).parent / "results"


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        print(f"benchmarks: unknown name {', '.join(unknown)}; choose from: {', '.join(NAMES)}")
        return 2
    # Before torch is imported. Threads that spin while they wait get 4 times slower under any other load, and this
    # would affect the plain loop more than Ray's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in names or NAMES:
        start, load = time.monotonic(), os.getloadavg()[0]
        table = importlib.import_module(f"benchmarks.{name}").run()
        about = about_this_run(f"python -m benchmarks {name}")
        about["load before"] = f"{load:.1f} (0 on a quiet machine)"
        about["took"] = f"{time.monotonic() - start:.0f} s"
        save(name, table, about)
        print(markdown(table, about), flush=True)
    return 0


def save(name: str, table: Table, about: dict[str, str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    name = name if about["GPU"] == "none" else f"{name}_gpu"
    (RESULTS / f"{name}.md").write_text(markdown(table, about))
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, **asdict(table)}, indent=1) + "\n")


def markdown(table: Table, about: dict[str, str]) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    parts = [
        f"# {table.title}\n",
        *(f"- {note}" for note in table.notes),
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
