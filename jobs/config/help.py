"""The output of `tokenmill --help` and `tokenmill COMMAND --help`. Imports neither torch nor ray, which are slow."""

import ast
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any

from jobs.config.schema import all_keys

REFERENCE = "docs/reference/configuration.md"
NAMED = {  # keys with a name: its package
    "quantizer": "tokenizer.quantizers",
    "model.net": "tokenizer.nets",
    "export.format": "jobs.exporting.formats",
}


def docstring(module: str) -> str:
    """The docstring of a module, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def names_in(package: str) -> list[str]:
    """The quantizers or nets in a package, without importing them. Each is a module with its name."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in modules if module.name != "base")


def shown(value: Any) -> str:
    """A default as one would type it in YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if value is None or value == "":
        return "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def command_help(command: str, module: str) -> str:
    keys = [key for key in all_keys() if command in key.commands]
    width = max(len(f"{key.name}={shown(key.default)}") for key in keys)
    lines = [
        f"  {f'{key.name}={shown(key.default)}':<{width}}  {_described(key.name, key.description)}" for key in keys
    ]
    return "\n".join(
        [
            f"Usage: tokenmill {command} [CONFIG ...] [key=value ...] [--print]",
            "",
            docstring(module),
            "",
            "CONFIG is a YAML file or the name of a shipped config, such as demo. Later files and key=value settings",
            "override earlier ones. --key sets a key to true. --print shows the merged configuration and stops.",
            "",
            f"Keys and defaults of {command}:",
            *lines,
            "",
            f"{REFERENCE} describes all keys, and the settings of each quantizer, net and modality.",
        ]
    )


def _described(name: str, description: str) -> str:
    if name not in NAMED:
        return description
    return f"{description}. Names: {', '.join(names_in(NAMED[name]))}"
