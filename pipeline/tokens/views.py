"""Several random crops of each sample, and where they lie.

View v of a key depends only on the seed, the key and v: not on the shard, the batch or the worker. Positions are drawn
relative to the free space, so a sample of another size or modality with the same key gets the same relative crop.
"""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from pipeline.tokens.fields import wrong_field

MAX_VIEWS = 2**15  # the column is int16
FRACTION = 2.0**-53  # of 53 bits, which a float64 holds exactly


class Place(NamedTuple):
    """Where a crop lies, and whether it is mirrored. top, left: shares of the free space, in [0, 1).

    A crop of `size` of `length` pixels starts at floor(share * (length - size + 1)). Audio uses top alone, as the share
    of time.
    """

    top: float
    left: float
    flip: bool


@dataclass(frozen=True)
class Views:
    """count: views per sample. crop: side of the square in pixels, or seconds of audio. flip: mirrors half of them."""

    count: int
    crop: float
    flip: bool
    seed: int

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Views":
        """Ignores fields that it does not know. Raises KeyError, TypeError or ValueError for values of no views."""
        views = cls(**{known.name: given[known.name] for known in fields(cls)})
        if wrong := wrong_field(views):
            raise ValueError(f"views.{wrong}")
        if not 1 <= views.count <= MAX_VIEWS:
            raise ValueError(f"views.count is {views.count}; it must be from 1 to {MAX_VIEWS}")
        return views

    def place(self, key: str, view: int) -> Place:
        """Where the view of that number lies in the sample with that key."""
        digest = hashlib.sha256(f"{self.seed} {view} {key}".encode()).digest()
        top, left = (int.from_bytes(digest[start : start + 8]) >> 11 for start in (0, 8))
        return Place(top * FRACTION, left * FRACTION, self.flip and bool(digest[16] & 1))
