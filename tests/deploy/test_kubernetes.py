"""The manifests of deploy/kubernetes: KubeRay's strict schemas, its rules that no schema knows, and valid commands."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.__main__ import COMMANDS
from jobs.config import load_config
from tests.deploy.render import Manifest, containers, of_kind, render

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = ROOT / "deploy/kubernetes"
COMMAND_JOBS = ("train", "codebook", "tokenize", "verify")
FOLDERS = (*COMMAND_JOBS, "kueue", "nightly", "cluster")
SCHEMAS = {
    kind: json.loads((Path(__file__).parent / f"schemas/{kind}.v1.schema.json").read_text())
    for kind in ("RayJob", "RayCluster")
}
# KubeRay 1.7: apis/ray/v1/raycronjob_types.go. Its jobTemplate is the spec of a RayJob.
SCHEMAS["RayCronJob"] = {
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCronJob"},
        "metadata": {"type": "object"},
        "spec": {
            "properties": {
                "schedule": {"type": "string"},
                "timeZone": {"type": "string"},
                "suspend": {"type": "boolean"},
                "jobTemplate": SCHEMAS["RayJob"]["properties"]["spec"],
            },
            "required": ["schedule", "jobTemplate"],
            "additionalProperties": False,
        },
    },
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
}
LONGEST_NAME = 47  # of a RayJob, in KubeRay


def ray_kinds(folder: str) -> list[Manifest]:
    found = [manifest for manifest in render(MANIFESTS / folder) if manifest["apiVersion"] == "ray.io/v1"]
    assert found
    return found


def check(manifest: Manifest) -> None:
    """Raises ValidationError. Unlike jsonschema.validate it does not check the large schema itself each time."""
    jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]]).validate(manifest)


def job_spec(manifest: Manifest) -> dict[str, Any]:
    return manifest["spec"].get("jobTemplate", manifest["spec"])


def cluster_spec(manifest: Manifest) -> dict[str, Any]:
    return job_spec(manifest).get("rayClusterSpec", manifest["spec"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_fit_the_schemas_of_kuberay(folder: str):
    for manifest in ray_kinds(folder):
        check(manifest)


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("train", "spec/entrypoynt"),
        ("train", "spec/rayClusterSpec/authOptions/secret"),
        ("train", "spec/deletionStrategy/deletionRules/0/when"),
        ("nightly", "spec/concurrencyPolicy"),
        ("nightly", "spec/jobTemplate/rayClusterSpec/headGroupSpec/template/spec/containers/0/imagePolicy"),
        ("cluster", "spec/workerGroupSpecs/0/maxReplica"),
    ],
)
def test_a_misspelled_field_is_found(folder: str, path: str):
    [manifest] = ray_kinds(folder)
    *parents, last = path.split("/")
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[last] = "value"
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        check(manifest)


def problems(job: dict[str, Any]) -> list[str]:
    """What KubeRay's operator refuses in the spec of a job: ray-operator/controllers/ray/utils/validation.go."""
    rules = job.get("deletionStrategy", {}).get("deletionRules", [])
    found = []
    if rules and (job.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" in job):
        found.append("deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished")
    if "ttlSecondsAfterFinished" in job and not job.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if job["rayClusterSpec"].get("enableInTreeAutoscaling") and any(r["policy"] == "DeleteWorkers" for r in rules):
        found.append("DeleteWorkers excludes autoscaling")
    for rule in rules:
        if len({"jobStatus", "jobDeploymentStatus"} & rule["condition"].keys()) != 1:
            found.append("a rule needs one of jobStatus and jobDeploymentStatus")
    return found


@pytest.mark.parametrize("folder", [*COMMAND_JOBS, "kueue", "nightly"])
def test_the_operator_accepts_the_jobs(folder: str):
    [manifest] = ray_kinds(folder)
    job = job_spec(manifest)
    assert not problems(job)
    assert len(manifest["metadata"]["name"]) <= LONGEST_NAME
    assert job["backoffLimit"] > 0
    assert job.get("shutdownAfterJobFinishes") or "deletionStrategy" in job, "its cluster would stay"


def test_what_the_operator_refuses_is_found():
    job = job_spec(ray_kinds("train")[0])
    assert problems({**job, "shutdownAfterJobFinishes": True})
    assert problems({**job, "ttlSecondsAfterFinished": 1})
    rule = {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}
    assert problems({**job, "deletionStrategy": {"deletionRules": [rule]}})


# puts the arguments that it gets into a file, one line of JSON per call
RECORDER = """#!{python}
import json, sys
with open({file!r}, "a") as out:
    print(json.dumps(sys.argv[1:]), file=out)
"""


def as_received(entrypoint: str, folder: Path) -> list[list[str]]:
    """The arguments that tokenmill gets: KubeRay gives the line to bash, `ray job submit` to `sh -c` on the head."""
    words = 'import subprocess, sys; print(subprocess.list2cmdline(sys.argv[1:]), end="")'
    submitted = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(words)} {entrypoint}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    recorder, calls = folder / "tokenmill", folder / "calls"
    recorder.write_text(RECORDER.format(python=sys.executable, file=str(calls)))
    recorder.chmod(0o755)
    subprocess.run(submitted, shell=True, check=True, env={"PATH": f"{folder}:/usr/bin:/bin"}, cwd=folder)
    return [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    ("folder", "commands"),
    [*((name, [name]) for name in COMMAND_JOBS), ("kueue", ["tokenize"]), ("nightly", ["tokenize", "verify"])],
)
def test_commands_reach_tokenmill_as_written_and_have_valid_keys(folder: str, commands: list[str], tmp_path: Path):
    calls = as_received(job_spec(ray_kinds(folder)[0])["entrypoint"], tmp_path)
    assert [call[0] for call in calls] == commands
    for command, *settings in calls:
        assert command in COMMANDS
        config = load_config(settings)
        assert command == "verify" or config.data.shards == "s3://BUCKET/photos-*.tar"


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_are_found_guarded_and_have_time_to_save(folder: str):
    manifests = render(MANIFESTS / folder)
    account = of_kind("ServiceAccount", manifests)["metadata"]["name"]
    for manifest in ray_kinds(folder):
        spec = cluster_spec(manifest)
        assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert pod["serviceAccountName"] == account
            assert pod["terminationGracePeriodSeconds"] >= 120
            assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
            assert pod["securityContext"]["runAsNonRoot"]
        assert all(container["image"].startswith("REGISTRY/") for container in containers(manifest))


