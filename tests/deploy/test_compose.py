"""deploy/compose fits the published schema of compose files."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())
SCHEMA = json.loads((Path(__file__).parent / "schemas/compose-spec.json").read_text())


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
