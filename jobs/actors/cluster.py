"""Starts Ray on a laptop or joins a cluster, and says how many workers fit on it."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.config import ConfigError, WorkersConfig
from pipeline import storage

CONNECT_S = 20.0  # Ray itself would try for minutes
LOOPBACK = "127.0.0.1"


class NoRoom(RuntimeError):
    """The cluster had no room for a worker for workers.wait_s seconds, or a machine none for its own Ray."""


def start() -> None:
    """Joins the cluster in RAY_ADDRESS, which `ray job submit` sets, or starts a local one that only we can use.

    Raises ConfigError if nothing listens at that address.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    _check_reachable(address)
    if address == "local":
        _want_token()
        os.environ.update(_local_environment())
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it reports each actor of Ray Data as an error
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handler = signal.getsignal(signal.SIGTERM)
    with _on_loopback() if address == "local" else contextlib.nullcontext():
        _init(address)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it by its own


def _init(address: str) -> None:
    """Raises NoRoom if this machine is too busy to start its own Ray in time."""
    import ray

    start = time.monotonic()
    try:
        # workers print only messages of Ray itself: results, progress and errors come back as values and exceptions
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=_runtime_env(),
            **(_local_options() if address == "local" else {}),
        )
    except Exception as error:
        if "timed out" not in str(error):  # Ray raises a plain Exception
            raise
        raise NoRoom(
            f"Ray did not start within {time.monotonic() - start:.0f} s: this machine is too busy, or has too little "
            "free memory; rerun the same command when it is less busy"
        ) from error


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
            if time.monotonic() - start > CONNECT_S or isinstance(error, socket.gaierror) or int(port) > 65535:
                raise ConfigError(
                    f"RAY_ADDRESS is {address}, but nothing answers there ({error}); start that cluster, correct the "
                    "address, or unset RAY_ADDRESS to run on this machine"
                ) from error
        time.sleep(1)


def check_room(workers: WorkersConfig, ranks: int = 1) -> None:
    """Raises ConfigError if this command's own Ray, which cannot grow, will never have room for so many workers."""
    import ray

    if not is_local():
        return
    total = ray.cluster_resources()
    needs = {"CPU": (workers.cpus or 1) * ranks, "GPU": workers.gpus * ranks}
    for kind, needed in needs.items():
        if needed > total.get(kind, 0):
            who = "a worker needs" if ranks == 1 else f"{ranks} workers need"
            raise ConfigError(
                f"{who} {needed:g} {kind}{'s' * (needed != 1)}, but this machine has {total.get(kind, 0):g}; lower "
                "workers.count, workers.cpus or workers.gpus, or set RAY_ADDRESS to a cluster"
            )


def is_local() -> bool:
    """Whether Ray runs on this machine only."""
    import ray

    return ray.util.get_node_ip_address() == LOOPBACK


def _want_token() -> None:
    """Lets a local Ray accept only processes that know a new random token: this one and its children."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    Config.initialize("")  # Ray has read these variables when it was imported
    AuthenticationTokenLoader.instance().reset_cache()


def _local_environment() -> dict[str, str]:
    """Settings of a local Ray and its workers. Ranks of a training connect by loopback."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    return {
        # without a dashboard, Ray Train's cleanup would look for one for 12 s at the end of each training
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1",
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }


def _local_options() -> dict[str, Any]:
    """Options of ray.init for a local Ray: no dashboard, and files in a folder of our own."""
    options: dict[str, Any] = {"include_dashboard": False}
    if "RAY_TMPDIR" not in os.environ:
        options["_temp_dir"] = str(private_folder() / "ray")  # Ray makes this folder itself accessible to everyone
    return options


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Inside, Ray starts with all its ports on 127.0.0.1. Raises RuntimeError if it did not.

    ray.init replaces a loopback address that it is given by the machine's outer one. Only this constant prevents that;
    Ray sets it on macOS and Windows.
    """
    import ray
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
    if (address := ray.util.get_node_ip_address()) != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(
            f"the local Ray listens on {address} instead of {LOOPBACK}; Ray {ray.__version__} is not supported"
        )


def private_folder() -> Path:
    """A folder that only this user can enter. Its path is short, because Ray keeps sockets in it.

    Raises PermissionError if somebody else made it, or can enter it.
    """
    place = Path(tempfile.gettempdir() if sys.platform == "linux" else "/tmp")
    folder = place / f"tokenmill-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    about = folder.lstat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077 or not stat.S_ISDIR(about.st_mode):
        raise PermissionError(
            f"{folder} must be a folder that only you can enter (mode 0700), because Ray keeps its logs and sockets "
            "there; remove it, or set RAY_TMPDIR to a folder of your own"
        )
    return folder


def _runtime_env() -> dict[str, Any] | None:
    """Makes every worker, on any machine, set this command's storage settings.

    The function travels through Ray's table of functions. Environment variables would be written to Ray's log files.
    """
    setter = storage.setter()
    return {"worker_process_setup_hook": setter} if setter else None


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
    import ray

    if is_local() or has_room(workers, ray.available_resources()):
        what = "There is room for one: it still starts, which takes longer on a busy machine or a slow disk. The job"
    else:
        what = f"A worker needs {described(workers)}; {have()}. The job starts as soon as there is room, and"
    return (
        f"{job}: no worker has started for {waited_s:.0f} s. {what} gives up after {workers.wait_s:.0f} s "
        "(workers.wait_s)"
    )


def has_room(workers: WorkersConfig, free: dict[str, float]) -> bool:
    """Whether a worker fits into free CPUs and GPUs, as far as their sums over all nodes tell."""
    return free.get("CPU", 0) >= (workers.cpus or 1) and free.get("GPU", 0) >= workers.gpus


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
