"""Configuration keys that were renamed. The old names still work."""

import copy
from typing import Any

from jobs.config.schema import ConfigError

RENAMED: dict[str, tuple[str, ...]] = {  # old name: new names
    "train.accumulate": ("train.grad_accum_steps",),
    "train.segment": ("train.crop_size",),
    "train.evaluate_every": ("train.reconstruct_every",),
    "train.pictures": ("train.num_examples",),
    "train.collapse_below": ("train.collapse.perplexity",),
    "train.collapse_steps": ("train.collapse.patience",),
    "train.collapse_stops": ("train.collapse.stop",),
    "compare.pictures": ("compare.num_examples",),
    "source": ("pack.source",),
    "shards": ("pack.shards",),
    "samples_per_shard": ("pack.samples_per_shard",),
    "shuffle_seed": ("pack.shuffle_seed",),
    "keys": ("decode.keys",),
    "limit": ("decode.limit", "evaluate.num_examples"),  # one key was used by both commands
    "to": ("decode.output",),
    "deep": ("verify.deep",),
    "repair": ("verify.repair",),
    "json": ("status.json",),
}


def with_new_names(given: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of given with new names only, and a notice for each old name that it had.

    Raises ConfigError where a key has both its old and its new name.
    """
    given, notices = copy.deepcopy(given), []
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        section = given.get(sections[0]) if sections else given
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        for key in new:
            _put(given, key, value, old)
        notices.append(f"{old} is now {' and '.join(new)}; the old name still works")
    return given, notices


def _put(given: dict[str, Any], key: str, value: Any, old: str) -> None:
    *sections, name = key.split(".")
    section = given
    for part in sections:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{part} is {section!r}; it must hold keys, such as {key}")
    if name in section:
        raise ConfigError(f"{old} is the old name of {key}; give only {key}")
    section[name] = value
