"""Training that is stopped, killed, resumed with other workers, or diverges: no sample is lost or repeated."""

import contextlib
import json
import os
import re
import shutil
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
from tests.corpus import write_tar
from tests.faults.cluster import Cluster, start_cluster, wait_for
from tests.jobs.helpers import SAMPLES, TINY_NET, children_named, driver_in_a_session, jpegs
from tests.s3 import S3Server
from tokenizer.autoencoder import Autoencoder

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 24, 4
SETTINGS = {
    "data": {"shards": f"{SAMPLES}/heldout/*.tar"},
    "model": {"net": {**TINY_NET, "patch_size": 4}},
    "quantizer": {"name": "vq_vae", "codebook_size": 32, "dim": 4, "replace_after": 3},
    "train": {
        **{"steps": STEPS, "batch_size": BATCH, "crop_size": 32, "log_every": 1, "checkpoint_every": 1},
        # everything that has state, so that every test here covers it
        **{"grad_accum_steps": 2, "ema": 0.9},
        "discriminator": {"weight": 0.5, "start_step": 2, "channels": 8, "layers": 1},
    },
    "workers": {"count": 2, "cpus": 1},
}
START_S = 150  # of Ray Train on a busy machine


def config(folder: Path, run: str = "") -> str:
    """Path of a YAML file with RUN = folder/run, or as given."""
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "run": run or f"{folder}/run"}))
    return str(folder / "config.yaml")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/reports/train.jsonl").read_text().splitlines()]


def noted_step(folder: Path) -> int:
    """Step of the last checkpoint that Ray Train has recorded (0 for none). Others are lost if the workers die."""
    snapshot = folder / "run/checkpoints/checkpoint_manager_snapshot.json"
    steps = re.findall(r'"step": *([0-9]+)', snapshot.read_text()) if snapshot.exists() else []
    return max(map(int, steps), default=0)


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "run/checkpoints").glob("checkpoint_20*"))


def samples_taken(folder: Path) -> tuple[int, int]:
    """The step of the last checkpoint, and the number of samples taken from all lanes by then."""
    ranks = [torch.load(file, weights_only=True) for file in last_checkpoint(folder).glob("rank-*.pt")]
    state = torch.load(last_checkpoint(folder) / "state.pt", weights_only=True)
    return state["step"], sum(total for rank in ranks for _, _, total in rank["positions"].values())


@contextlib.contextmanager
def meanwhile(condition: Callable[[], object], act: Callable[[], None]) -> Iterator[None]:
    """Inside, another thread calls `act` as soon as the condition holds. Raises if it never does."""
    failed: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            wait_for(lambda: over.is_set() or condition(), START_S, "the moment to act")
            assert not over.is_set(), "the command ended before the condition held"
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


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stopped(
    command: list[str], folder: Path, act: Callable[[], None], code: int, *, after: int = 0, workers: int = 2
) -> int:
    """Runs the command, and acts once a checkpoint past step `after` is recorded. Returns the step at which it stops.

    Every sample must then be accounted for.
    """
    with meanwhile(lambda: noted_step(folder) > after, act):
        assert main(command) == code
    return step_of_stopped(folder, after, workers)


def step_of_stopped(folder: Path, after: int, workers: int) -> int:
    """The step at which the run in folder/run stopped, after step `after`, with every sample accounted for."""
    assert not (folder / "run/model").exists()
    step, taken = samples_taken(folder)
    assert after < step < STEPS
    assert step == log(folder)[-1]["step"]
    assert taken == workers * BATCH * step
    return step


def assert_the_same_training(folder: Path, other: Path) -> None:
    """Losses, including those of the discriminator, and weights are equal to the bit."""
    assert [row["step"] for row in log(folder)] == list(range(1, STEPS + 1))
    for name in ("loss", "discriminator"):
        assert [row.get(name) for row in log(folder)] == [row.get(name) for row in log(other)]
    one, two = (load_file(place / "run/model/model.safetensors") for place in (folder, other))
    assert all(one[name].equal(two[name]) for name in two)


