"""Jobs on clusters that are too small at first, that grow, and whose GPUs are shared."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.cluster import LAPTOP, Cluster, start_cluster, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


class Began(NamedTuple):
    """A processed shard: when a worker began it (seconds since 1970), in which process of which node."""

    at: float
    pid: int
    node: str


class Job(NamedTuple):
    """A running driver and its output."""

    process: subprocess.Popen
    log: Path

    def began(self) -> list[Began]:
        found = re.findall(r"^began (\S+) pid (\d+) node (\w+)$", self.log.read_text(), re.MULTILINE)
        return [Began(float(at), int(pid), node) for at, pid, node in found]

    def wait(self) -> None:
        assert self.process.wait(120) == 0, self.log.read_text()
        assert self.log.read_text().endswith("done\n")


@contextlib.contextmanager
def job(folder: Path, environment: dict[str, str], *arguments: str) -> Iterator[Job]:
    """Runs tests/jobs/slow_shards.py in its own process, which is killed at the end."""
    log = folder / "job.log"
    command = [sys.executable, "-m", "tests.jobs.slow_shards", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield Job(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without a CPU for jobs, to which the tests add nodes."""
    with start_cluster({}, num_nodes=0) as started:
        yield started


def test_a_job_waits_for_a_node_says_so_and_uses_each_node_that_joins(cluster: Cluster, tmp_path: Path):
    for node in cluster.nodes[1:]:
        cluster.kill(node)
    with job(tmp_path, cluster.client_environment(), "60", "1") as waiting:
        wait_for(
            lambda: "no worker has started for" in waiting.log.read_text(), 90, "the line that says what is missing"
        )
        assert "A worker needs 1 CPU (workers.cpus); the cluster has 0 of 0 CPUs" in waiting.log.read_text()
        cluster.start_node()
        wait_for(waiting.began, 60, "the first node to be used")
        cluster.start_node()
        joined = time.time()
        waiting.wait()
    began = waiting.began()
    second = [one.at for one in began if one.node != began[0].node]
    assert len(began) == 60
    assert min(second) - joined < 30


@contextlib.contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """As a shell script starts its commands in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_job_gives_up_when_no_node_joins_in_time(cluster: Cluster, tmp_path: Path):
    """With the exit code of an incomplete job, so that it can be repeated."""
    for node in cluster.nodes[1:]:
        cluster.kill(node)
    net = "{name: vqgan, width: 8, multipliers: [1, 1], res_blocks: 1, channels: 8, patch_size: 4, attention: false}"
    command = [sys.executable, "-m", "jobs", "train", f"model.net={net}", f"run={tmp_path}/run", "workers.wait_s=3"]
    shards = [f"data.shards={ROOT}/samples/heldout/*.tar", "quantizer={name: fsq}"]
    train = subprocess.run(
        [*command, *shards], cwd=ROOT, env=cluster.client_environment(), capture_output=True, text=True, timeout=120
    )
    assert train.returncode == 3, train.stderr
    line = "no worker has started for 3 s (workers.wait_s). A worker needs 1 CPU (workers.cpus); the cluster has 0 of 0"
    assert line in train.stderr
    with ctrl_c_ignored(), job(tmp_path, cluster.client_environment(), "4", "1", "workers.wait_s=3") as waiting:
        assert waiting.process.wait(120) == 1
    assert f"NoRoom: {line}" in waiting.log.read_text()


def test_rays_page_and_metrics_name_the_job_and_count_its_shards_and_ray_is_quiet(cluster: Cluster, tmp_path: Path):
    if len(cluster.nodes) == 1:
        cluster.start_node()
    with job(tmp_path, cluster.client_environment(), "20", "1", "workers.count=1") as running:
        wait_for(lambda: len(running.began()) >= 5, 90, "five shards")
        metrics = r'ray_data_output_rows{.*dataset="sleep_.*operator="Map\(Sleeper\)_1".*} [1-9]'
        exported = f"http://{LAPTOP}:{cluster.first_port + 2}/metrics"
        wait_for(lambda: re.search(metrics, answer(cluster, exported)), 30, f"{metrics} at {exported}")
        running.wait()
        [dataset] = json.loads(answer(cluster, f"{cluster.dashboard}/api/data/datasets/{job_id(cluster)}"))["datasets"]
    assert dataset["dataset"].startswith("sleep_")
    assert (dataset["state"], dataset["total"]) == ("FINISHED", 20)
    lines = running.log.read_text().splitlines()
    assert [line for line in lines if not line.startswith(("began ", "done")) and "Set ray log level" not in line] == []


def answer(cluster: Cluster, url: str) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {cluster.token}"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read().decode()


def job_id(cluster: Cluster) -> str:
    jobs = json.loads(answer(cluster, f"{cluster.dashboard}/api/jobs/"))
    return max(one["job_id"] for one in jobs if one["type"] == "DRIVER")  # the last one


def test_workers_with_a_quarter_of_a_gpu_fill_it(cluster: Cluster, tmp_path: Path):
    cluster.start_node("--num-gpus=1")
    settings = ("workers.gpus=0.25", "workers.cpus=0.1")
    with job(tmp_path, cluster.client_environment(), "16", "4", *settings) as running:
        running.wait()
    assert len({one.pid for one in running.began()}) == 4


AUTOSCALER = {  # Ray's own, whose nodes are processes of this machine. (ray.cluster_utils.AutoscalingCluster begins
    # with `ray stop --force`, which would end the Ray of all other tests, and lacks a file of its own in the wheel.)
    "cluster_name": "growing",
    "provider": {"type": "fake_multinode", "disable_node_updaters": True, "worker_liveness_check": False},
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    **{name: [] for name in ("cluster_synced_files", "file_mounts_sync_continuously", "initialization_commands")},
    **{name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
    **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
}


def test_an_autoscaling_cluster_is_asked_for_the_workers_that_a_job_wants(tmp_path: Path):
    (tmp_path / "autoscaler.json").write_text(json.dumps(AUTOSCALER))
    environment = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    # its nodes always look for the head at this port
    options = (f"--autoscaling-config={tmp_path}/autoscaler.json", "--port=6379")
    with start_cluster(environment, num_nodes=0, head_options=options) as cluster:
        joined = {**cluster.client_environment(), "RAY_ADDRESS": "127.0.0.1:6379"}
        with job(tmp_path, joined, "40", "2", "workers.count=2") as running:
            running.wait()
    assert len({one.node for one in running.began()}) == 2
