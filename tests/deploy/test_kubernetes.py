"""The manifests of deploy/kubernetes fit KubeRay's strict schemas, and their commands have valid keys."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.__main__ import COMMANDS
from jobs.config import load_config

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = ROOT / "deploy/kubernetes"
COMMAND_JOBS = ("train", "codebook", "tokenize", "verify")
SCHEMAS = {
    kind: json.loads((Path(__file__).parent / f"schemas/{kind}.v1.schema.json").read_text())
    for kind in ("RayJob", "RayCluster")
}


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` gives, for the fields that we use: resources, nameSuffix, images, `replace` patches."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization.keys() <= {"resources", "nameSuffix", "images", "patches"}
    found: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        place = folder / name
        found += render(place) if place.is_dir() else list(yaml.safe_load_all(place.read_text()))
    for manifest in found:
        manifest["metadata"]["name"] += kustomization.get("nameSuffix", "")
        for patch in kustomization.get("patches", []):
            if manifest["kind"] == patch["target"]["kind"]:
                replace(manifest, yaml.safe_load(patch["patch"]))
        for image in kustomization.get("images", []):
            for container in containers(manifest):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def replace(manifest: dict[str, Any], operations: list[dict[str, Any]]) -> None:
    for operation in operations:
        assert operation["op"] == "replace"
        *parents, last = operation["path"].strip("/").split("/")
        place: Any = manifest
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        assert last in place, f"{operation['path']} is not there, so kustomize would refuse to replace it"
        place[last] = operation["value"]


def containers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for inner in value for found in containers(inner)]
    if not isinstance(value, dict):
        return []
    return [*value.get("containers", []), *(found for inner in value.values() for found in containers(inner))]


def of_kind(kind: str, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


@pytest.mark.parametrize("name", COMMAND_JOBS)
def test_a_job_fits_the_schema_and_has_a_valid_command(name: str):
    job = of_kind("RayJob", render(MANIFESTS / name))
    jsonschema.validate(job, SCHEMAS["RayJob"])
    assert job["metadata"]["name"] == f"tokenmill-{name}"
    program, command, *settings = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("tokenmill", name)
    assert command in COMMANDS
    load_config([str(ROOT / word) if word.endswith(".yaml") else word for word in settings])
    assert all(container["image"].startswith("REGISTRY/") for container in containers(job))


def test_the_cluster_fits_the_schema():
    cluster = of_kind("RayCluster", render(MANIFESTS / "cluster"))
    jsonschema.validate(cluster, SCHEMAS["RayCluster"])
    assert [group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]] == ["gpu", "cpu"]


@pytest.mark.parametrize(
    "path", ["spec/entrypoynt", "spec/rayClusterSpec/authOptions/secret", "spec/deletionStrategy/deletionRules/0/when"]
)
def test_a_misspelled_field_is_found(path: str):
    job = of_kind("RayJob", render(MANIFESTS / "train"))
    *parents, last = path.split("/")
    place: Any = job
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[last] = "value"
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        jsonschema.validate(job, SCHEMAS["RayJob"])


@pytest.mark.parametrize("name", [*COMMAND_JOBS, "cluster"])
def test_every_cluster_asks_for_a_token_and_gives_pods_time_to_save(name: str):
    for manifest in render(MANIFESTS / name):
        if manifest["kind"] == "ServiceAccount":
            continue
        spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
            assert group["template"]["spec"]["volumes"][0]["emptyDir"]["medium"] == "Memory"


def test_core_kinds_fit_the_schema_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    account = of_kind("ServiceAccount", render(MANIFESTS / "job"))
    validate.validate(account, "1.31", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**account, "automount": True}, "1.31", strict=True)
