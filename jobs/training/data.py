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
from pipeline.tokens import Quarantined
from tokenizer.modalities.base import Modality

GIVE_UP_AFTER = 1000  # samples, if none of them can be decoded
LISTED = 1000  # skipped samples that a rank remembers, to name them in the report
SampleRecord = dict[str, str | int]  # shard, index, key; for a skipped sample also its reason


class NoGoodSample(ValueError):
    """No sample of the corpus can be decoded."""


@dataclass
class TrainBatch:
    """x: the model's input. positions: of the lanes, after this batch. skipped: samples that could not be decoded, each
    only in the first pass over the corpus."""

    x: Tensor
    samples: list[SampleRecord]
    positions: dict[int, Position]
    skipped: list[SampleRecord]


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
    positions: dict[int, Position] = field(default_factory=dict)  # after the last batch that was trained on
    num_skipped: int = 0  # different samples, in all
    skipped: list[SampleRecord] = field(default_factory=list)  # the first of them

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
        self.num_skipped += len(batch.skipped)
        self.skipped += batch.skipped[: LISTED - len(self.skipped)]

    def _make_batches(self, pinned: bool) -> Iterator[TrainBatch]:
        place = {"rank": self.rank, "world_size": self.world_size}
        stream = training_samples(
            self.shards, self.lanes, **place, positions=dict(self.positions), on_bad_shard=self.on_bad_shard
        )
        arrays: list[np.ndarray] = []
        batch = TrainBatch(Tensor(), [], {}, [])
        bad = _BadSamples(len(range(self.rank, self.lanes.count, self.world_size)))
        for outcome, drawn in map_in_threads(self._crop, stream, self.options.decode_threads):
            batch.positions[drawn.lane] = drawn.after
            about: SampleRecord = {"shard": drawn.shard, "index": drawn.sample.index, "key": drawn.sample.key}
            if isinstance(outcome, Quarantined):
                if drawn.before.epoch == 0:  # later passes meet the same ones again
                    batch.skipped.append({**about, "reason": outcome.message})
                bad.add(outcome.message, drawn)
                continue
            bad.clear()
            arrays.append(outcome)
            batch.samples.append(about)
            if len(arrays) == self.options.batch_size:
                batch.x = self.modality.batch(arrays, self.factor).x
                batch.x = batch.x.pin_memory() if pinned else batch.x
                yield batch
                arrays, batch = [], TrainBatch(Tensor(), [], {}, [])

    def _crop(self, drawn: LaneSample) -> tuple[np.ndarray | Quarantined, LaneSample]:
        """A random crop of the sample, the same in every run, or why the sample cannot be decoded."""
        decoded = decode_sample(drawn.sample, self.modality)
        if not isinstance(decoded, DecodedSample):
            return decoded, drawn
        rng = np.random.default_rng([self.options.seed, drawn.before.epoch, drawn.lane, drawn.before.sample])
        return self.modality.segment(decoded.decoded.array, self.options.crop_size, rng), drawn


class _BadSamples:
    """The bad samples of a rank since its last good one."""

    def __init__(self, num_lanes: int):
        self.num_lanes, self.any_good = num_lanes, False
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first: dict[int, Position] = {}  # by lane: the position of the first of them
        self.passed: set[int] = set()  # lanes whose samples have all been read since then

    def add(self, reason: str, drawn: LaneSample) -> None:
        """Raises NoGoodSample after a pass over the corpus without a good sample, or after GIVE_UP_AFTER samples if
        there was none before."""
        self.reasons[reason] += 1
        first = self.first.setdefault(drawn.lane, drawn.before)
        if drawn.before.epoch > first.epoch + (first.sample > 0):
            self.passed.add(drawn.lane)
        if len(self.passed) < self.num_lanes and (self.any_good or self.reasons.total() < GIVE_UP_AFTER):
            return
        commonest = "; ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(3))
        raise NoGoodSample(
            f"none of the last {self.reasons.total()} samples can be decoded ({commonest}); check data.shards, "
            "model.modality and data.preprocess"
        )

    def clear(self) -> None:
        self.any_good = True
        if self.first:
            self.reasons.clear()
            self.first.clear()
            self.passed.clear()


def fixed_samples(shards: list[Shard], modality: Modality, segment: int, count: int) -> list[tuple[str, np.ndarray]]:
    """Keys and segments of the first `count` samples that can be decoded, the same in every run over a corpus."""
    segments: list[tuple[str, np.ndarray]] = []
    for shard in shards:
        try:
            for sample in read_samples(shard.url):
                decoded = decode_sample(sample, modality)
                if isinstance(decoded, DecodedSample):
                    rng = np.random.default_rng(0)
                    segments.append((sample.key, modality.segment(decoded.decoded.array, segment, rng)))
                if len(segments) == count:
                    return segments
        except ShardError as error:  # training reports it when it reads this shard
            if is_storage_failure(error):
                break  # the next shard would take as long to fail
    return segments
