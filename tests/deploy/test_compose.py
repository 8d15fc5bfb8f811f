"""deploy/compose fits the published schema of compose files, and its services work together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.corpus import write_corpus
from tests.faults.cluster import without_ray
from tests.jobs.helpers import save_tiny_tokenizer

ROOT = Path(__file__).parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())
SCHEMA = json.loads((Path(__file__).parent / "schemas/compose-spec.json").read_text())
ALONE = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
# an address like that of a container, since Ray does not offer loopback to other nodes
PREPARE = """set -e
ip link set lo up; ip addr add 10.77.0.1/24 dev lo; ip route add default dev lo
mount --bind "$1" /etc/hosts; mount --bind "$2" /tmp/ray; shift 2; exec "$@"
"""


def check(compose: dict) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(compose)


def test_the_file_fits_the_schema_of_compose():
    check(COMPOSE)


@pytest.mark.parametrize("name", ["comand", "depend_on"])
def test_a_misspelled_field_is_found(name: str):
    services = {**COMPOSE["services"], "head": {**COMPOSE["services"]["head"], name: []}}
    with pytest.raises(jsonschema.ValidationError, match=f"{name}. was unexpected"):
        check({**COMPOSE, "services": services})


def test_nothing_is_published_beyond_this_machine():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.ray
@pytest.mark.s3
def test_the_services_tokenize_and_verify(tmp_path: Path):
    if subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces (unshare --mount --net --pid), such as that of root, and `ip`")
    tokenizer = save_tiny_tokenizer(tmp_path / "tiny")
    write_corpus(tmp_path / "in", (3, 2))
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 storage head prometheus grafana\n")
    (tmp_path / "ray").mkdir()
    Path("/tmp/ray").mkdir(exist_ok=True)  # the place of the volume; other programs' files there stay out of sight
    lab = [sys.executable, "-m", "tests.deploy.compose_lab", str(tmp_path), tokenizer, f"{tmp_path}/in/*.tar"]
    command = [*ALONE, "bash", "-c", PREPARE, "bash", str(tmp_path / "hosts"), str(tmp_path / "ray"), *lab]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**without_ray(os.environ), "PATH": path, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=280).returncode
    printed = (tmp_path / "log").read_text(errors="replace")
    assert code == 0, printed[-5000:]
    assert "tokenize: 5 samples in 2 of 2 shards" in printed
