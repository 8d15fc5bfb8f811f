"""A Ray cluster with several nodes on this machine. Its nodes and workers can really be killed."""

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ray  # noqa: F401  puts the psutil that it carries on the path

import psutil  # isort: skip

RAY = Path(sysconfig.get_path("scripts")) / "ray"
LAPTOP = "127.0.0.1"
START_S = 300  # on a busy machine
# Above those of tests/s3.py, below its gRPC ports, and outside of 10002 to 19999, which Ray gives to its workers.
FIRST_PORT, LAST_PORT, PORTS_EACH = 23_000, 29_900, 10
NOTICED_IN_SECONDS = {  # that a node is gone; Ray's own settings had not noticed a cut link after 60 s
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
STARTED = b"Ray runtime started"
OF_A_JOB = "ray::MapWorker("  # Ray Data's name for the actors that have the shards


@dataclass
class Node:
    """One `ray start --block`, its raylet below it, and the workers below that."""

    process: subprocess.Popen
    log: Path

    def wait_until_started(self) -> None:
        """Raises AssertionError with the log if the node does not start in START_S."""
        try:
            wait_for(lambda: self.process.poll() is not None or STARTED in self.log.read_bytes(), START_S, "ray start")
            assert self.process.poll() is None, f"`ray start` ended with {self.process.returncode}"
        except AssertionError as error:
            raise AssertionError(f"{error}; its log ends:\n{self.log.read_text(errors='replace')[-3000:]}") from error

    def job_workers(self) -> list[psutil.Process]:
        """The processes of the actors that have the shards, as Ray titles them."""
        found = []
        for child in _below(self.process.pid):
            with contextlib.suppress(psutil.Error):
                if " ".join(child.cmdline()).startswith(OF_A_JOB):
                    found.append(child)
        return found

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the node at once, like a power failure."""
        everything = _below(self.process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            everything.append(psutil.Process(self.process.pid))
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everything, timeout=30)
        self.process.wait()


@dataclass
class Cluster:
    """A head, and nodes with one CPU each. environment: their settings for S3."""

    folder: Path  # a short path, because it holds Unix sockets
    environment: dict[str, str]
    first_port: int
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    nodes: list[Node] = field(default_factory=list)  # the head is the first
    _count: Iterator[int] = field(default_factory=itertools.count)

    @property
    def dashboard(self) -> str:
        return f"http://{LAPTOP}:{self.first_port + 1}"

    def client_environment(self) -> dict[str, str]:
        """Environment variables for drivers and for `ray job submit`."""
        return {
            **without_ray(os.environ),
            **self.environment,
            "RAY_ADDRESS": f"{LAPTOP}:{self.first_port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",  # `ray start` needs it, so that submitted jobs find python
        }

    def start_head(self, *options: str) -> Node:
        """Starts the head without CPUs for jobs, so that killing workers never kills it."""
        names = ("port", "dashboard-port", "metrics-export-port", "ray-client-server-port")
        ports = [f"--{name}={self.first_port + i}" for i, name in enumerate(names)]
        return self._start("--head", "--num-cpus=0", *ports, f"--temp-dir={self.folder}", *options)

    def start_node(self, *options: str) -> Node:
        return self._start("--num-cpus=1", *options, f"--address={LAPTOP}:{self.first_port}")

    def job_workers(self) -> list[psutil.Process]:
        return [worker for node in self.nodes for worker in node.job_workers()]

    def nodes_at_work(self) -> list[Node]:
        return [node for node in self.nodes if node.job_workers()]

    def kill(self, node: Node) -> None:
        node.kill()
        self.nodes.remove(node)

    def stop(self) -> None:
        for node in reversed(self.nodes[:]):
            self.kill(node)

    def _start(self, *options: str) -> Node:
        common = [f"--node-ip-address={LAPTOP}", "--object-store-memory=100000000", "--disable-usage-stats"]
        common += ["--dashboard-agent-listen-port=0"]  # any free port: only one node per machine can use the default
        environment = {**self.client_environment(), **NOTICED_IN_SECONDS}
        del environment["RAY_ADDRESS"]  # `ray start --head` refuses to start if it is set
        log = self.folder.parent / f"node-{next(self._count)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(RAY), "start", "--block", *common, *options],
                env=environment,
                start_new_session=True,
                stdout=file,
                stderr=file,
            )
        self.nodes.append(Node(process, log))
        self.nodes[-1].wait_until_started()
        return self.nodes[-1]


@contextlib.contextmanager
def start_cluster(
    environment: dict[str, str], num_nodes: int = 2, head_options: tuple[str, ...] = ()
) -> Iterator[Cluster]:
    """A head and `num_nodes` nodes with one CPU each. All processes are killed at the end."""
    with tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        sub = Path(folder) / "r"
        sub.mkdir()
        cluster = Cluster(sub, environment, _free_ports())
        try:
            cluster.start_head(*head_options)
            for _ in range(num_nodes):  # one by one: in parallel on two cores they exceed Ray's time limit
                cluster.start_node()
            yield cluster
        finally:
            cluster.stop()


def without_ray(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """The variables without those of a running Ray. The settings of Ray Train in tests/conftest.py stay."""
    kept = "RAY_TRAIN_"
    return {name: value for name, value in environment.items() if not name.startswith("RAY_") or name.startswith(kept)}


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Checks the condition every few milliseconds. Raises AssertionError with `what` after the timeout.

    A slow check, such as a request to S3, is made less often: it would need the processor that the job needs.
    """
    start = time.monotonic()
    while True:
        before = time.monotonic()
        if condition():
            return
        assert before < start + timeout_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(max(0.005, 3 * (time.monotonic() - before)))


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_ports() -> int:
    """The first of PORTS_EACH free ports. The search starts at a place that depends on the process id."""
    places = (LAST_PORT - FIRST_PORT) // PORTS_EACH
    for i in range(places):
        first = FIRST_PORT + PORTS_EACH * ((os.getpid() + i) % places)
        if all(_is_free(first + j) for j in range(PORTS_EACH)):
            return first
    raise RuntimeError(f"no {PORTS_EACH} free ports between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LAPTOP, port)) != 0
