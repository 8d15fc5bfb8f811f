"""All latents of a cache, held by the actors of a pool, as the k-means of a codebook asks for them."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from jobs.latent_cache import read_latents
from jobs.shard_pool import ShardPool, ShardWorker
from pipeline.reservoir import Reservoir
from pipeline.tokens import Output
from tokenizer.latent_parts import Part, add_up

T = TypeVar("T")
GROUPS = 128  # at most: as many sums come to the driver in an iteration, and as many workers can share it
HELD_BYTES = 2 * 2**30  # of latents that a worker keeps in memory between two iterations


@dataclass(frozen=True)
class Group:
    """Neighbouring shards of a cache, whose latents are added up together, always in this order."""

    name: str
    shards: tuple[tuple[str, str], ...]  # name and URL


class CachedLatents:
    """All latents of a cache, as the k-means of a codebook wants them. They stay with the workers that read them."""

    def __init__(self, pool: ShardPool, groups: list[Group], count: int, drawn: torch.Tensor, seed: int):
        self.pool, self.groups, self.count, self.drawn, self.seed = pool, groups, count, drawn, seed
        self.functions: tuple[Callable[[Part], Part], ...] = ()
        self._numbers = itertools.count(1)
        self.number = 0  # of this view of the latents, by which workers know what they hold

    @classmethod
    def of(
        cls, cache: Output, names: set[str], pool: ShardPool, dim: int, capacity: int, seed: int
    ) -> "CachedLatents | None":
        """Those of shards of these names; None if there are none. capacity: of the sample that comes to the driver."""
        entries = sorted((e for e in cache.commits() if e.name in names), key=lambda entry: entry.source_shard)
        count = sum(entry.num_tokens for entry in entries) // dim
        if not count:
            return None
        shards = [(entry.name, entry.source_shard) for entry in entries]
        size = math.ceil(len(shards) / GROUPS)
        groups = [Group(shards[i][0], tuple(shards[i : i + size])) for i in range(0, len(shards), size)]
        share = capacity / count  # and five deviations more, so that hardly ever too few come back
        for below in (share + 5 * math.sqrt(share / count), 1.0):
            drawn = Reservoir(capacity, seed)
            for _, part in pool.map(groups, partial(tuple, ("draw", capacity, seed, below))):
                drawn.merge(part)
            if drawn.rows is not None and len(drawn.rows) >= min(capacity, count):
                break
        assert drawn.rows is not None
        return cls(pool, groups, count, torch.from_numpy(drawn.rows), seed)

    def __len__(self) -> int:
        return self.count

    def sample(self, count: int, seed: int) -> Part:
        """Of the sample that was drawn at first: its rows are in random order."""
        part = Part(self.drawn[:count])
        for function in self.functions:
            part = function(part)
        return part

    def total(self, function: Callable[[Part], T]) -> T:
        import ray

        work = ray.put((self.number, self.functions, function))
        found = dict(self.pool.map(self.groups, lambda: ("total", work)))
        return add_up([found[group.name] for group in self.groups])

    def mapped(self, function: Callable[[Part], Part]) -> "CachedLatents":
        other = CachedLatents(self.pool, self.groups, self.count, self.drawn, self.seed)
        other.functions, other._numbers = (*self.functions, function), self._numbers
        other.number = next(self._numbers)
        return other


class CacheReader(ShardWorker):
    """Holds latents of its groups and totals over them. process gives (name of the group, result)."""

    def __init__(self, cache_url: str, dim: int, **resources: Any):
        super().__init__(**resources)
        self.cache, self.dim = Output.open(cache_url), dim
        self.held: dict[tuple[str, int], Part] = {}

    def process(self, group: Group, task: str, *arguments: Any) -> tuple[str, Any]:
        return group.name, (self._draw if task == "draw" else self._total)(group, *arguments)

    @staticmethod
    def failed(shard: Any, reason: str) -> Any:
        raise RuntimeError(f"the latents of {shard.name} and its neighbours could not be read: {reason}")

    def _draw(self, group: Group, capacity: int, seed: int, below: float) -> Reservoir:
        drawn = Reservoir(capacity, seed, below)
        for name, url in group.shards:
            drawn.add(read_latents(self.cache, name, self.dim), place=url)
            self.tick(group)
        return drawn

    def _total(self, group: Group, work: tuple[int, tuple[Callable[[Part], Part], ...], Callable[[Part], T]]) -> T:
        number, functions, function = work
        return function(self._part(group, number, functions))

    def _part(self, group: Group, number: int, functions: tuple[Callable[[Part], Part], ...]) -> Part:
        for name, other in list(self.held):
            if other not in (0, number):  # of an earlier view, which nobody will ask for again
                del self.held[name, other]
        if (group.name, number) in self.held:
            return self.held[group.name, number]
        part = self.held.get((group.name, 0)) or self._read(group)
        for function in functions:
            part = function(part)
            self.tick(group)
        return self._hold(group, number, part)

    def _read(self, group: Group) -> Part:
        rows = []
        for name, _ in group.shards:
            rows.append(read_latents(self.cache, name, self.dim))
            self.tick(group)
        return Part(torch.from_numpy(np.concatenate(rows)).to(self.device))

    def _hold(self, group: Group, number: int, part: Part) -> Part:
        """Keeps it for the next iteration, if there is room."""
        if _num_bytes(part) + sum(map(_num_bytes, self.held.values())) <= HELD_BYTES:
            self.held[group.name, number] = part
        return part


def _num_bytes(part: Part) -> int:
    return part.latents.nbytes + (0 if part.weights is None else part.weights.nbytes)
