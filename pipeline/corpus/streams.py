"""The samples of training ranks, without end. A run's corpus is cut into lanes, which ranks read in turn.

Lanes and the order within each depend on the seed alone, so that a run goes on from where its lanes are, neither
repeating nor omitting a sample, with another number of ranks than before.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipeline.corpus.samples import Sample, read_samples
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError, StorageError

S = TypeVar("S")

LANES_PER_RANK = 8  # shards that a rank reads at a time: samples of that many are mixed


@dataclass(frozen=True)
class Lanes:
    """How a corpus is cut. shuffle_buffer: samples that one lane holds, of which it gives out a random one."""

    count: int
    shuffle_buffer: int
    seed: int = 0

    @classmethod
    def for_ranks(cls, world_size: int, num_shards: int, shuffle_buffer: int, seed: int) -> "Lanes":
        """shuffle_buffer: samples of a rank. With fewer shards than ranks every lane reads a part of each shard."""
        per_rank = min(LANES_PER_RANK, max(1, num_shards // world_size))
        return cls(per_rank * world_size, max(1, shuffle_buffer // per_rank), seed)

    def check_enough_for(self, world_size: int) -> None:
        """Raises ValueError if there are fewer lanes than ranks."""
        if self.count < world_size:
            raise ValueError(
                f"this run's corpus is cut into {self.count} lanes, too few for {world_size} workers; "
                f"set workers.count to {self.count} or fewer, or start a new run"
            )


@dataclass(frozen=True)
class Position:
    """Where a lane is: so many samples of this epoch were taken, and so many in all."""

    epoch: int = 0
    sample: int = 0
    total: int = 0


@dataclass(frozen=True)
class Drawn:
    """A sample, the URL of its shard, the lane that it comes from, and where that lane was before and is after it."""

    sample: Sample
    shard: str
    lane: int
    before: Position
    after: Position


def training_samples(
    shards: list[Shard],
    lanes: Lanes,
    *,
    rank: int = 0,
    world_size: int = 1,
    positions: Mapping[int, Position],
    on_bad_shard: Callable[[ShardError], None],
) -> Iterator[Drawn]:
    """What a rank draws from its lanes, each of them in turn. positions: of lanes that were read before.

    A shard that breaks off gives the samples before the break. Raises ShardError if there are none at all, StorageError
    if a shard could be read another time, and ValueError if there are fewer lanes than ranks.
    """
    lanes.check_enough_for(world_size)
    mine = {
        lane: _read_lane(shards, lanes, lane, positions.get(lane, Position()), on_bad_shard)
        for lane in range(rank, lanes.count, world_size)
    }
    totals = {lane: positions.get(lane, Position()).total for lane in mine}
    while True:
        lane = min(totals, key=lambda one: (totals[one], one))  # in turn, and even after the ranks have changed
        drawn = next(mine[lane])
        totals[lane] = drawn.after.total
        yield drawn


def _read_lane(
    shards: list[Shard], lanes: Lanes, lane: int, position: Position, on_bad_shard: Callable[[ShardError], None]
) -> Iterator[Drawn]:
    """The samples of one lane, epoch after epoch."""
    epoch, resumed, total = position.epoch, position.sample, position.total
    fruitless: set[int] = set()  # shards read since the last sample: those of one epoch may all be bad
    while True:
        taken = 0
        mine = _dealt(len(shards), lanes, lane, epoch)
        for sample, shard in _shuffled(_read(shards, mine, lanes, lane, on_bad_shard), lanes, lane, epoch):
            taken += 1
            if taken > resumed:
                before = Position(epoch, taken - 1, total)
                total += 1
                yield Drawn(sample, shard, lane, before, Position(epoch, taken, total))
        fruitless = set() if taken else fruitless | set(mine)
        if len(fruitless) == len(shards):
            raise ShardError(f"there is no sample in {len(shards)} shards; is data.shards right?")
        epoch, resumed = epoch + 1, 0


def _dealt(num_shards: int, lanes: Lanes, lane: int, epoch: int) -> list[int]:
    """The shards that this lane reads in this epoch: all of them where there are fewer than lanes."""
    order = np.random.default_rng([lanes.seed, epoch]).permutation(num_shards).tolist()
    return order if num_shards < lanes.count else order[lane :: lanes.count]


def _read(
    shards: list[Shard], mine: list[int], lanes: Lanes, lane: int, on_bad_shard: Callable[[ShardError], None]
) -> Iterator[tuple[Sample, str]]:
    """Samples, each with the URL of its shard."""
    by_sample = len(shards) < lanes.count
    for index in mine:
        url = shards[index].url
        try:
            for sample in read_samples(url):
                if not by_sample or sample.index % lanes.count == lane:
                    yield sample, url
        except ShardError as error:
            if is_of_storage(error):  # who goes on later would find samples there that were left out now
                raise StorageError(str(error)) from error
            on_bad_shard(error)


def is_of_storage(error: ShardError) -> bool:
    """Whether storage does not give what may be a sound shard; else the shard itself is broken, or gone."""
    cause = error.__cause__
    if isinstance(cause, StorageError | PermissionError):
        return True
    # decompressors raise OSErrors too, but without a number
    return isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError)


def _shuffled(samples: Iterator[S], lanes: Lanes, lane: int, epoch: int) -> Iterator[S]:
    """Keeps `shuffle_buffer` samples and gives out a random one of them for each that comes in."""
    rng = np.random.default_rng([lanes.seed, epoch, lane])
    size = max(1, lanes.shuffle_buffer)  # 0 keeps the order, as 1 does
    held: list[S] = []
    for sample in samples:
        if len(held) < size:
            held.append(sample)
            continue
        chosen = int(rng.integers(size))
        yield held[chosen]
        held[chosen] = sample
    yield from (held[i] for i in rng.permutation(len(held)))
