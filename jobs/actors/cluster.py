"""Starts Ray on a laptop or joins a cluster, and says how many workers fit on it."""

import logging
import os
import signal
import socket
import threading
import time
from typing import Any

from jobs.config import ConfigError, WorkersConfig
from pipeline import storage

CONNECT_S = 20.0  # Ray itself would try for minutes


class NoRoom(RuntimeError):
    """The cluster had no room for a worker for workers.wait_s seconds."""


def start() -> None:
    """Joins the cluster in RAY_ADDRESS, which `ray job submit` sets, or starts a local one.

    Raises ConfigError if nothing listens at that address.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    _check_reachable(address)
    if address == "local":
        # otherwise it would depend on whether there is a token file in the home directory
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # without a dashboard, Ray Train's cleanup would look for one for 12 s at the end of each training
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it reports each actor of Ray Data as an error
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handler = signal.getsignal(signal.SIGTERM)
    # workers print only messages of Ray itself: results, progress and errors come back as values and exceptions
    ray.init(
        address=address,
        logging_level=logging.ERROR,
        log_to_driver=False,
        include_dashboard=None if address != "local" else False,
        runtime_env=_runtime_env(),
    )
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it by its own


def _check_reachable(address: str) -> None:
    """Raises ConfigError if address is HOST:PORT, maybe with ray://, and nothing accepts connections there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # local, auto
        return
    start = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() - start > CONNECT_S or isinstance(error, OverflowError | socket.gaierror):
                raise ConfigError(
                    f"RAY_ADDRESS is {address}, but nothing answers there ({error}); start that cluster, correct the "
                    "address, or unset RAY_ADDRESS to run on this machine"
                ) from error
        time.sleep(1)


def check_room(workers: WorkersConfig, ranks: int = 1) -> None:
    """Raises ConfigError if this command's own Ray, which cannot grow, will never have room for so many workers."""
    import ray

    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return
    total = ray.cluster_resources()
    needs = {"CPU": (workers.cpus or 1) * ranks, "GPU": workers.gpus * ranks}
    for kind, needed in needs.items():
        if needed > total.get(kind, 0):
            raise ConfigError(
                f"{ranks} worker{'s' * (ranks != 1)} with {described(workers)} each need {needed:g} {kind}s, but this "
                f"machine has {total.get(kind, 0):g}; lower workers.count, workers.cpus or workers.gpus"
            )


def _runtime_env() -> dict[str, dict[str, str]] | None:
    """Passes the storage options of this command to workers on other machines."""
    given = {name: value for name, value in os.environ.items() if name.startswith("FSSPEC_")}
    if os.environ.get(storage.CREATE_ONLY, storage.SERVER) != storage.SERVER:
        given[storage.CREATE_ONLY] = os.environ[storage.CREATE_ONLY]
    return {"env_vars": given} if given else None


def cpus_per_rank(workers: WorkersConfig) -> float:
    """CPUs of a training rank: as configured, or the most with which all ranks fit on the nodes (at least 1)."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return workers.cpus or even_share(nodes, workers.count or 1)


def even_share(nodes: list[int], ranks: int) -> int:
    """The most CPUs, at least 1, that each rank can have. nodes: the CPUs of each node. A rank runs on one node."""
    return max((cpus for cpus in range(1, max(nodes) + 1) if sum(n // cpus for n in nodes) >= ranks), default=1)


def room(workers: WorkersConfig) -> int:
    """How many actors fit on the cluster's CPUs and GPUs, at least 1."""
    import ray

    resources = ray.cluster_resources()
    count = int(resources.get("CPU", 1) // (workers.cpus or 1))
    if workers.gpus:
        count = min(count, int(resources.get("GPU", 0) // workers.gpus))
    return max(1, count)


def described(workers: WorkersConfig) -> str:
    """The CPUs and GPUs that one worker needs, and the keys that set them."""
    gpus = f" and {workers.gpus:g} GPU (workers.gpus)" if workers.gpus else ""
    return f"{workers.cpus or 1:g} CPU (workers.cpus){gpus}"


def have() -> str:
    """The CPUs and GPUs of the cluster, in all and free."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU")]
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"the cluster has {' and '.join(parts)} free on {nodes} node{'s' * (nodes != 1)}"


def waiting_line(job: str, workers: WorkersConfig, waited_s: float) -> str:
    """What a job that has no worker yet waits for, and for how long."""
    return (
        f"{job}: no worker has started for {waited_s:.0f} s. A worker needs {described(workers)}; {have()}. "
        f"The job starts as soon as there is room, and gives up after {workers.wait_s:.0f} s (workers.wait_s)"
    )


def gave_up(workers: WorkersConfig) -> NoRoom:
    return NoRoom(
        f"no worker has started for {workers.wait_s:.0f} s (workers.wait_s). A worker needs {described(workers)}; "
        f"{have()}. Free some, add nodes, or lower these keys, and rerun the same command"
    )


def on_this_node() -> Any:
    """A scheduling strategy that places an actor on the caller's node, so that it lives as long as the caller."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def device_for(num_gpus: float) -> str:
    """cuda or cpu. Raises RuntimeError if torch cannot use the assigned GPU: otherwise the job would just be slow."""
    import torch

    if num_gpus and not torch.cuda.is_available():
        raise RuntimeError(
            f"a worker was given {num_gpus:g} GPU (workers.gpus), but torch {torch.__version__} sees no GPU on its node"
        )
    return "cuda" if num_gpus else "cpu"
