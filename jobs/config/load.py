"""YAML files and key=value overrides to one typed Config. Errors name the key and suggest the closest known one."""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jobs.config.renames import with_new_names
from jobs.config.schema import Config, ConfigError, TrainConfig, all_keys
from jobs.config.secrets import from_environment
from jobs.config.shipped import shipped_configs, with_methods_beside

CONFIGS = shipped_configs()


def load_config(arguments: list[str], *, models: bool = True) -> Config:
    """Merges files from left to right, then key=value overrides. Prints a notice for each old key name to stderr.

    A file is a path, or the name of a shipped config: see find_config. models: whether to type and check the settings
    of modality, net and quantizer, which imports torch. Raises ConfigError.
    """
    files = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    parts, notices = [], []
    for given in [*map(_read, files), _overrides(overrides)]:
        part, found = _with_new_names(given)
        check_shapes(part)
        parts.append(part)
        notices += found
    for notice in dict.fromkeys(notices):
        print(f"tokenmill: {notice}", file=sys.stderr)
    return _build(parts, models)


def with_method(config: Config, file: str, settings: dict[str, Any]) -> Config:
    """config with the quantizer and the other keys of a method's YAML file, then those of settings."""
    base = dataclasses.asdict(config)
    del base["quantizer"]  # it holds defaults of another method
    methods = [*([_read(file)] if file else []), OmegaConf.create(settings)]
    return _build([OmegaConf.create(base), *(_with_new_names(part)[0] for part in methods)])


def find_config(name: str) -> Path:
    """The YAML file at that path, else the shipped config of that name: demo, fsp or compare/quick. Raises ConfigError.

    A shipped config is also found by its path in the repository, such as configs/quantizers/fsp.yaml.
    """
    if Path(name).is_file():
        return Path(name)
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    shipped = {file: file.relative_to(CONFIGS).with_suffix("").as_posix() for file in sorted(CONFIGS.rglob("*.yaml"))}
    for file, path in shipped.items():
        if wanted in (path, file.stem):
            return file
    hint = _proposal(name, wanted, [file.stem for file in shipped])
    raise ConfigError(f"{name!r} is neither a YAML file, nor a shipped config, nor KEY=VALUE; {hint}")


def _proposal(name: str, wanted: str, shipped: list[str]) -> str:
    """What a word may mean that is no configuration: a key without its =, or a misspelled file."""
    if name in {key.name for key in all_keys()}:
        return f"did you mean {name}=...?"
    folder = Path(name).parent
    files = [str(folder / file.name) for file in folder.glob("*.yaml")] if folder.is_dir() else []
    near = difflib.get_close_matches(name, files, n=1) if "/" in name or "." in name else []
    near = near or difflib.get_close_matches(wanted.removesuffix(".yml"), shipped, n=1)
    return f"did you mean {near[0]}?" if near else f"shipped configs: {', '.join(shipped)}"


def check_shapes(part: DictConfig) -> None:
    """Raises ConfigError where a value of one file or of the command line has another shape than the schema, which
    OmegaConf would report without the key: a list in place of a section, or a number in place of a map."""
    _check_shape(OmegaConf.to_container(part, resolve=False), Config, "")  # type: ignore[arg-type]


def _check_shape(given: dict[str, Any], cls: type, prefix: str) -> None:
    for f in dataclasses.fields(cls):
        value = given.get(f.name)
        if value is None or (isinstance(value, str) and value.startswith("${")):
            continue
        name, kind = f"{prefix}{f.name}", str(f.type)
        if dataclasses.is_dataclass(f.type):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} is {value!r}; it must hold keys: {_names(f.type)}")
            _check_shape(value, f.type, f"{name}.")  # type: ignore[arg-type]
        elif kind.startswith("dict") and not isinstance(value, dict):
            example = f", such as {name}.name={value}" if f.name in ("quantizer", "net") else ""
            raise ConfigError(f"{name} is {value!r}; it must hold keys with values{example}")
        elif kind.startswith("list") and isinstance(value, dict):
            raise ConfigError(f"{name} is {value!r}; it must be a list, such as [a, b]")


