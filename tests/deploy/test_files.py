"""The other files of deploy/: Docker, `ray up`."""

import copy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.deploy.programs import program

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def test_the_dockerfile_is_clean():
    done = subprocess.run([program("hadolint"), DEPLOY / "docker/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_the_versions_that_we_test():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    assert f"RAY_VERSION={pins['ray']}\n" in dockerfile
    assert "-c constraints.txt" in dockerfile
    assert f"rayVersion: {pins['ray']}\n" in (DEPLOY / "kubernetes/job/job.yaml").read_text()


def test_the_image_installs_every_requirement_of_its_extras():
    script = [sys.executable, DEPLOY / "docker/requirements.py", "jobs", "s3", "gcs", "azure", "audio"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"requirements.py {' '.join(script[2:])} >" in (DEPLOY / "docker/Dockerfile").read_text()
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
