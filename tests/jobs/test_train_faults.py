"""Training that is stopped, killed, moved to another number of workers, or goes wrong: nothing is lost or repeated."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs.__main__ import main
from pipeline import storage
from tests.faults.cluster import Cluster, start_cluster, wait_for
from tests.jobs.helpers import SAMPLES, TINY_NET, children_named, driver_in_a_session
from tests.s3 import S3Server

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 20, 4  # with a checkpoint a step, each of which takes Ray some 2 s
SETTINGS = {
    "data": {"shards": f"{SAMPLES}/heldout/*.tar"},
    "model": {"net": {**TINY_NET, "patch_size": 4}},
    "quantizer": {"name": "vq_vae", "codebook_size": 32, "dim": 4, "replace_after": 3},
    "train": {"steps": STEPS, "batch_size": BATCH, "segment": 32, "log_every": 1, "checkpoint_every": 1},
    "workers": {"count": 2, "cpus": 1},
}
START_S = 150  # of Ray Train on a busy machine


def config(folder: Path, run: str = "") -> str:
    """Path of a YAML file with RUN = folder/run, or as given."""
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "run": run or f"{folder}/run"}))
    return str(folder / "config.yaml")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/reports/train.jsonl").read_text().splitlines()]


def is_noted(folder: Path, count: int = 1) -> bool:
    """Whether Ray Train has taken note of a checkpoint: one that it has not is lost with the workers."""
    snapshot = folder / "run/checkpoints/checkpoint_manager_snapshot.json"
    return snapshot.exists() and snapshot.read_text().count("checkpoint_20") >= count


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "run/checkpoints").glob("checkpoint_20*"))


def samples_taken(folder: Path) -> tuple[int, int]:
    """The step of the last checkpoint, and the samples that all lanes together had given by then."""
    ranks = [torch.load(file, weights_only=True) for file in last_checkpoint(folder).glob("rank-*.pt")]
    state = torch.load(last_checkpoint(folder) / "state.pt", weights_only=True)
    return state["step"], sum(total for rank in ranks for _, _, total in rank["positions"].values())


@contextlib.contextmanager
def meanwhile(condition: Callable[[], object], act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called in another thread as soon as the condition holds. Raises if it never does."""
    failed: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            wait_for(lambda: over.is_set() or condition(), START_S, "the moment to act")
            assert not over.is_set(), "it was over before the moment to act came"
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failed, failed


def sigterm_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stopped_half_way(folder: Path, *changes: str) -> int:
    """A run that SIGTERM stopped. Returns its last step."""
    with meanwhile(lambda: is_noted(folder), sigterm_myself):
        assert main(["train", config(folder), *changes]) == 3
    assert not (folder / "run/model").exists()
    return log(folder)[-1]["step"]


def assert_the_same_training(folder: Path, other: Path) -> None:
    """Bit by bit, losses and weights."""
    assert [row["step"] for row in log(folder)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in log(folder)] == [row["loss"] for row in log(other)]
    one, two = (load_file(place / "run/model/model.safetensors") for place in (folder, other))
    assert all(one[name].equal(two[name]) for name in two)