def _with_new_names(part: DictConfig) -> tuple[DictConfig, list[str]]:
    given, notices = with_new_names(OmegaConf.to_container(part, resolve=False))  # type: ignore[arg-type]
    return OmegaConf.create(given), notices


def _build(parts: list[DictConfig], models: bool = True) -> Config:
    merged = OmegaConf.create({"train": dataclasses.asdict(TrainConfig())})  # so that ${train.steps} has a value always
    for part in parts:
        merged = _merge(merged, part)
    given = _resolved(merged)
    _refuse_unknown(given, Config, prefix="")
    config = _typed(Config, given, "")
    _refuse_nested(config)
    if models:
        _type_dicts(config)
    _refuse_extreme(dataclasses.asdict(config), "")
    config.written = from_environment(merged)
    return config


@contextlib.contextmanager
def checked(section: str) -> Iterator[None]:
    """Turns errors of building losses or metrics from settings into a ConfigError: unknown names, missing files or
    packages."""
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
    """Every key with its default."""
    return OmegaConf.to_yaml(OmegaConf.structured(Config))


def to_yaml(config: Config, command: str) -> str:
    """The keys that a command uses. storage.options is left out, since it may hold secrets."""
    given = OmegaConf.create()
    for key in all_keys():
        if command in key.commands and key.name != "storage.options":
            value: Any = functools.reduce(getattr, key.name.split("."), config)
            OmegaConf.update(given, key.name, value, force_add=True)
    return OmegaConf.to_yaml(given)


def _read(file: str) -> Any:
    try:
        loaded = OmegaConf.load(find_config(file))
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's errors share no useful base class
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file} must hold keys with values at the top level")
    return with_methods_beside(loaded, find_config(file).parent)


def _merge(merged: DictConfig, part: DictConfig) -> DictConfig:
    """part over merged. If part names another quantizer or net, the settings of the previous one are dropped."""
    for section in ("quantizer", "model.net"):
        try:
            name = OmegaConf.select(part, f"{section}.name")
        except OmegaConfBaseException as error:  # a variable that is not set
            raise ConfigError(f"{section}: {str(error).splitlines()[0]}") from error
        if name is not None and name != OmegaConf.select(merged, f"{section}.name"):
            OmegaConf.update(merged, section, {}, merge=False, force_add=True)
    result = OmegaConf.merge(merged, part)
    assert isinstance(result, DictConfig)
    return result


def _overrides(texts: list[str]) -> DictConfig:
    """Values stay text, so that a key 0002 does not become 2. The type of the field converts them later."""
    given = OmegaConf.create()
    lists = {one.name for one in all_keys() if isinstance(one.default, list)}
    for text in texts:
        key, value = text.split("=", 1)
        if not all(key.split(".")):
            raise ConfigError(f"{text!r} has an empty key; write KEY=VALUE, such as train.steps=1000")
        parsed = _parsed(value, text)
        if key in lists and isinstance(parsed, str) and not parsed.startswith("${"):
            parsed = [parsed]  # a single value: decode.keys=a is decode.keys=[a]
        try:
            OmegaConf.update(given, key, parsed, force_add=True)
        except (OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"{text}: {_in_words(error)}") from error
    return given


