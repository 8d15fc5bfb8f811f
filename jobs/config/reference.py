"""Writes docs/reference/configuration.md from the schema: `python -m jobs.config.reference`."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from jobs.__main__ import COMMANDS
from jobs.config.help import REFERENCE, shown
from jobs.config.renames import RENAMED
from jobs.config.schema import Config, Key, all_keys
from tokenizer.modalities.base import MODALITIES
from tokenizer.nets.base.net import NETS
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.registry import Registry

FILE = Path(__file__).parents[2] / REFERENCE
DETAILS = {"quantizer": "quantizers", "model.net": "nets", "data.preprocess": "modalities"}  # key to section
HEAD = """# Configuration reference

`python -m jobs.config.reference` generates this page from `jobs/config/schema.py`. Do not edit it by hand.

A configuration is one or more YAML files and `key=value` settings on the command line:

```
tokenmill train configs/demo.yaml train.steps=100 run=runs/short
```

Files merge from left to right, and settings on the command line override them. `${train.steps}` in a value refers to
another key. `demo` finds the shipped file `configs/demo.yaml`, and `fsp` finds `configs/quantizers/fsp.yaml`.
`--print` shows the merged configuration and stops. An unknown key or a value of the wrong type is an error (exit code
2).
"""


def main() -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(reference())
    print(f"wrote {FILE}")


def reference() -> str:
    """The whole page."""
    parts = [HEAD, *_commands(), *_sections()]
    for key, registry, kind in (("quantizer", QUANTIZERS, "Quantizers"), ("model.net", NETS, "Nets")):
        parts += [f"## {kind}\n", f"`{key}.name` selects one. The other keys of `{key}` are its settings.\n"]
        parts += [_settings(key, name, cls) for name, cls in _shipped(registry)]
    parts += ["## Modalities\n", "`model.modality` selects one. The keys of `data.preprocess` are its settings.\n"]
    parts += [_settings("data.preprocess", name, cls) for name, cls in _shipped(MODALITIES)]
    return "\n".join([*parts, _old_names()])


def _commands() -> Iterator[str]:
    yield "## Commands and their keys\n"
    yield _table(["command", "what it does", "keys"], [_command(name) for name in COMMANDS])


def _command(name: str) -> list[str]:
    used = [key for key in all_keys() if name in key.commands]
    groups = []
    for section, keys in groupby(used, _section):
        names, all_names = [key.name for key in keys], [key.name for key in all_keys() if _section(key) == section]
        groups += [f"[`{section}.*`](#{section})"] if section and names == all_names else [f"`{one}`" for one in names]
    return [f"`{name}`", COMMANDS[name][1], ", ".join(groups)]


def _section(key: Key) -> str:
    return key.name.split(".")[0] if "." in key.name else ""


def _sections() -> Iterator[str]:
    yield "## Keys\n"
    top = [key for key in all_keys() if not _section(key)]
    yield _table(["key", "default", "description", "commands"], [_row(key) for key in top])
    for field in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(field.type):
            continue
        keys = [key for key in all_keys() if _section(key) == field.name]
        yield f"### {field.name}\n"
        yield f"{_sentence(field.metadata['description'])} {_text(field.type)}".rstrip() + "\n"
        yield _table(["key", "default", "description", "commands"], [_row(key) for key in keys])


def _row(key: Key) -> list[str]:
    more = f". See [below](#{DETAILS[key.name]})" if key.name in DETAILS else ""
    return [
        f"`{key.name}`",
        f"`{shown(key.default)}`",
        f"{key.description}{more}",
        ", ".join(key.commands),
    ]


def _settings(key: str, name: str, cls: Any) -> str:
    """One quantizer, net or modality: what it is, and its fields."""
    about = inspect.getdoc(importlib.import_module(cls.__module__)) or ""
    notes = _comments(cls.Config)
    rows = [
        [f"`{key}.{field.name}`", f"`{shown(value)}`", notes.get(field.name, "")]
        for field, value in zip(dataclasses.fields(cls.Config), _defaults(cls.Config), strict=True)
    ]
    parts = [f"### {name}\n", about.split("\n\n")[0] + "\n"]
    parts += [text + "\n"] if (text := _text(cls.Config)) else []
    return "\n".join([*parts, _table(["key", "default", "description"], rows)])


def _defaults(cls: Any) -> list[Any]:
    made = cls()
    return [getattr(made, field.name) for field in dataclasses.fields(cls)]


def _comments(cls: type) -> dict[str, str]:
    """Field to the comment at the end of its line, from the source of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, comment in re.findall(r"^    (\w+): [^\n#]*  # (.+)$", inspect.getsource(base), flags=re.MULTILINE):
            found[name] = comment
    return found


def _text(cls: Any) -> str:
    """The docstring of a dataclass that has one of its own."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _shipped(registry: Registry[Any]) -> list[tuple[str, Any]]:
    """Name and class of each entry of the registry's own package; others may be registered beside them."""
    entries = [(name, registry.get(name)) for name in registry.names()]
    return [(name, cls) for name, cls in entries if cls.__module__.startswith(f"{registry.package}.")]


def _old_names() -> str:
    rows = [[f"`{old}`", " and ".join(f"`{key}`" for key in new)] for old, new in RENAMED.items()]
    head = "## Old names\n\nThese names still work; a command prints a notice for each.\n"
    return "\n".join([head, _table(["old name", "new name"], rows)])


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)


if __name__ == "__main__":
    main()
