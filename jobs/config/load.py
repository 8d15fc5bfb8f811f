"""YAML files and key=value overrides to one typed Config. Mistakes name the key and its nearest neighbour."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jobs.config.schema import Config, ConfigError, TrainConfig
from jobs.config.shipped import with_methods_beside
from tokenizer.modalities.base import MODALITIES
from tokenizer.nets.base.net import NETS
from tokenizer.quantizers.base.quantizer import QUANTIZERS


def load_config(arguments: list[str]) -> Config:
    """Files merge left to right, then key=value overrides. Raises ConfigError."""
    files = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    return _build([*map(_read, files), _overrides(overrides)])


def with_method(config: Config, file: str, settings: dict[str, Any]) -> Config:
    """config with the quantizer, and what else it says, of a method's YAML file and then of settings."""
    base = dataclasses.asdict(config)
    del base["quantizer"]  # whose defaults were filled in for another method
    parts = [OmegaConf.create(base), *([_read(file)] if file else []), OmegaConf.create(settings)]
    return _build(parts)  # type: ignore[arg-type]


def _build(parts: list[DictConfig]) -> Config:
    merged = OmegaConf.create({"train": dataclasses.asdict(TrainConfig())})  # so that ${train.steps} has a value always
    for part in parts:
        merged = _merge(merged, part)
    given = _resolved(merged)
    _refuse_unknown(given, Config, prefix="")
    for name in ("metrics", "train.losses", "codebook.settings", "storage.options"):
        *sections, key = name.split(".")
        section = given.setdefault(sections[0], {}) if sections else given
        section[key] = _plain(section.get(key, {}))  # no type reads these: an override is text so far
    config = _typed(Config, given, "")
    _check_named(config)
    return config


@contextlib.contextmanager
def checked(section: str) -> Iterator[None]:
    """Settings that name a distance or its weights: what is unknown, missing or not installed becomes a ConfigError."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"(?:unexpected keyword|multiple values for) argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ConfigError(f"{section}.{unknown[1]}: there is no such setting") from error
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"{section}: {error}") from error


def defaults_yaml() -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(Config))


def _read(file: str) -> Any:
    if not Path(file).is_file():
        raise ConfigError(f"{file!r} is neither a YAML file nor KEY=VALUE")
    try:
        loaded = OmegaConf.load(file)
    except Exception as error:  # PyYAML's errors share no useful base class
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file} must hold keys and values")
    return with_methods_beside(loaded, Path(file).parent)


def _merge(merged: DictConfig, part: DictConfig) -> DictConfig:
    """part over merged. Another quantizer or net starts from its own defaults: the settings of the old mean nothing."""
    for section in ("quantizer", "model.net"):
        name = OmegaConf.select(part, f"{section}.name")
        if name is not None and name != OmegaConf.select(merged, f"{section}.name"):
            OmegaConf.update(merged, section, {}, merge=False, force_add=True)
    result = OmegaConf.merge(merged, part)
    assert isinstance(result, DictConfig)
    return result


def _overrides(texts: list[str]) -> DictConfig:
    """Values stay the text that was typed, so that a key 0002 is not 2; each field's type reads it later."""
    given = OmegaConf.create()
    for text in texts:
        key, value = text.split("=", 1)
        OmegaConf.update(given, key, _parsed(value, text), force_add=True)
    return given


def _parsed(value: str, text: str) -> Any:
    """[lists] and {maps} of text, else text. Braces that are no map are a pattern of shards."""
    if not value.startswith(("[", "{")):
        return value
    try:
        parsed = yaml.load(value, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        if value.startswith("{"):
            return value
        raise ConfigError(f"{text} is not KEY=VALUE: {' '.join(str(error).split())}") from error
    return value if isinstance(parsed, dict) and "" in parsed.values() else parsed


def _resolved(merged: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _refuse_unknown(given: dict[str, Any], cls: type, prefix: str) -> None:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are: {', '.join(known)}"
            raise ConfigError(f"unknown key {prefix}{key}; {hint}")
        kind = known[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is {value!r}; it must hold keys: {_names(kind)}")
            _refuse_unknown(value, kind, f"{prefix}{key}.")  # type: ignore[arg-type]


def _names(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _typed(cls: type, given: dict[str, Any], prefix: str) -> Any:
    """An instance of a dataclass, every value of its field's type. Raises ConfigError that names the key."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), given))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
        raise ConfigError(f"{prefix}{key}: {str(error).splitlines()[0]}") from error
    except (ValueError, TypeError) as error:  # from a __post_init__
        raise ConfigError(str(error)) from error


def _check_named(config: Config) -> None:
    """quantizer, model.net and data.preprocess, whose fields depend on a name."""
    try:
        modality = MODALITIES.get(config.model.modality)
        config.quantizer = _named(QUANTIZERS, config.quantizer, "quantizer.")
        config.model.net = _named(NETS, config.model.net, "model.net.")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _refuse_unknown(config.data.preprocess, modality.Config, "data.preprocess.")
    config.data.preprocess = dataclasses.asdict(_typed(modality.Config, config.data.preprocess, "data.preprocess."))
    shards = config.data.shards
    if not (isinstance(shards, str) or (isinstance(shards, list) and all(isinstance(s, str) for s in shards))):
        raise ConfigError(f"data.shards is {shards!r}; it must be a path, a glob, braces, or a list of them")


def _plain(value: Any) -> Any:
    """Text that YAML reads as a number or a truth value becomes that, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    read = yaml.safe_load(value) if value else value
    return read if isinstance(read, bool | int | float) else value


def _named(registry: Any, given: dict[str, Any], prefix: str) -> dict[str, Any]:
    if "name" not in given:
        raise ConfigError(f"{prefix}name is not set; there are: {', '.join(registry.names())}")
    cls = registry.get(given["name"])
    fields = {key: _plain(value) if isinstance(value, dict) else value for key, value in given.items() if key != "name"}
    _refuse_unknown(fields, cls.Config, prefix)
    return {"name": given["name"], **dataclasses.asdict(_typed(cls.Config, fields, prefix))}
