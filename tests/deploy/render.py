"""Manifests as `kubectl kustomize` gives them, for the fields of kustomization.yaml that deploy/kubernetes uses.

It runs where kubectl is missing. Where it is not, tests/deploy/test_kubernetes.py compares the two.
"""

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
FIELDS = {"resources", "images", "patches"}


def render(folder: Path) -> list[Manifest]:
    """The manifests of a folder with a kustomization.yaml."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization.keys() <= FIELDS, f"{folder}: {kustomization.keys() - FIELDS}"
    found = [manifest for name in kustomization["resources"] for manifest in _resource(folder, name)]
    for manifest in found:
        for patch in kustomization.get("patches", []):
            if manifest["kind"] == patch["target"]["kind"]:
                _patch(manifest, yaml.safe_load(patch["patch"]), **patch.get("options", {}))
        for image in kustomization.get("images", []):
            for container in containers(manifest):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def _resource(folder: Path, name: str) -> list[Manifest]:
    place = folder / name
    if place.is_dir():
        return render(place)
    assert "/" not in name, f"{folder}: kustomize refuses files of other folders, such as {name}"
    return list(yaml.safe_load_all(place.read_text()))


def _patch(manifest: Manifest, operations: list[dict[str, Any]], allowNameChange: bool = False) -> None:
    """JSON Patch (RFC 6902) without `move`, `copy`, `test` and additions to lists."""
    for operation in operations:
        assert allowNameChange or operation["path"] != "/metadata/name", "kustomize would refuse the new name"
        *parents, last = (part.replace("~1", "/") for part in operation["path"].strip("/").split("/"))
        place: Any = manifest
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        assert (last in place) == (operation["op"] != "add"), f"{operation['op']} {operation['path']}"
        if operation["op"] == "remove":
            del place[last]
        else:
            place[last] = operation["value"]


def containers(value: Any) -> list[dict[str, Any]]:
    """All containers inside of a manifest."""
    if isinstance(value, list):
        return [found for inner in value for found in containers(inner)]
    if not isinstance(value, dict):
        return []
    return [*value.get("containers", []), *(found for inner in value.values() for found in containers(inner))]


def of_kind(kind: str, manifests: list[Manifest]) -> Manifest:
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found
