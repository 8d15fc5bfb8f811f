"""Sequences of tokens for language models: packed into blocks, and mixed from several datasets."""

from typing import Any

from pipeline.sequences.orders import flatten, unflatten

__all__ = ["Mixed", "Packed", "flatten", "mix", "pack", "unflatten"]


def __getattr__(name: str) -> Any:
    # imported on first use: both subclass torch's IterableDataset, and importing torch takes seconds
    if name in ("Packed", "pack"):
        from pipeline.sequences import packed

        return getattr(packed, name)
    if name in ("Mixed", "mix"):
        from pipeline.sequences import mixed

        return getattr(mixed, name)
    raise AttributeError(name)
