"""Ray, started quietly on a laptop or joined on a cluster; and work that is dealt out shard by shard."""

import logging
import os
import pickle
from collections.abc import Iterator
from typing import Any

from jobs.config import WorkersConfig
from pipeline.manifest import Shard


def start() -> None:
    """Joins the cluster that RAY_ADDRESS names (as `ray job submit` sets it), else starts a local one."""
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        # otherwise it would depend on whether a token file happens to lie in the home directory
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it reports each actor of Ray Data as an error
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # what workers print is Ray's own chatter: results, progress and errors come back as values and exceptions
    dashboard = None if address != "local" else False
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=dashboard)


def cpus_per_rank(workers: WorkersConfig) -> float:
    """Of a training rank: as configured, else an even share of the cluster's (at least 1)."""
    import ray

    return workers.cpus or max(1, int(ray.cluster_resources().get("CPU", 1)) // (workers.count or 1))


def _room(workers: WorkersConfig, cpus: float) -> int:
    """How many actors the cluster has CPUs and GPUs for, at least 1."""
    import ray

    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1) // cpus)
    if workers.gpus:
        room = min(room, int(resources.get("GPU", 0) // workers.gpus))
    return max(1, room)


def device_for(num_gpus: float) -> str:
    """cuda or cpu, as asked for: a GPU that torch cannot use must not pass for a slow job."""
    import torch

    if num_gpus and not torch.cuda.is_available():
        raise RuntimeError(f"workers.gpus is {num_gpus:g}, but torch {torch.__version__} sees no GPU on this node")
    return "cuda" if num_gpus else "cpu"


class ShardWorker:
    """One actor: `process` is called with one shard after the other. Subclasses hold a model."""

    def __init__(self, num_cpus: float, num_gpus: float):
        import torch

        torch.set_num_threads(max(1, int(num_cpus)))  # Ray would leave one thread per process
        self.device = device_for(num_gpus)

    def process(self, shard: Shard) -> Any:
        raise AssertionError

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [pickle.dumps(self.process(pickle.loads(shard))) for shard in batch["shard"]]}


def map_shards(
    shards: list[Shard], worker: type[ShardWorker], settings: dict[str, Any], workers: WorkersConfig
) -> Iterator[Any]:
    """What `worker(**settings).process` makes of each shard, in the order in which they are done.

    Only descriptors and results pass through Ray. A worker that dies is started again with the shard it had.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import, which sets it to INFO
    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = False
    context.enable_progress_bars = False
    cpus = workers.cpus or 1
    count = min(workers.count or _room(workers, cpus), len(shards))
    items = [{"shard": pickle.dumps(shard)} for shard in shards]
    done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        fn_constructor_kwargs={**settings, "num_cpus": cpus, "num_gpus": workers.gpus},
        num_cpus=cpus,
        num_gpus=workers.gpus or None,
    )
    for row in done.iter_rows():
        yield pickle.loads(row["result"])
