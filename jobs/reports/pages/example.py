"""Samples that a report shows: the first ones of a corpus, and those with the best and the worst reconstructions."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from tokenizer.modalities.base import Modality


@dataclass
class Example:
    """An original and its reconstruction. views: both as PNGs. files: both as media files of type mime.

    tokens: in the shape of the token grid. metrics: of this sample.
    """

    key: str
    mime: str
    views: tuple[bytes, ...]
    files: tuple[bytes, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: np.ndarray | None = None


def example_of(
    modality: Modality,
    key: str,
    pair: Sequence[np.ndarray],
    metrics: dict[str, float] | None = None,
    tokens: np.ndarray | None = None,
) -> Example:
    """pair: the preprocessed arrays of the original and of its reconstruction."""
    views, files = tuple(map(modality.view, pair)), tuple(map(modality.to_bytes, pair))
    return Example(key, modality.mime, views, files, metrics or {}, tokens)


Ranked = tuple[float, str, Example]  # value, place in the corpus


@dataclass
class Extremes:
    """The `count` examples with the lowest and with the highest values. Ties are broken by the place in the corpus, so
    the result does not depend on the order in which samples come."""

    count: int
    low: list[Ranked] = field(default_factory=list)  # the lowest first
    high: list[Ranked] = field(default_factory=list)  # the highest first

    def offer(self, value: float, place: str, make: Callable[[], Example]) -> None:
        """make: called only if the example is kept. NaN has no rank."""
        if math.isnan(value):
            return
        for kept, sign in ((self.low, 1), (self.high, -1)):
            at = bisect.bisect([(sign * one[0], one[1]) for one in kept], (sign * value, place))
            if at < self.count:
                kept.insert(at, (value, place, make()))
                del kept[self.count :]

    def merge(self, other: "Extremes") -> None:
        for kept, sign, more in ((self.low, 1, other.low), (self.high, -1, other.high)):
            kept += more
            kept.sort(key=partial(_rank, sign))
            del kept[self.count :]


def _rank(sign: int, one: Ranked) -> tuple[float, str]:
    return sign * one[0], one[1]
