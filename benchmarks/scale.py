"""Only the control plane: thousands of shards through actors that do nothing. Each size has its own process."""

import json
import subprocess
import sys
import time
from pathlib import Path

import ray  # noqa: F401  puts its bundled psutil on the path

import psutil  # isort: skip
from matplotlib.figure import Figure

from benchmarks.measure import Table
from jobs.actors import cluster
from jobs.actors.pool import MAX_BLOCKS, ShardWorker, map_shards
from jobs.config import WorkersConfig
from pipeline.corpus.shards import Shard

SIZES = (1_000, 10_000, 100_000)
EVERY = 100  # shards between two points of the plot
PLOT = Path(__file__).parent / "results" / "scale.png"


class Nothing(ShardWorker):
    def process(self, shard: Shard) -> str:
        return shard.name


def run() -> Table:
    found = {size: in_a_process(size) for size in SIZES}
    table = Table(
        "thousands of shards through actors that do nothing",
        [
            "One driver and two workers with one CPU each. Ray is started before the clock starts. See scale.png.",
            f"Up to {MAX_BLOCKS} shards, a block has one shard; above that, several.",
            "driver memory: the largest increase of the driver's resident memory since the call.",
        ],
        [
            "shards",
            "first result, s",
            "all results, s",
            "shards/s after the first",
            "driver memory, MB",
            "driver CPU, s",
        ],
    )
    for size, one in found.items():
        first, last = one["seconds"][0], one["seconds"][-1]
        rate = (size - 1) / (last - first)
        cells = [f"{first:.1f}", f"{last:.1f}", f"{rate:.0f}", f"{max(one['megabytes']):.0f}", f"{one['cpu_s']:.1f}"]
        table.rows.append([f"{size:,}", *cells])
    plot(found)
    table.raw = {"first_s, all_s, cpu_s": [[o["seconds"][0], o["seconds"][-1], o["cpu_s"]] for o in found.values()]}
    return table


def in_a_process(size: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", str(size)], check=True, text=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: int) -> dict:
    """Seconds since the call and MB of memory at the first result, at every 100th, and at the last."""
    shards = [Shard(f"s3://bucket/corpus/shard-{i:06d}.tar", 10**9) for i in range(size)]
    cluster.start()
    driver = psutil.Process()
    start, before, cpu = time.monotonic(), driver.memory_info().rss, time.process_time()
    seconds, megabytes, names = [], [], set()
    for i, name in enumerate(map_shards(shards, Nothing, {}, WorkersConfig(count=2))):
        names.add(name)
        if i % EVERY == 0 or i == size - 1:
            seconds.append(round(time.monotonic() - start, 3))
            megabytes.append((driver.memory_info().rss - before) / 1e6)
    assert len(names) == size
    return {"seconds": seconds, "megabytes": megabytes, "cpu_s": time.process_time() - cpu}


def plot(found: dict[int, dict]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    done, memory = figure.subplots(1, 2)
    for size, one in found.items():
        counts = [1, *range(EVERY + 1, size, EVERY), size][: len(one["seconds"])]
        done.plot(one["seconds"], counts, label=f"{size:,} shards")
        memory.plot(one["seconds"], one["megabytes"], label=f"{size:,} shards")
    done.set(title="Results", xlabel="seconds since the call", ylabel="shards done", xscale="log", yscale="log")
    memory.set(title="Memory of the driver", xlabel="seconds since the call", ylabel="MB above the start", xscale="log")
    done.legend()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