@pytest.fixture(scope="module")
def calm(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run without faults."""
    folder = tmp_path_factory.mktemp("calm")
    assert main(["train", config(folder), "train.checkpoint_every=1000"]) == 0
    return folder


# -- stopped and killed -------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_an_outage_and_a_killed_worker_one_after_the_other_change_nothing(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One run for both faults, since Ray Train takes long to start. The command is always the same."""
    for shard in (SAMPLES / "heldout").glob("*.tar"):
        shutil.copy(shard, tmp_path)
    command = ["train", config(tmp_path), f"data.shards={tmp_path}/*.tar", "train.max_failures=1"]

    # A shard can no longer be opened, which one rank notices in the next epoch.
    struck, away = tmp_path / "photos-001.tar", tmp_path / "away"
    step = stopped(command, tmp_path, lambda: replace_by_a_loop(struck, away), 3)
    printed = capsys.readouterr().out
    assert f"train: {struck}: cannot be read to its end (OSError: [Errno 40]" in printed
    assert f"stopped: at step {step}, because there are no more samples; rerun the same command" in printed
    away.replace(struck)

    killed: list[str] = []
    with meanwhile(lambda: noted_step(tmp_path) > step, lambda: kill_a_worker(killed)):
        assert main(command) == 0
    assert f"resuming from the checkpoint of step {step}\n" in capsys.readouterr().out
    assert len(killed) == 1
    assert_the_same_training(tmp_path, calm)


def replace_by_a_loop(file: Path, away: Path) -> None:
    """Makes opening the file fail ("too many levels of symbolic links"), to imitate a failing disk."""
    file.rename(away)
    file.symlink_to(file)


def kill_a_worker(killed: list[str]) -> None:
    worker = children_named("RayTrainWorker")[-1]
    killed.append(worker.name())
    worker.kill()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_another_number_of_workers_resumes_at_the_positions_of_the_lanes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """1 worker, stopped by ctrl-C; then 2, stopped by a collapse; then 1. Both stops leave a checkpoint."""
    command = ["train", config(tmp_path)]
    first = stopped([*command, "workers.count=1"], tmp_path, press_ctrl_c, 130, workers=1)
    assert "exit 130: interrupted (ctrl-C); rerun the same command to continue" in capsys.readouterr().out
    rows = log(tmp_path)

    alarm = ["train.collapse.perplexity=1000", "train.collapse.patience=5", "train.collapse.stop=true"]
    assert main([*command, *alarm, "train.checkpoint_every=1000"]) == 3
    assert "stopped: the codebook has collapsed: perplexity" in capsys.readouterr().out
    second = log(tmp_path)[-1]["step"]
    taken = BATCH * first + 2 * BATCH * (second - first)
    assert samples_taken(tmp_path) == (second, taken)

    assert main([*command, "workers.count=1", f"train.checkpoint_every={STEPS - 1}"]) == 0
    assert samples_taken(tmp_path) == (STEPS, taken + BATCH * (STEPS - second))
    assert log(tmp_path)[:first] == rows


# -- corpora without good samples, and runs that become longer -----------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_without_a_good_sample_ends_training_and_leaves_the_run_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Then the same run trains with one bad sample, which several passes count once, and then for more steps."""
    write_tar(tmp_path / "bad.tar", [(f"{i}.txt", b"a caption") for i in range(5)])
    write_tar(tmp_path / "mixed.tar", sorted([*jpegs(6), ("9999.jpg", b"not a picture")]))
    file = config(tmp_path)
    small = ["workers.count=1", "train.steps=6", "train.shuffle_buffer=1"]
    assert main(["train", file, f"data.shards={tmp_path}/bad.tar", *small]) == 3
    out = capsys.readouterr().out
    assert "none of the last" in out
    assert "needs one member of" in out
    assert "check data.shards, model.modality and data.preprocess" in out
    assert not list(tmp_path.glob("run/checkpoints/checkpoint_*"))

    good = [file, f"data.shards={tmp_path}/mixed.tar", *small]
    assert main(["train", *good]) == 0
    out = capsys.readouterr().out
    assert "has made no checkpoint yet; it now trains with the new data.shards" in out
    assert "skipped 1 samples that cannot be decoded (1 " in out
    [skipped] = [json.loads(line) for line in (tmp_path / "run/reports/skipped.jsonl").read_text().splitlines()]
    assert (skipped["key"], skipped["index"]) == ("9999", 6)
    assert skipped["shard"] == f"{tmp_path}/mixed.tar"
    assert "Skipped samples: 1" in (tmp_path / "run/reports/train.html").read_text()

    before = log(tmp_path)
    assert main(["train", *good, "train.steps=8"]) == 0
    assert "now trains to step 8 instead of 6, with the learning rate of the longer schedule" in capsys.readouterr().out
    assert [row["step"] for row in log(tmp_path)] == list(range(1, 9))
    assert log(tmp_path)[:6] == before
    assert samples_taken(tmp_path)[0] == 8

    (tmp_path / "run/tokenizers/x").mkdir(parents=True)
    assert main(["train", *good, "train.steps=9"]) == 2
    assert f"delete {tmp_path}/run/tokenizers first, or choose another `run`" in capsys.readouterr().err
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert main(["train", *good, "train.steps=7"]) == 2
    assert "trains with train.steps=8, not 7" in capsys.readouterr().err


# -- on S3 --------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.s3
def test_a_run_on_s3_is_stopped_by_sigterm_and_resumed_with_the_same_result(
    calm: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    s3.use(monkeypatch)
    run = f"{s3.url}/train-faults"
    file, printed = config(tmp_path, run), tmp_path / "log"
    with driver_in_a_session(["train", file], printed) as driver:
        snapshot = f"{run}/checkpoints/checkpoint_manager_snapshot.json"
        wait_for(lambda: driver.poll() is not None or storage.exists(snapshot), START_S, "a checkpoint")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(START_S) == 143
    fetch(run, tmp_path / "run")
    step, rows = step_of_stopped(tmp_path, after=0, workers=2), log(tmp_path)
    told = f"train: stopped: at step {step}, on request; rerun the same command to resume from there"
    assert told in printed.read_text()
    told = "tokenmill train: exit 143: terminated (SIGTERM); rerun the same command to continue"
    assert told in printed.read_text()

    with driver_in_a_session(["train", file, "train.checkpoint_every=8"], printed) as driver:
        assert driver.wait(2 * START_S) == 0
    assert f"resuming from the checkpoint of step {step}\n" in printed.read_text()
    fetch(run, tmp_path / "run")
    assert_the_same_training(tmp_path, calm)
    assert log(tmp_path)[: len(rows)] == rows  # also the same times, which shows that those steps were not repeated
    assert len(storage.glob(f"{run}/checkpoints/*/state.pt")) == 2  # train.keep_checkpoints


def fetch(url: str, folder: Path) -> None:
    """A copy of the objects below the URL, instead of what was in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for found in storage.glob(f"{url}/**"):
        place = folder / found.url.removeprefix(f"{url}/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(storage.read(found.url))


# -- a node is lost -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    with start_cluster({}) as started:
        yield started


@pytest.mark.ray
@pytest.mark.faults
def test_a_killed_node_is_replaced_and_training_continues(cluster: Cluster, tmp_path: Path):
    file = config(tmp_path)
    command = [sys.executable, "-m", "jobs", "train", file, "train.max_failures=1"]
    with (tmp_path / "log").open("wb") as printed:
        driver = subprocess.Popen(command, cwd=ROOT, env=cluster.client_environment(), stdout=printed, stderr=printed)
    try:
        wait_for(lambda: driver.poll() is not None or noted_step(tmp_path), START_S, "a checkpoint")
        cluster.kill(cluster.nodes[1])
        cluster.start_node()
        assert driver.wait(2 * START_S) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    assert "resuming from the checkpoint of step" in (tmp_path / "log").read_text()
    assert [row["step"] for row in log(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.ray
@pytest.mark.faults
def test_a_node_that_is_about_to_be_lost_causes_a_checkpoint(cluster: Cluster, tmp_path: Path):
    """The run would take hours, and no other checkpoint is due in it."""
    watching = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    environment = {**cluster.client_environment(), **watching}
    endless = ["train.checkpoint_every=1000000", "train.steps=1000000", "workers.count=1"]
    command = [sys.executable, "-m", "jobs", "train", config(tmp_path), *endless]
    with (tmp_path / "log").open("wb") as printed:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed)
    try:
        wait_for(
            lambda: driver.poll() is not None or b"train: 1/" in (tmp_path / "log").read_bytes(), START_S, "a step"
        )
        subprocess.run([sys.executable, "-c", DRAIN_ALL], env=environment, check=True, timeout=START_S)
        wait_for(lambda: driver.poll() is not None or noted_step(tmp_path), START_S, "a checkpoint")
        assert driver.poll() is None, (tmp_path / "log").read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    assert (
        f"a node is about to be lost: saving a checkpoint at step {noted_step(tmp_path)}"
        in (tmp_path / "log").read_text()
    )


DRAIN_ALL = """
import subprocess, ray
ray.init(address="auto", log_to_driver=False)
for node in ray.nodes():
    if node["Alive"] and node["Resources"].get("CPU"):
        notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=600"]
        address = ray.get_runtime_context().gcs_address
        name = f"--node-id={node['NodeID']}"
        subprocess.run(["ray", "drain-node", f"--address={address}", name, *notice], check=True)
"""


# -- divergence ---------------------------------------------------------------------------------------------------


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


# -- monitoring a run ---------------------------------------------------------------------------------------------


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
def test_monitoring_and_profiling_report_everything_and_change_no_weight(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watched = [
        "train.profile=true",
        "train.reconstruct_every=8",
        "train.num_examples=3",
        f"train.checkpoint_every={STEPS - 1}",
    ]
    assert main(["train", config(tmp_path), *watched]) == 0
    assert_the_same_training(tmp_path, calm)

    profile = json.loads((tmp_path / "run/reports/profile.json").read_text())
    stages = {"data wait", "forward", "backward", "discriminator", "optimizer", "logging", "checkpoint", "evaluation"}
    assert profile["seconds"].keys() == stages
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert "where rank 0's time went: data wait" in capsys.readouterr().out

    values = [(value.tag, event.step) for event in events(tmp_path) for value in event.summary.value]
    assert [step for tag, step in values if tag == "loss"] == list(range(1, STEPS + 1))
    assert [step for tag, step in values if tag == "reconstructions"] == [8, 16, STEPS]
    page = (tmp_path / "run/reports/train.html").read_text()
    assert page.count('<figure class="pair') == 3
    assert f"reconstructions at step {STEPS}" in page

    state = torch.load(last_checkpoint(tmp_path) / "state.pt", weights_only=True)
    saved = load_file(tmp_path / "run/model/model.safetensors")
    assert state["averages"].keys() <= saved.keys() == Autoencoder.load(tmp_path / "run/model").inference_state().keys()
