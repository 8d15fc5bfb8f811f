"""The samples of one training rank, without end, in an order that (seed, rank, world_size) alone decide."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ShardError
from pipeline.manifest import Shard
from pipeline.samples import Sample, read_samples


@dataclass(frozen=True)
class Position:
    """Where a stream is: this many samples of this epoch were taken. Going on from it repeats and omits nothing."""

    epoch: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Share:
    """Whose part of the corpus: every shard goes to one rank; with fewer shards than ranks, every w-th sample does."""

    rank: int = 0
    world_size: int = 1
    seed: int = 0


def training_samples(
    shards: list[Shard],
    share: Share,
    *,
    shuffle_buffer: int,
    position: Position,
    on_bad_shard: Callable[[ShardError], None],
) -> Iterator[tuple[Sample, Position]]:
    """Each sample with the position before it. Shuffled across shards and within a buffer.

    A shard that breaks off gives the samples before the break. Raises ShardError if there are none at all.
    """
    epoch, resumed = position.epoch, position.sample
    fruitless: set[int] = set()  # shards read since the last sample: those of one epoch may all be bad
    while True:
        taken = 0
        mine = _dealt(len(shards), share, epoch)
        for sample in _shuffled(_read(shards, mine, share, on_bad_shard), share, epoch, shuffle_buffer):
            taken += 1
            if taken > resumed:
                yield sample, Position(epoch, taken - 1)
        fruitless = set() if taken else fruitless | set(mine)
        if len(fruitless) == len(shards):
            raise ShardError(f"rank {share.rank} finds no sample in {len(shards)} shards; is data.shards right?")
        epoch, resumed = epoch + 1, 0


def _dealt(num_shards: int, share: Share, epoch: int) -> list[int]:
    """The shards that this rank reads in this epoch: all of them where there are fewer than ranks."""
    order = np.random.default_rng([share.seed, epoch]).permutation(num_shards).tolist()
    return order if num_shards < share.world_size else order[share.rank :: share.world_size]


def _read(
    shards: list[Shard], mine: list[int], share: Share, on_bad_shard: Callable[[ShardError], None]
) -> Iterator[Sample]:
    by_sample = len(shards) < share.world_size
    for index in mine:
        try:
            for sample in read_samples(shards[index].url):
                if not by_sample or sample.index % share.world_size == share.rank:
                    yield sample
        except ShardError as error:
            on_bad_shard(error)


def _shuffled(samples: Iterator[Sample], share: Share, epoch: int, size: int) -> Iterator[Sample]:
    """Keeps `size` samples and gives out a random one of them for each that comes in."""
    rng = np.random.default_rng([share.seed, epoch, share.rank])
    size = max(1, size)  # 0 keeps the order, as 1 does
    held: list[Sample] = []
    for sample in samples:
        if len(held) < size:
            held.append(sample)
            continue
        chosen = int(rng.integers(size))
        yield held[chosen]
        held[chosen] = sample
    yield from (held[i] for i in rng.permutation(len(held)))
