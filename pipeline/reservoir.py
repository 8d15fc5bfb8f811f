"""A uniform sample of rows from many sources, which does not depend on how the sources are split among workers."""

import hashlib

import numpy as np


class Reservoir:
    """Keeps the `capacity` rows with the lowest priorities. Priorities are random in 0..1, seeded by (seed, source).

    Merging two reservoirs gives the reservoir that has seen the rows of both. below: rows with a priority of at least
    this are dropped; use it if another reservoir already holds enough rows with lower priorities.
    """

    def __init__(self, capacity: int, seed: int, below: float = 1.0):
        self.capacity, self.seed, self.below = capacity, seed, below
        self.rows: np.ndarray | None = None
        self.priorities = np.empty(0)

    def add(self, rows: np.ndarray, source: str) -> None:
        """rows: [N, ...], all rows of one source. Add each source once."""
        rng = np.random.default_rng([self.seed, int(hashlib.sha256(source.encode()).hexdigest(), 16)])
        priorities = rng.random(len(rows))
        wanted = priorities < self.below
        self._keep(rows[wanted], priorities[wanted])

    @property
    def bound(self) -> float:
        """Only rows with a lower priority than this can still enter."""
        return float(self.priorities[-1]) if len(self.priorities) == self.capacity > 0 else self.below

    def merge(self, other: "Reservoir") -> None:
        if other.rows is not None:
            self._keep(other.rows, other.priorities)

    def _keep(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        if self.rows is not None:
            rows, priorities = np.concatenate([self.rows, rows]), np.concatenate([self.priorities, priorities])
        lowest = np.argsort(priorities, kind="stable")[
            : self.capacity
        ]  # sorted, so the order of merging does not matter
        self.rows, self.priorities = rows[lowest], priorities[lowest]