@pytest.fixture(scope="module")
def calm(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("calm")
    assert main(["train", config(folder), "train.checkpoint_every=1000"]) == 0
    return folder


# -- stopped and killed -------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_sigterm_saves_the_very_step_and_the_same_command_goes_on(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    step = stopped_half_way(tmp_path)
    told = capsys.readouterr().out
    assert f"train: stopped: at step {step}, as was asked for; the same command goes on from there" in told
    assert "tokenmill train: exit 3: incomplete" in told
    assert samples_taken(tmp_path) == (step, 2 * BATCH * step)
    assert 1 < step < STEPS
    assert main(["train", config(tmp_path), "train.checkpoint_every=1000"]) == 0
    assert f"goes on from the checkpoint of step {step}\n" in capsys.readouterr().out
    assert_the_same_training(tmp_path, calm)


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_changes_nothing(calm: Path, tmp_path: Path):
    killed: list[str] = []

    def kill_a_worker() -> None:
        worker = children_named("RayTrainWorker")[-1]
        killed.append(worker.name())
        worker.kill()

    with meanwhile(lambda: is_noted(tmp_path), kill_a_worker):
        assert main(["train", config(tmp_path), "train.max_failures=1"]) == 0
    assert len(killed) == 1
    assert_the_same_training(tmp_path, calm)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_workers_goes_on_where_the_lanes_are(tmp_path: Path, before: int, after: int):
    stopped = stopped_half_way(tmp_path, f"workers.count={before}")
    assert samples_taken(tmp_path) == (stopped, before * BATCH * stopped)
    rows = log(tmp_path)
    assert main(["train", config(tmp_path), f"workers.count={after}", "train.checkpoint_every=5"]) == 0
    step, taken = samples_taken(tmp_path)
    assert step == STEPS - 5
    assert taken == before * BATCH * stopped + after * BATCH * (step - stopped)
    assert log(tmp_path)[:stopped] == rows


# -- on S3 --------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.s3
def test_a_run_on_s3_is_stopped_and_goes_on(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch)
    run = f"{s3.url}/train-faults"
    file = config(tmp_path, run)
    with driver_in_a_session(["train", file]) as driver:
        snapshot = f"{run}/checkpoints/checkpoint_manager_snapshot.json"
        wait_for(lambda: driver.poll() is not None or storage.exists(snapshot), START_S, "a checkpoint")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(START_S) == 3
    rows = storage.read(f"{run}/reports/train.jsonl").splitlines()
    assert 0 < len(rows) < STEPS
    with driver_in_a_session(["train", file, "train.checkpoint_every=5"]) as driver:
        assert driver.wait(2 * START_S) == 0
    after = storage.read(f"{run}/reports/train.jsonl").splitlines()
    assert len(after) == STEPS
    assert after[: len(rows)] == rows  # their times too: those steps were not made again
    assert storage.exists(f"{run}/model/model.safetensors")
    assert len(storage.glob(f"{run}/checkpoints/*/state.pt")) == 2  # train.keep_checkpoints


# -- a node is lost -----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    with start_cluster({}) as started:
        yield started


@pytest.mark.ray
@pytest.mark.faults
def test_a_killed_node_is_replaced_and_training_goes_on(cluster: Cluster, tmp_path: Path):
    file = config(tmp_path)
    command = [sys.executable, "-m", "jobs", "train", file, "train.max_failures=1"]
    with (tmp_path / "log").open("wb") as told:
        driver = subprocess.Popen(command, cwd=ROOT, env=cluster.client_environment(), stdout=told, stderr=told)
    try:
        wait_for(lambda: driver.poll() is not None or is_noted(tmp_path), START_S, "a checkpoint")
        cluster.kill(cluster.nodes[1])
        cluster.start_node()
        assert driver.wait(2 * START_S) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        driver.kill()
    assert "goes on from the checkpoint of step" in (tmp_path / "log").read_text()
    assert [row["step"] for row in log(tmp_path)] == list(range(1, STEPS + 1))


# -- trouble with numbers -----------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wild = ["train.lr=1.0e+30", "train.grad_clip=1.0e+30", "train.warmup_steps=0", "train.checkpoint_every=1000"]
    assert main(["train", config(tmp_path), *wild, "train.max_failures=1"]) == 3
    [file] = (tmp_path / "run/reports").glob("nan-step-*.json")
    assert f"its samples are in {file}" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "lower train.lr" in found["error"]
    assert [len(samples) for samples in found["samples_by_rank"]] == [BATCH, BATCH]
    shards = {sample["shard"] for samples in found["samples_by_rank"] for sample in samples}
    assert shards <= {str(path) for path in (SAMPLES / "heldout").glob("*.tar")}
    assert not (tmp_path / "run/model").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_collapse_stops_both_ranks_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    alarm = ["train.collapse_below=1000", "train.collapse_steps=5", "train.collapse_stops=true"]
    assert main(["train", config(tmp_path), *alarm, "train.checkpoint_every=1000"]) == 3
    assert "stopped: the codebook has collapsed: perplexity" in capsys.readouterr().out
    assert samples_taken(tmp_path) == (6, 2 * BATCH * 6)


# -- all that can be switched on ----------------------------------------------------------------------------------


def events(folder: Path) -> list:
    """TensorBoard's events, in the order of their files: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "run/reports/tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_with_everything_on_is_watched_and_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    on = ["train.profile=true", "train.evaluate_every=2", "train.pictures=3", "train.accumulate=2", "train.ema=0.9"]
    assert main(["train", config(tmp_path), *on, "train.steps=5", "workers.count=1"]) == 0

    profile = json.loads((tmp_path / "run/reports/profile.json").read_text())
    stages = {"data wait", "forward", "backward", "optimizer", "logging", "checkpoint", "evaluation"}
    assert profile["seconds"].keys() == stages
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert "where rank 0's time went: data wait" in capsys.readouterr().out

    values = [(value.tag, event.step) for event in events(tmp_path) for value in event.summary.value]
    assert [step for tag, step in values if tag == "loss"] == [1, 2, 3, 4, 5]
    assert [step for tag, step in values if tag == "reconstructions"] == [2, 4, 5]
    page = (tmp_path / "run/reports/train.html").read_text()
    assert page.count("class=pair") == 3
    assert "reconstructions at step 5" in page

    state = torch.load(last_checkpoint(tmp_path) / "state.pt", weights_only=True)
    saved = load_file(tmp_path / "run/model/model.safetensors")
    assert state["averages"].keys() <= saved.keys()


@pytest.mark.ray
def test_watching_and_profiling_change_no_weight(calm: Path, tmp_path: Path):
    watched = ["train.profile=true", "train.evaluate_every=15", "train.checkpoint_every=1000"]
    assert main(["train", config(tmp_path), *watched]) == 0
    assert_the_same_training(tmp_path, calm)
