"""A driver for tests of growth: `python -m tests.jobs.slow_shards NUM_SHARDS SECONDS [workers.key=value ...]`.

Joins the cluster in RAY_ADDRESS, maps a sleeping worker over the shards, and prints when each shard began, and its
process and node.
"""

import os
import sys
import threading
import time
from typing import Any

from jobs.actors import cluster, pool
from jobs.actors.pool import ShardWorker, map_shards
from jobs.config import WorkersConfig
from pipeline.corpus.shards import Shard


class Sleeper(ShardWorker):
    """Does not use torch, which would refuse the GPUs of these tests: they are resources without a device."""

    def __init__(self, seconds: float, **resources: Any):
        self.seconds = seconds
        self.ticked: dict[str, float] = {}
        self.device_lock = threading.Lock()

    def process(self, shard: Shard) -> tuple[float, int, str]:
        import ray

        began = time.time()
        time.sleep(self.seconds)
        return began, os.getpid(), ray.get_runtime_context().get_node_id()


def main(num_shards: str, seconds: str, *settings: str) -> None:
    keys = dict(setting.removeprefix("workers.").split("=") for setting in settings)
    workers = WorkersConfig(**{key: int(value) if key == "count" else float(value) for key, value in keys.items()})
    pool.SAY_EVERY_S = 5.0  # instead of 30
    cluster.start()
    shards = [Shard(f"shard-{i}", None) for i in range(int(num_shards))]
    for began, pid, node in map_shards(shards, Sleeper, {"seconds": float(seconds)}, workers, job="sleep"):
        print(f"began {began:.2f} pid {pid} node {node}", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