def test_the_nightly_job_runs_on_the_same_cluster_as_the_others():
    nightly, tokenize = (cluster_spec(ray_kinds(folder)[0]) for folder in ("nightly", "tokenize"))
    assert nightly == tokenize


def test_a_job_of_kueue_has_a_fixed_number_of_workers():
    [job] = ray_kinds("kueue")
    spec = cluster_spec(job)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert not spec["enableInTreeAutoscaling"]
    assert job["spec"]["shutdownAfterJobFinishes"]
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_renders_the_same(folder: str):
    programs = {"kubectl": ["kubectl", "kustomize"], "kustomize": ["kustomize", "build"]}
    found = [command for name, command in programs.items() if shutil.which(name)]
    if not found:
        pytest.skip("needs kubectl or kustomize, which no PyPI package has")
    done = subprocess.run([*found[0], MANIFESTS / folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_kind = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}
    expected = {manifest["kind"]: manifest for manifest in render(MANIFESTS / folder)}
    for manifest in expected.values():  # kustomize leaves out empty annotations and labels
        manifest["metadata"] = {key: value for key, value in manifest["metadata"].items() if value}
    assert by_kind == expected


def test_core_kinds_fit_the_schema_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    account = of_kind("ServiceAccount", render(MANIFESTS / "account"))
    validate.validate(account, "1.31", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**account, "automount": True}, "1.31", strict=True)
