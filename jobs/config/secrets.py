"""Keeps secrets out of what a command saves: those in URLs, and those that come from environment variables."""

import dataclasses
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from jobs.config.schema import Config, ConfigError
from pipeline.storage import without_secrets

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
# Their text decides ids and file names, or is compared with that of an earlier run, so it has to be saved.
SAVED = ("model", "quantizer", "data.preprocess", "train", "codebook", "metrics", "compare.methods")


def take_url_secrets(config: Config) -> dict[str, str]:
    """Removes passwords and signatures from all URLs of the configuration. Returns them, for `storage.configure`."""
    secrets: dict[str, str] = {}
    for field in dataclasses.fields(config):
        if field.name != "storage":
            setattr(config, field.name, _cleaned(getattr(config, field.name), secrets))
    config.written = {key: without_secrets(text)[0] for key, text in config.written.items()}
    return secrets


def _cleaned(value: Any, secrets: dict[str, str]) -> Any:
    """value without secrets in URLs, at any depth. Adds them to `secrets`. Raises ConfigError if two contradict."""
    if isinstance(value, str):
        url, found = without_secrets(value)
        for place, secret in found.items():
            if secrets.setdefault(place, secret) != secret:
                raise ConfigError(f"{place} is given with two different passwords or signatures; use one")
        return url
    if isinstance(value, dict):
        return {key: _cleaned(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, secrets) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            setattr(value, field.name, _cleaned(getattr(value, field.name), secrets))
    return value


def from_environment(merged: DictConfig) -> dict[str, str]:
    """Keys outside of `storage` whose text comes from the environment or from `storage`, and how they are written.

    Artifacts hold what is written, such as ${oc.env:NAME}. Numbers are no secrets and are saved. Raises ConfigError for
    keys whose value must be saved.
    """
    written = {key: text for key, text in _leaves(OmegaConf.to_container(merged, resolve=False)) if "${" in str(text)}
    found: dict[str, str] = {}
    while more := {key: text for key, text in written.items() if key not in found and _is_hidden(text, found)}:
        found |= more
    values = dict(_leaves(OmegaConf.to_container(merged, resolve=True)))
    texts = {key: text for key, text in found.items() if not key.startswith("storage.") and not _is_number(values[key])}
    for key, text in texts.items():
        if key.startswith(tuple(f"{section}." for section in SAVED)):
            raise ConfigError(f"{key} is {text}: its value is saved with the results, so write the value itself")
    return texts


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{prefix}[{i}]", inner) for i, inner in enumerate(value)]
    else:
        return [(prefix, value)]
    return [leaf for key, inner in pairs for leaf in _leaves(inner, key)]


def _is_hidden(text: str, found: dict[str, str]) -> bool:
    references = REFERENCE.findall(text)
    return "oc.env" in text or any(one in found or one.split(".")[0] == "storage" for one in references)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return str(value).lower() in ("true", "false", "none")
    return True
