"""A uniform sample of rows that come from many places, the same however the places are dealt out to workers."""

import hashlib

import numpy as np


class Reservoir:
    """Keeps the `capacity` rows of lowest priority; priorities are random in 0..1, drawn from (seed, place).

    Two reservoirs merge into what one would hold that had seen the rows of both. below: rows of a higher priority are
    not kept, as where another reservoir holds enough of lower ones already.
    """

    def __init__(self, capacity: int, seed: int, below: float = 1.0):
        self.capacity, self.seed, self.below = capacity, seed, below
        self.rows: np.ndarray | None = None
        self.priorities = np.empty(0)

    def add(self, rows: np.ndarray, place: str) -> None:
        """rows [N, ...] of one place, which must be added whole, once."""
        rng = np.random.default_rng([self.seed, int(hashlib.sha256(place.encode()).hexdigest(), 16)])
        priorities = rng.random(len(rows))
        wanted = priorities < self.below
        self._keep(rows[wanted], priorities[wanted])

    @property
    def bound(self) -> float:
        """Rows of no lower priority cannot enter."""
        return float(self.priorities[-1]) if len(self.priorities) == self.capacity > 0 else self.below

    def merge(self, other: "Reservoir") -> None:
        if other.rows is not None:
            self._keep(other.rows, other.priorities)

    def _keep(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        if self.rows is not None:
            rows, priorities = np.concatenate([self.rows, rows]), np.concatenate([self.priorities, priorities])
        lowest = np.argsort(priorities, kind="stable")[: self.capacity]  # sorted: the order of merging leaves no trace
        self.rows, self.priorities = rows[lowest], priorities[lowest]
