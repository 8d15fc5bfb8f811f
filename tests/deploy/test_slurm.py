"""The batch script of deploy/slurm runs on one node, with stand-ins for Slurm's scontrol and srun."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray  # noqa: F401  puts its bundled psutil on the path
import yaml

import psutil  # isort: skip

from tests.corpus import write_tar
from tests.deploy.programs import program
from tests.faults.cluster import START_S, wait_for, without_ray
from tests.jobs.helpers import TINY_NET, jpegs

SCRIPT = Path(__file__).parent.parent.parent / "deploy/slurm/tokenmill.sbatch"


def test_the_batch_script_is_sound():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run([program("shellcheck"), SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# `ray symmetric-run` refuses to start where another Ray runs, and stops every Ray that it sees at its end. In a PID
# namespace it sees only its own.
ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def alone() -> tuple[str, ...]:
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a PID namespace (unshare --pid), such as that of root")
    return ALONE


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables of a job on one node. Ray's files are in a folder of their own, with a short path."""
    bin = tmp_path / "bin"
    bin.mkdir()
    # like Slurm's, srun runs its command where a signal to the batch script does not reach it
    stand_ins = {
        "scontrol": "echo 127.0.0.1",
        "srun": 'shift; exec setsid --wait "$@"',
        "tokenmill": f'exec {sys.executable} -m tokenmill "$@"',
    }
    for name, text in stand_ins.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield {
            **without_ray(os.environ),
            "PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(SCRIPT.parent.parent.parent),
            "RAY_TMPDIR": folder,
            "RAY_PORT": "23990",
            "SLURM_JOB_NODELIST": "node-1",
            "SLURM_JOB_NUM_NODES": "1",
        }


def train(folder: Path, steps: int) -> list[str]:
    """A tiny training that makes a checkpoint only when it is stopped."""
    write_tar(folder / "in/photos-000.tar", jpegs(12))
    settings = {
        "data": {"shards": f"{folder}/in/*.tar"},
        "model": {"net": {**TINY_NET, "patch_size": 4}},
        "quantizer": {"name": "vq_vae", "codebook_size": 32, "dim": 4},
        "train": {"steps": steps, "batch_size": 4, "crop_size": 32, "log_every": 1, "checkpoint_every": steps},
        "workers": {"count": 1, "cpus": 1},
        "run": f"{folder}/run",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return ["bash", str(SCRIPT), "train", f"{folder}/config.yaml"]


@pytest.mark.slow  # a training on a Ray of its own: minutes
@pytest.mark.ray
def test_the_command_runs_on_the_ray_of_the_job_and_saves_at_the_time_limit(slurm: dict[str, str], tmp_path: Path):
    log = tmp_path / "log"
    with log.open("wb") as out:
        job = subprocess.Popen([*alone(), *train(tmp_path, 900_000)], env=slurm, stdout=out, stderr=out)
    try:
        rows = tmp_path / "run/reports/train.jsonl"
        wait_for(lambda: job.poll() is not None or rows.exists(), START_S, "the first steps")
        [script] = psutil.Process(job.pid).children()
        script.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
        assert job.wait(START_S) == 143, log.read_text()
    finally:
        job.kill()
    printed = log.read_text()
    assert "on request; rerun the same command to resume from there" in printed
    assert list((tmp_path / "run/checkpoints").glob("*/state.pt"))
    sessions = [p for p in Path(slurm["RAY_TMPDIR"]).rglob("session_2*") if p.is_dir() and not p.is_symlink()]
    assert len(sessions) == 1, "the command started a Ray of its own"
