"""All latents of a cache, held by the actors of a pool, as the k-means of a codebook asks for them."""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeVar

import torch

from jobs.latent_cache import read_latents
from jobs.shard_pool import ShardPool, ShardWorker
from pipeline.reservoir import Reservoir
from pipeline.tokens import Output
from pipeline.tokens.entry import Commit
from tokenizer.latent_parts import Part

T = TypeVar("T")
Function = Callable[[Part], Part]
GROUPS = 128  # at most: as many sums come to the driver in an iteration, and as many workers can share it
HELD_BYTES = 2 * 2**30  # at most, of latents that a worker keeps in memory between two iterations


@dataclass(frozen=True)
class Group:
    """Neighbouring shards of a cache, whose latents are added up one after the other, always in this order."""

    name: str
    entries: tuple[Commit, ...]


class CachedLatents:
    """All latents of a cache, as the k-means of a codebook wants them. They stay with the workers that read them."""

    def __init__(self, pool: ShardPool, groups: list[Group], count: int, drawn: torch.Tensor):
        self.pool, self.groups, self.count, self.drawn = pool, groups, count, drawn
        self.functions: tuple[Function, ...] = ()
        self._numbers = itertools.count(1)
        self.number = 0  # of this view of the latents, by which workers know what they hold

    @classmethod
    def of(
        cls, entries: list[Commit], pool: ShardPool, dim: int, capacity: int, seed: int, num_groups: int = GROUPS
    ) -> "CachedLatents | None":
        """Those of these shards; None if there are none. capacity: of the sample that comes to the driver."""
        entries = sorted(entries, key=lambda entry: entry.source_shard)
        count = sum(entry.num_tokens for entry in entries) // dim
        if not count:
            return None
        size = math.ceil(len(entries) / num_groups)
        groups = [Group(entries[i].name, tuple(entries[i : i + size])) for i in range(0, len(entries), size)]
        share = capacity / count  # and five deviations more, so that hardly ever too few come back
        for below in (share + 5 * math.sqrt(share / count), 1.0):
            drawn = Reservoir(capacity, seed)
            for _, part in pool.map(groups, partial(tuple, ("draw", capacity, seed, below))):
                drawn.merge(part)
            if drawn.rows is not None and len(drawn.rows) >= min(capacity, count):
                break
        assert drawn.rows is not None
        return cls(pool, groups, count, torch.from_numpy(drawn.rows))

    def __len__(self) -> int:
        return self.count

    def sample(self, count: int, seed: int) -> Part:
        """Of the sample that was drawn at first, whose rows are in random order: more than that there is not."""
        return _through(self.functions, Part(self.drawn[:count]))

    def total(self, function: Callable[[Part], T]) -> T:
        """What the groups come to is added up in their order as it comes, so that few wait for one before them."""
        import ray

        work = ray.put((self.number, self.functions, function))
        early: dict[str, T] = {}
        waited_for = [group.name for group in self.groups]
        total: T | None = None
        for name, found in self.pool.map(self.groups, lambda: ("total", work)):
            early[name] = found
            while waited_for and waited_for[0] in early:
                part: Any = early.pop(waited_for.pop(0))
                total = part if total is None else total + part
        assert total is not None
        return total

    def mapped(self, function: Function) -> "CachedLatents":
        other = CachedLatents(self.pool, self.groups, self.count, self.drawn)
        other.functions, other._numbers = (*self.functions, function), self._numbers
        other.number = next(self._numbers)
        return other


class CacheReader(ShardWorker):
    """Totals over the latents of groups, of which it holds what it has room for. process gives (group's name, result).

    held_bytes: of latents in memory; without it, a quarter of this worker's share of the machine's.
    """

    def __init__(self, cache_url: str, dim: int, held_bytes: int | None = None, **resources: Any):
        super().__init__(**resources)
        self.cache, self.dim = Output.open(cache_url), dim
        self.room = _room(resources["num_cpus"]) if held_bytes is None else held_bytes
        self.held: dict[tuple[str, int], Part] = {}  # by shard and view

    def process(self, group: Group, task: str, *arguments: Any) -> tuple[str, Any]:
        return group.name, (self._draw if task == "draw" else self._total)(group, *arguments)

    @staticmethod
    def failed(shard: Any, reason: str) -> Any:
        raise RuntimeError(
            f"the latents of {shard.name} and its neighbours could not be read or summed: {reason}; is there memory "
            "enough for each worker, and workers.stall_timeout_s for the latents of one shard?"
        )

    def _draw(self, group: Group, capacity: int, seed: int, below: float) -> Reservoir:
        drawn = Reservoir(capacity, seed, below)
        for entry in group.entries:
            drawn.add(read_latents(self.cache, entry, self.dim), place=entry.source_shard)
            self.tick(group)
        return drawn

    def _total(self, group: Group, work: tuple[int, tuple[Function, ...], Callable[[Part], Any]]) -> Any:
        number, functions, function = work
        total = None
        for entry in group.entries:
            found = function(self._part(entry, number, functions))
            total = found if total is None else total + found
            self.tick(group)
        return total

    def _part(self, entry: Commit, number: int, functions: tuple[Function, ...]) -> Part:
        for name, other in list(self.held):
            if other not in (0, number):  # of an earlier view, which nobody will ask for again
                del self.held[name, other]
        if (entry.name, number) in self.held:
            return self.held[entry.name, number]
        raw = self.held.get((entry.name, 0))
        if raw is None:
            raw = Part(torch.from_numpy(read_latents(self.cache, entry, self.dim)).to(self.device))
        part = _through(functions, raw)
        if _num_bytes(part) + sum(map(_num_bytes, self.held.values())) <= self.room:
            self.held[entry.name, number] = part
        return part


def _through(functions: tuple[Function, ...], part: Part) -> Part:
    return reduce(lambda so_far, function: function(so_far), functions, part)


def _num_bytes(part: Part) -> int:
    return part.latents.nbytes + (0 if part.weights is None else part.weights.nbytes)


def _room(num_cpus: float) -> int:
    """A quarter of the share of this machine's memory that falls to so many of its CPUs, in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(HELD_BYTES, memory * num_cpus / (os.cpu_count() or 1) / 4))
