"""Batches of one training rank, decoded beside its work, with the place in the corpus after each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from jobs.config import TrainConfig
from jobs.shards import Item, decode_sample
from pipeline.corpus.batches import map_in_threads, prefetch
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard
from pipeline.corpus.streams import Drawn, Lanes, Position, is_of_storage, training_samples
from pipeline.errors import ShardError
from tokenizer.modalities.base import Modality


@dataclass
class Batch:
    """x as the model takes it, the samples in it, where its lanes are after it, and how many bad ones were skipped."""

    x: Tensor
    samples: list[dict[str, str | int]]  # shard, index, key
    after: dict[int, Position]
    num_bad: int


@dataclass
class TrainingData:
    """The lanes of one rank, and where they are. factor: of the net, of which sizes are multiples."""

    shards: list[Shard]
    options: TrainConfig
    modality: Modality
    factor: int
    rank: int
    world_size: int
    on_bad_shard: Callable[[ShardError], None]
    positions: dict[int, Position] = field(default_factory=dict)  # after the batches that were `taken`
    num_bad: int = 0

    def __post_init__(self) -> None:
        self.lanes = Lanes.for_ranks(self.world_size, len(self.shards), self.options.shuffle_buffer, self.options.seed)

    def go_on(self, lanes: Lanes, everywhere: dict[int, Position]) -> None:
        """From where all lanes of a run are, whichever rank had them. Raises ValueError if they are too few."""
        lanes.check_enough_for(self.world_size)
        self.lanes = lanes
        self.positions = {lane: at for lane, at in everywhere.items() if lane % self.world_size == self.rank}

    def batches(self, pinned: bool) -> Iterator[Batch]:
        """Without end, made ahead in threads. pinned: in memory from which a GPU copies by itself."""
        return prefetch(self._make_batches(pinned), depth=2)

    def taken(self, batch: Batch) -> None:
        """The batch was trained on: a checkpoint from now on comes after it."""
        self.positions.update(batch.after)
        self.num_bad += batch.num_bad

    def _make_batches(self, pinned: bool) -> Iterator[Batch]:
        place = {"rank": self.rank, "world_size": self.world_size}
        stream = training_samples(
            self.shards, self.lanes, **place, positions=dict(self.positions), on_bad_shard=self.on_bad_shard
        )
        arrays: list[np.ndarray] = []
        batch = Batch(Tensor(), [], {}, 0)
        for array, drawn in map_in_threads(self._segment, stream, self.options.decode_threads):
            batch.after[drawn.lane] = drawn.after
            if array is None:
                batch.num_bad += 1
                continue
            arrays.append(array)
            batch.samples.append({"shard": drawn.shard, "index": drawn.sample.index, "key": drawn.sample.key})
            if len(arrays) == self.options.batch_size:
                batch.x = self.modality.batch(arrays, self.factor).x
                batch.x = batch.x.pin_memory() if pinned else batch.x
                yield batch
                arrays, batch = [], Batch(Tensor(), [], {}, 0)

    def _segment(self, drawn: Drawn) -> tuple[np.ndarray | None, Drawn]:
        """A random piece of the sample, the same in every run; None if the sample is bad."""
        item = decode_sample(drawn.sample, self.modality)
        if not isinstance(item, Item):
            return None, drawn
        rng = np.random.default_rng([self.options.seed, drawn.before.epoch, drawn.lane, drawn.before.sample])
        return self.modality.segment(item.decoded.array, self.options.crop_size, rng), drawn


def fixed_samples(shards: list[Shard], modality: Modality, segment: int, count: int) -> list[tuple[str, np.ndarray]]:
    """Key and a piece of the first `count` sound samples of a corpus: the same ones in every run over it."""
    found: list[tuple[str, np.ndarray]] = []
    for shard in shards:
        try:
            for sample in read_samples(shard.url):
                item = decode_sample(sample, modality)
                if isinstance(item, Item):
                    rng = np.random.default_rng(0)
                    found.append((sample.key, modality.segment(item.decoded.array, segment, rng)))
                if len(found) == count:
                    return found
        except ShardError as error:  # training has told of it, or will
            if is_of_storage(error):
                break  # the next one would take as long to fail
    return found
