"""Batches for one training rank, decoded in background threads, with the position in the corpus after each batch."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from jobs.config import TrainConfig
from jobs.shards import DecodedSample, decode_sample
from pipeline.corpus.batches import map_in_threads, prefetch
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard
from pipeline.corpus.streams import Lanes, LaneSample, Position, is_storage_failure, training_samples
from pipeline.errors import ShardError
from tokenizer.modalities.base import Modality


@dataclass
class TrainBatch:
    """x: the model's input. samples: shard, index and key of each. positions: of the lanes, after this batch."""

    x: Tensor
    samples: list[dict[str, str | int]]
    positions: dict[int, Position]
    num_skipped: int  # samples that could not be decoded


@dataclass
class TrainingData:
    """The lanes of one rank and their positions. factor: of the net; sizes are multiples of it."""

    shards: list[Shard]
    options: TrainConfig
    modality: Modality
    factor: int
    rank: int
    world_size: int
    on_bad_shard: Callable[[ShardError], None]
    member: str = ""  # see decode_sample
    positions: dict[int, Position] = field(default_factory=dict)  # after the last batch that was trained on
    num_skipped: int = 0
    passed_over: collections.Counter[str] = field(default_factory=collections.Counter)  # see training_samples

    def __post_init__(self) -> None:
        self.lanes = Lanes.for_ranks(self.world_size, len(self.shards), self.options.shuffle_buffer, self.options.seed)

    def resume(self, lanes: Lanes, positions: dict[int, Position]) -> None:
        """Continues from the positions of all lanes of a run. Raises ValueError if it has fewer lanes than ranks."""
        lanes.check_enough_for(self.world_size)
        self.lanes = lanes
        self.positions = {lane: at for lane, at in positions.items() if lane % self.world_size == self.rank}

    def batches(self, pinned: bool) -> Iterator[TrainBatch]:
        """An endless stream, prefetched in threads. pinned: in page-locked memory, for asynchronous copies to a GPU."""
        return prefetch(self._make_batches(pinned), depth=2)

    def trained_on(self, batch: TrainBatch) -> None:
        """Moves the positions past this batch, so that the next checkpoint does not repeat it."""
        self.positions.update(batch.positions)
        self.num_skipped += batch.num_skipped

    def _make_batches(self, pinned: bool) -> Iterator[TrainBatch]:
        place = {"rank": self.rank, "world_size": self.world_size}
        stream = training_samples(
            self.shards,
            self.lanes,
            **place,
            positions=dict(self.positions),
            on_bad_shard=self.on_bad_shard,
            passed_over=self.passed_over,
        )
        arrays: list[np.ndarray] = []
        batch = TrainBatch(Tensor(), [], {}, 0)
        for array, drawn in map_in_threads(self._segment, stream, self.options.decode_threads):
            batch.positions[drawn.lane] = drawn.after
            if array is None:
                batch.num_skipped += 1
                continue
            arrays.append(array)
            batch.samples.append({"shard": drawn.shard, "index": drawn.sample.index, "key": drawn.sample.key})
            if len(arrays) == self.options.batch_size:
                batch.x = self.modality.batch(arrays, self.factor).x
                batch.x = batch.x.pin_memory() if pinned else batch.x
                yield batch
                arrays, batch = [], TrainBatch(Tensor(), [], {}, 0)

    def _segment(self, drawn: LaneSample) -> tuple[np.ndarray | None, LaneSample]:
        """A random segment of the sample, the same in every run; None if the sample cannot be decoded."""
        decoded = decode_sample(drawn.sample, self.modality, self.member)
        if not isinstance(decoded, DecodedSample):
            return None, drawn
        rng = np.random.default_rng([self.options.seed, drawn.before.epoch, drawn.lane, drawn.before.sample])
        return self.modality.segment(decoded.decoded.array, self.options.crop_size, rng), drawn


def fixed_samples(
    shards: list[Shard], modality: Modality, segment: int, count: int, member: str = ""
) -> list[tuple[str, np.ndarray]]:
    """Keys and segments of the first `count` samples that can be decoded, the same in every run over a corpus."""
    segments: list[tuple[str, np.ndarray]] = []
    for shard in shards:
        try:
            for sample in read_samples(shard.url):
                decoded = decode_sample(sample, modality, member)
                if isinstance(decoded, DecodedSample):
                    rng = np.random.default_rng(0)
                    segments.append((sample.key, modality.segment(decoded.decoded.array, segment, rng)))
                if len(segments) == count:
                    return segments
        except ShardError as error:  # training reports it when it reads this shard
            if is_storage_failure(error):
                break  # the next shard would take as long to fail
    return segments
