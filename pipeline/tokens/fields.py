"""Checks values that were read from JSON against the annotated types of a dataclass."""

from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin


def wrong_field(value: Any) -> str | None:
    """What is wrong with the first field of a dataclass that does not have its type, in words; None if all do."""
    for known in fields(value):
        given = getattr(value, known.name)
        if not _fits(given, known.type):
            expected = known.type.__name__ if isinstance(known.type, type) else str(known.type)
            return f"{known.name} is {given!r}, not {expected}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is float:
        return type(value) in (int, float)
    return kind is Any or type(value) is kind
