"""All latents of a cache in Ray's object store, for k-means.

A Ray Data dataset of groups of shards is read once and materialised: its blocks stay on the nodes that read them, and
spill to disk if memory is short. Each iteration of k-means maps a function over them; only sums reach the driver.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, TypeVar

import torch

from jobs.actors.cluster import device_for
from jobs.actors.pool import configure
from jobs.config import WorkersConfig
from jobs.latents.cache import read_latents
from pipeline.errors import StorageError
from pipeline.reservoir import Reservoir
from pipeline.tokens import Commit, Output
from tokenizer.clustering.latents import LatentBatch

T = TypeVar("T")
Function = Callable[[LatentBatch], LatentBatch]
# The most groups: so many workers can share an iteration, and so many sums reach the driver. Float sums, and therefore
# the codebook's id, depend on it.
MAX_GROUPS = 128


@dataclass
class ShardGroup:
    """Neighbouring shards of a cache. Their latents are always added up in this order."""

    number: int
    entries: list[Commit]
    parts: list[LatentBatch] = field(default_factory=list)  # one per entry, once they are read


@dataclass
class GroupResult:
    """The value of a function for a group."""

    number: int
    value: Any


class CachedLatents:
    """All latents of a cache, in groups of shards. Implements tokenizer.clustering.latents.Latents."""

    def __init__(
        self, groups: Any, count: int, drawn: torch.Tensor, workers: WorkersConfig, functions: tuple[Function, ...] = ()
    ):
        self.groups, self.count, self.drawn, self.workers = groups, count, drawn, workers
        self.functions = functions  # already applied to the groups, but not yet to the drawn sample

    @classmethod
    def of(
        cls,
        cache: Output,
        entries: list[Commit],
        dim: int,
        capacity: int,
        seed: int,
        workers: WorkersConfig,
        num_groups: int = MAX_GROUPS,
    ) -> "CachedLatents | None":
        """The latents of these entries; None if there are none. capacity: size of the sample that the driver draws."""
        import ray.data

        entries = sorted(entries, key=lambda entry: entry.source_shard)
        count = sum(entry.num_tokens for entry in entries) // dim
        if not count:
            return None
        size = math.ceil(len(entries) / num_groups)
        starts = range(0, len(entries), size)
        rows = [{"value": ShardGroup(number, entries[start : start + size])} for number, start in enumerate(starts)]
        source = ray.data.from_items(rows, override_num_blocks=len(rows))
        configure(source.context)
        with _explained():
            groups = _map(source, partial(_read, cache.url, dim), workers).materialize()
        latents = cls(groups, count, torch.empty(0), workers)
        latents.drawn = latents._draw(capacity, seed)
        return latents

    def __len__(self) -> int:
        return self.count

    def sample(self, count: int, seed: int) -> LatentBatch:
        """The first rows of the sample that `of` drew, which are in random order. At most its capacity."""
        return reduce(lambda part, function: function(part), self.functions, LatentBatch(self.drawn[:count]))

    def total(self, function: Callable[[LatentBatch], T]) -> T:
        """Adds the sums of the groups in the groups' order, each as soon as the sums before it have arrived."""
        early: dict[int, Any] = {}
        total: Any = None
        num_added = 0
        for result in self._each(partial(_total, function)):
            early[result.number] = result.value
            while num_added in early:
                value = early.pop(num_added)
                total = value if total is None else total + value
                num_added += 1
        assert num_added
        assert not early
        return total

    def mapped(self, function: Function) -> "CachedLatents":
        with _explained():
            groups = _map(self.groups, partial(_change, function), self.workers).materialize()
        return CachedLatents(groups, self.count, self.drawn, self.workers, (*self.functions, function))

    def _draw(self, capacity: int, seed: int) -> torch.Tensor:
        share = capacity / self.count  # plus five standard deviations, so that too few rows are rare
        for below in (share + 5 * math.sqrt(share / self.count), 1.0):
            drawn = Reservoir(capacity, seed)
            for result in self._each(partial(_draw, capacity, seed, below)):
                drawn.merge(result.value)
            if drawn.rows is not None and len(drawn.rows) >= min(capacity, self.count):
                break
        assert drawn.rows is not None
        return torch.from_numpy(drawn.rows)

    def _each(self, function: Callable[[ShardGroup], Any]) -> Iterator[GroupResult]:
        """The function's value for each group, in the order in which the groups finish."""
        with _explained():
            for row in _map(self.groups, partial(_result, function), self.workers).iter_rows():
                yield row["value"]


def _map(groups: Any, function: Callable[[ShardGroup], Any], workers: WorkersConfig) -> Any:
    """Maps by tasks. Ray keeps their processes from one iteration to the next, with a GPU too (max_calls)."""
    import ray.data

    cpus, gpus = workers.cpus or 1, workers.gpus
    return groups.map(
        partial(_apply, function, cpus, gpus),
        compute=ray.data.TaskPoolStrategy(size=workers.count or None),
        num_cpus=cpus,
        **({"num_gpus": gpus, "max_calls": 0} if gpus else {}),
    )


def _apply(function: Callable[[ShardGroup], Any], cpus: float, gpus: float, row: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(cpus)))  # the last bit of a sum depends on it
    group, device = row["value"], device_for(gpus)
    return {"value": function(ShardGroup(group.number, group.entries, [part.to(device) for part in group.parts]))}


def _read(cache_url: str, dim: int, group: ShardGroup) -> ShardGroup:
    cache = Output.open(cache_url)
    parts = [LatentBatch(torch.from_numpy(read_latents(cache, entry, dim))) for entry in group.entries]
    return ShardGroup(group.number, group.entries, parts)


def _change(function: Function, group: ShardGroup) -> ShardGroup:
    return ShardGroup(group.number, group.entries, [function(part).to("cpu") for part in group.parts])


def _result(function: Callable[[ShardGroup], Any], group: ShardGroup) -> GroupResult:
    return GroupResult(group.number, function(group))


def _total(function: Callable[[LatentBatch], Any], group: ShardGroup) -> Any:
    return reduce(lambda total, value: total + value, map(function, group.parts))


def _draw(capacity: int, seed: int, below: float, group: ShardGroup) -> Reservoir:
    drawn = Reservoir(capacity, seed, below)
    for entry, part in zip(group.entries, group.parts, strict=True):
        drawn.add(part.latents.cpu().numpy(), entry.source_shard)
    return drawn


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        reason = next(line for line in reversed(str(error).splitlines()) if line.strip()).strip()
        raise StorageError(
            f"codebook.full: the cached latents could not be read or summed: {reason}. Check that the cache is "
            "complete and that each worker has enough memory, then rerun the same command"
        ) from error