def _parsed(value: str, text: str) -> Any:
    """Text, or a list or a map of text. Braces that are not a map are a pattern of shards."""
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
            raise ConfigError(f"unknown key {prefix}{key}; {_hint(str(key), list(known), prefix)}")
        kind = known[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is {value!r}; it must hold keys: {_names(kind)}")
            _refuse_unknown(value, kind, f"{prefix}{key}.")  # type: ignore[arg-type]


def _hint(key: str, known: list[str], prefix: str) -> str:
    """The closest key of the section, else of any section."""
    here = {name: prefix + name for name in known}
    anywhere = {one.name.rsplit(".", 1)[-1]: one.name for one in all_keys()}
    for names, cutoff in ((here, 0.7), (anywhere, 0.7), (here, 0.5)):
        if near := difflib.get_close_matches(key, names, n=1, cutoff=cutoff):
            return f"did you mean {names[near[0]]}?"
    return f"known keys: {', '.join(known)}"


def _names(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _typed(cls: type, given: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass, with every value of its field's type. Raises ConfigError that names the key."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), given))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
        raise ConfigError(f"{prefix}{key}{_in_words(error)}") from error
    except (ValueError, TypeError) as error:  # from a __post_init__
        raise ConfigError(str(error)) from error


KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def _in_words(error: Exception) -> str:
    """What OmegaConf reports, without the names of its classes. Follows the key."""
    first = str(error).splitlines()[0]
    value = re.match(r"Value (.*) (?:of type '.*' could not be converted to|is not a valid) (\w+)", first)
    return f" is {value[1]}; it must be {KINDS.get(value[2], value[2])}" if value else f": {first}"


def _refuse_nested(section: Any, prefix: str = "") -> None:
    """Raises ConfigError for lists and dicts within a list of text or numbers, which OmegaConf lets through."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _refuse_nested(value, f"{prefix}{field.name}.")
        elif isinstance(value, list) and typing.get_args(field.type) in ((str,), (int,), (float,)):
            for inner in (inner for inner in value if isinstance(inner, list | dict)):
                raise ConfigError(f"{prefix}{field.name} holds {inner!r}; its items must be single values")


def _refuse_extreme(value: Any, name: str) -> None:
    """Raises ConfigError for nan, inf and numbers beyond 64 bits, at any depth: they pass most checks of a range."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_extreme(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _refuse_extreme(inner, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name} is {value}; it must be a number of 64 bits")


def _type_dicts(config: Config) -> None:
    """Types the dicts that the schema leaves open. The names in the configuration say which fields they have."""
    from tokenizer.modalities.base import MODALITIES  # these import torch, and --help should not wait for that
    from tokenizer.nets.base.net import NETS
    from tokenizer.quantizers.base.quantizer import QUANTIZERS

    try:
        modality = MODALITIES.get(config.model.modality)
        config.quantizer = _named(QUANTIZERS, config.quantizer, "quantizer.")
        config.model.net = _named(NETS, config.model.net, "model.net.")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config.data.preprocess = _fields(modality.Config, config.data.preprocess, "data.preprocess.")
    config.data.shards = _shards(config.data.shards, "data.shards")
    config.compare.heldout = _shards(config.compare.heldout, "compare.heldout")
    config.compare.others = {
        name: _shards(one, f"compare.others.{name}") for name, one in config.compare.others.items()
    }
    config.metrics, config.train.losses = _plain(config.metrics), _plain(config.train.losses)
    config.codebook.settings, config.storage.options = _plain(config.codebook.settings), _plain(config.storage.options)


def typed_preprocess(modality: str, given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Settings of a modality, with their types. Raises ConfigError that names the key."""
    from tokenizer.modalities.base import MODALITIES

    typed = _fields(MODALITIES.get(modality).Config, given, prefix)
    return {key: typed[key] for key in given}


def _shards(value: Any, name: str) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(shard, str) for shard in value)):
        return value
    raise ConfigError(f"{name} is {value!r}; it must be a path, a glob, braces, or a list of them")


def _plain(value: Any) -> Any:
    """Converts text that is a number or true or false in YAML, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    read = yaml.safe_load(value) if value else value
    return read if isinstance(read, bool | int | float) else value


def _named(registry: Any, given: dict[str, Any], prefix: str) -> dict[str, Any]:
    if "name" not in given:
        raise ConfigError(f"{prefix}name is not set; choose one of: {', '.join(registry.names())}")
    cls = registry.get(given["name"])
    fields = {key: _plain(value) if isinstance(value, dict) else value for key, value in given.items() if key != "name"}
    return {"name": given["name"], **_fields(cls.Config, fields, prefix)}


def _fields(cls: type, given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """given with the types and defaults of a Config. Raises ConfigError that names the key."""
    _refuse_unknown(given, cls, prefix)
    return dataclasses.asdict(_typed(cls, given, prefix))
