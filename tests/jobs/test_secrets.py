"""Values of environment variables, and secrets of URLs, stay out of what is saved."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.config import Config, ConfigError, StorageConfig, load_config
from jobs.config.secrets import take_url_secrets
from jobs.train import _claim

ROOT = Path(__file__).parents[2]

SHARDS = "s3://${oc.env:PLACE}/{0..9}.tar"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "s3cret")
    monkeypatch.setenv("STEPS", "7")


def load(tmp_path: Path, settings: dict[str, Any]) -> Config:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return load_config([str(tmp_path / "c.yaml")])


def test_a_variable_is_used_but_saved_as_it_is_written(tmp_path: Path):
    config = load(tmp_path, {"data": {"shards": SHARDS}, "output": "${oc.env:PLACE}/out"})
    assert (config.data.shards, config.output) == ("s3://s3cret/{0..9}.tar", "s3cret/out")
    saved = config.to_dict()
    assert (saved["data"]["shards"], saved["output"]) == (SHARDS, "${oc.env:PLACE}/out")
    assert "s3cret" not in str(saved)


def test_items_of_a_list_are_saved_as_they_are_written(tmp_path: Path):
    config = load(tmp_path, {"data": {"shards": ["a.tar", SHARDS]}})
    assert config.to_dict()["data"]["shards"] == ["a.tar", SHARDS]


def test_a_reference_to_a_variable_or_to_the_storage_options_is_saved_as_it_is_written(tmp_path: Path):
    settings = {"storage": {"options": {"s3": {"secret": "s3cret"}}}}
    settings |= {"run": "${oc.env:PLACE}", "output": "${run}/x", "tokenizer": "${storage.options.s3.secret}"}
    saved = load(tmp_path, settings).to_dict()
    assert [saved[key] for key in ("run", "output", "tokenizer")] == [
        settings[k] for k in ("run", "output", "tokenizer")
    ]


def test_other_references_and_numbers_are_saved_with_their_values(tmp_path: Path):
    settings = {
        "train": {"steps": "${oc.env:STEPS}", "warmup_steps": "${train.steps}"},
        "run": "x",
        "output": "${run}/y",
    }
    saved = load(tmp_path, settings).to_dict()
    assert (saved["train"]["steps"], saved["train"]["warmup_steps"], saved["output"]) == (7, 7, "x/y")


def test_a_variable_in_a_setting_that_must_be_saved_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train\.losses\.perceptual is \$\{oc\.env:PLACE\}.*write the value itself"):
        load(tmp_path, {"train": {"losses": {"perceptual": "${oc.env:PLACE}"}}})


def test_the_configuration_of_a_run_holds_what_is_written(tmp_path: Path):
    config = load(tmp_path, {"data": {"shards": SHARDS}})
    for _ in range(2):  # a rerun agrees with it
        _claim(f"{tmp_path}/run", config)
    saved = (tmp_path / "run/config.yaml").read_text()
    assert "${oc.env:PLACE}" in saved
    assert "s3cret" not in saved


def test_secrets_of_urls_leave_the_configuration():
    config = Config(run="https://me:s3cret@host/run", storage=StorageConfig(options={"s3": {"secret": "kept"}}))
    config.data.shards = ["https://host/x.tar?token=f00d"]
    config.compare.others = {"more": "s3://AKIA:a/b@bucket/*.tar"}
    secrets = take_url_secrets(config)
    assert secrets == {"https://host": "me:s3cret", "https://host/x.tar": "token=f00d", "s3://bucket": "AKIA:a/b"}
    assert (config.run, config.data.shards) == ("https://host/run", ["https://host/x.tar"])
    assert config.compare.others == {"more": "s3://bucket/*.tar"}
    assert config.storage.options == {"s3": {"secret": "kept"}}


def test_a_password_beside_a_variable_is_not_saved_either(tmp_path: Path):
    config = load(tmp_path, {"output": "https://me:passw0rd@host/${oc.env:PLACE}"})
    assert take_url_secrets(config) == {"https://host": "me:passw0rd"}
    assert config.to_dict()["output"] == "https://host/${oc.env:PLACE}"


def test_two_passwords_for_one_server_are_refused():
    config = Config(run="https://me:one@host/run", output="https://me:two@host/out")
    with pytest.raises(ConfigError, match="https://host is given with two different passwords"):
        take_url_secrets(config)


def test_the_traceback_of_an_unexpected_error_has_no_secrets(tmp_path: Path):
    """Of URLs, and of storage.options, wherever a library puts them."""
    code = """
import sys
from jobs.__main__ import main
from pipeline import storage
sys.argv = ["tokenmill", "--help"]
main()
url, _ = storage.without_secrets("s3://AKIA1:pass-of-url@bucket/x")
options = {"key": "key-of-options", "client_kwargs": {"aws_secret_access_key": "nested-secret"}}
storage.configure({"s3": options}, url_secrets={url: "user:pass-kept"})
raise RuntimeError(f"{options} s3://AKIA1:pass-of-url@bucket/x https://h/x?sig=sig-of-url user:pass-kept")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError" in done.stderr
    last = done.stderr[done.stderr.index("RuntimeError:") :]
    for secret in ("pass-of-url", "key-of-options", "nested-secret", "sig-of-url", "pass-kept"):
        assert secret not in last
