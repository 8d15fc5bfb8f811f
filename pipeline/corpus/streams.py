"""The endless stream of samples for each training rank. The corpus of a run is split into lanes; ranks share the lanes.

The lanes and the order of samples in each lane depend only on the seed. A run can therefore resume from the positions
of its lanes, even with a different number of ranks, without repeating or skipping a sample.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipeline.corpus.samples import Sample, read_samples
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError, StorageError

S = TypeVar("S")

LANES_PER_RANK = 8  # shards that a rank reads at the same time and mixes


@dataclass(frozen=True)
class Lanes:
    """How a corpus is split. shuffle_buffer: number of samples that one lane holds to draw from at random."""

    count: int
    shuffle_buffer: int
    seed: int = 0

    @classmethod
    def for_ranks(cls, world_size: int, num_shards: int, shuffle_buffer: int, seed: int) -> "Lanes":
        """shuffle_buffer: samples per rank. With fewer shards than lanes, every lane reads a part of each shard."""
        per_rank = min(LANES_PER_RANK, max(1, num_shards // world_size))
        return cls(per_rank * world_size, max(1, shuffle_buffer // per_rank), seed)

    def check_enough_for(self, world_size: int) -> None:
        """Raises ValueError if there are fewer lanes than ranks."""
        if self.count < world_size:
            raise ValueError(
                f"the corpus of this run is split into {self.count} lanes, too few for {world_size} workers; "
                f"set workers.count to {self.count} or fewer, or start a new run"
            )


@dataclass(frozen=True)
class Position:
    """The position of a lane: samples drawn in this epoch, and in total."""

    epoch: int = 0
    sample: int = 0
    total: int = 0


@dataclass(frozen=True)
class LaneSample:
    """A sample, the URL of its shard, its lane, and the position of the lane before and after the sample."""

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
    passed_over: collections.Counter[str] | None = None,
) -> Iterator[LaneSample]:
    """Yields the samples of a rank, from each of its lanes in turn. positions: of the lanes, when a run resumes.

    passed_over: counts the members that belong to no sample, in the first epoch. All ranks together count each once.
    A truncated shard yields the samples before the break. Raises ShardError if there are no samples at all,
    StorageError if a shard may become readable later, and ValueError if there are fewer lanes than ranks.
    """
    lanes.check_enough_for(world_size)
    mine = {
        lane: _read_lane(shards, lanes, lane, positions.get(lane, Position()), on_bad_shard, passed_over)
        for lane in range(rank, lanes.count, world_size)
    }
    totals = {lane: positions.get(lane, Position()).total for lane in mine}
    while True:
        # in turn, and balanced after the number of ranks has changed
        lane = min(totals, key=lambda one: (totals[one], one))
        drawn = next(mine[lane])
        totals[lane] = drawn.after.total
        yield drawn


def _read_lane(
    shards: list[Shard],
    lanes: Lanes,
    lane: int,
    position: Position,
    on_bad_shard: Callable[[ShardError], None],
    passed_over: collections.Counter[str] | None,
) -> Iterator[LaneSample]:
    """Yields the samples of one lane, epoch after epoch."""
    epoch, resumed, total = position.epoch, position.sample, position.total
    empty: set[int] = set()  # shards read since the last sample; those of a single epoch may all be broken
    while True:
        taken = 0
        mine = _shards_of_lane(len(shards), lanes, lane, epoch)
        counter = passed_over if epoch == 0 and (len(shards) >= lanes.count or lane == 0) else None
        for sample, shard in _shuffled(_read(shards, mine, lanes, lane, on_bad_shard, counter), lanes, lane, epoch):
            taken += 1
            if taken > resumed:
                before = Position(epoch, taken - 1, total)
                total += 1
                yield LaneSample(sample, shard, lane, before, Position(epoch, taken, total))
        empty = set() if taken else empty | set(mine)
        if len(empty) == len(shards):
            raise ShardError(f"none of the {len(shards)} shards has a readable sample; check data.shards")
        epoch, resumed = epoch + 1, 0


def _shards_of_lane(num_shards: int, lanes: Lanes, lane: int, epoch: int) -> list[int]:
    """Indices of the shards that this lane reads in this epoch: all of them if there are fewer shards than lanes."""
    order = np.random.default_rng([lanes.seed, epoch]).permutation(num_shards).tolist()
    return order if num_shards < lanes.count else order[lane :: lanes.count]


def _read(
    shards: list[Shard],
    mine: list[int],
    lanes: Lanes,
    lane: int,
    on_bad_shard: Callable[[ShardError], None],
    passed_over: collections.Counter[str] | None,
) -> Iterator[tuple[Sample, str]]:
    """Yields samples, each with the URL of its shard."""
    by_sample = len(shards) < lanes.count
    for index in mine:
        url = shards[index].url
        try:
            for sample in read_samples(url, passed_over=passed_over):
                if not by_sample or sample.index % lanes.count == lane:
                    yield sample, url
        except ShardError as error:
            if is_storage_failure(error):  # a resumed run would find samples there that this run skipped
                raise StorageError(str(error)) from error
            on_bad_shard(error)


def is_storage_failure(error: ShardError) -> bool:
    """Whether storage failed and the shard may be intact. Otherwise the shard itself is broken or missing."""
    cause = error.__cause__
    if isinstance(cause, StorageError | PermissionError):
        return True
    # decompressors also raise OSError, but without an errno
    return isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError)


def _shuffled(samples: Iterator[S], lanes: Lanes, lane: int, epoch: int) -> Iterator[S]:
    """Holds `shuffle_buffer` samples and yields a random one of them for each new sample."""
    rng = np.random.default_rng([lanes.seed, epoch, lane])
    size = max(1, lanes.shuffle_buffer)  # both 0 and 1 keep the order
    held: list[S] = []
    for sample in samples:
        if len(held) < size:
            held.append(sample)
            continue
        chosen = int(rng.integers(size))
        yield held[chosen]
        held[chosen] = sample
    yield from (held[i] for i in rng.permutation(len(held)))
