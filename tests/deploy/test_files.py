"""The other files of deploy/: Docker, `ray up`."""

import copy
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from jobs.config import load_config
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


@pytest.mark.parametrize(("name", "field"), [("skypilot/tokenmill", "run"), ("anyscale/tokenize", "entrypoint")])
def test_the_commands_of_hosted_jobs_have_valid_keys(name: str, field: str):
    text = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())[field].replace("\\\n", " ")
    program, command, *settings = shlex.split(text.replace("$BUCKET", "BUCKET"))
    assert (program, command) == ("tokenmill", "tokenize")
    assert load_config(settings).data.shards == "s3://BUCKET/photos-*.tar"


@pytest.mark.parametrize("page", sorted(str(page.relative_to(ROOT)) for page in DEPLOY.rglob("README.md")))
def test_links_lead_somewhere(page: str):
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_alerts_use_metrics_that_ray_has():
    import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as panels

    [_, rules] = yaml.safe_load_all((DEPLOY / "kubernetes/monitoring/monitoring.yaml").read_text())
    alerts = rules["spec"]["groups"][0]["rules"]
    used = {name for alert in alerts for name in re.findall(r"ray_\w+", alert["expr"])}
    assert len(used) >= len(alerts)
    assert used <= set(re.findall(r"ray_\w+", Path(panels.__file__).read_text()))
