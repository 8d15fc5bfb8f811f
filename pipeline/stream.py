"""The samples of one training rank, without end, in an order that (seed, rank, world_size) alone decide."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ShardError
from pipeline.manifest import Shard
from pipeline.samples import Sample, read_samples

MAX_EMPTY_EPOCHS = 20  # a rank may be dealt nothing but bad shards in one epoch, but not in all of these


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
    has_all = share.world_size == 1 or len(shards) < share.world_size
    empty_epochs = 0
    while True:
        taken = 0
        for sample in _shuffled(_one_epoch(shards, share, epoch, on_bad_shard), share, epoch, shuffle_buffer):
            taken += 1
            if taken > resumed:
                yield sample, Position(epoch, taken - 1)
        empty_epochs = empty_epochs + 1 if taken == 0 else 0
        if empty_epochs >= (1 if has_all else MAX_EMPTY_EPOCHS):
            raise ShardError(f"rank {share.rank} finds no sample in {len(shards)} shards; is data.shards right?")
        epoch, resumed = epoch + 1, 0


def _one_epoch(
    shards: list[Shard], share: Share, epoch: int, on_bad_shard: Callable[[ShardError], None]
) -> Iterator[Sample]:
    order = np.random.default_rng([share.seed, epoch]).permutation(len(shards))
    by_sample = len(shards) < share.world_size
    mine = order if by_sample else order[share.rank :: share.world_size]
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
