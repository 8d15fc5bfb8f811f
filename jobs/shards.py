"""Reads a shard into batches of decoded samples, and encodes these to rows of tokens or latents."""

import collections
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from jobs.config import TokensConfig
from jobs.stopwatch import Stopwatch
from pipeline.corpus.batches import in_buckets, map_in_threads, prefetch
from pipeline.corpus.samples import Sample, read_samples
from pipeline.corpus.shards import Shard
from pipeline.tokens import Quarantined, TokenRow
from pipeline.tokens.schema import passthrough_notes
from pipeline.tokens.views import Views
from tokenizer.encoder import LatentEncoder
from tokenizer.errors import BadSample
from tokenizer.memory import is_out_of_memory, release_memory
from tokenizer.modalities.base import Decoded, Modality

R = TypeVar("R")
TICK_S = 5.0  # while waiting for the device


@dataclass
class EncodedShard:
    """All rows of a shard in its order, the quarantined samples, and how many samples the reader counted.

    seconds: read and decode, summed over the threads that run beside the encoder; wait, for data; queue, for the
    device while another shard has it; encode; total. notes: as in Commit.
    """

    rows: list[TokenRow]
    quarantined: list[Quarantined]
    num_samples: int
    seconds: dict[str, float]
    notes: dict[str, int] = field(default_factory=dict)


def encode_shard(
    shard: Shard,
    encoder: LatentEncoder,
    options: TokensConfig,
    device_lock: "threading.Lock | None" = None,
    tick: Callable[[], None] = lambda: None,
    *,
    only: Collection[int] | None = None,
    member: str = "",
    views: Views | None = None,
) -> EncodedShard:
    """Reads, decodes and encodes a shard: to tokens if encoder is a tokenizer, else to latents.

    device_lock: held while a batch is encoded. tick: called for each sample read, for each batch encoded, and while
    another shard has the device. only: indices of the samples to encode; the others are counted and skipped.
    member: the member of each sample to encode; empty for its only one. views: the crops of each sample; None for the
    whole sample. A sample with a view that cannot be encoded is quarantined as a whole.

    Raises ShardError if the shard cannot be read to its end.
    """
    device_lock = device_lock or threading.Lock()
    reader = ShardReader(shard, encoder.modality, options, only=only, tick=tick, member=member, views=views)
    rows: list[TokenRow] = []
    watch = Stopwatch()
    for batch in reader.batches():
        watch.lap("wait")
        while not device_lock.acquire(timeout=TICK_S):
            tick()
        try:
            watch.lap("queue")
            rows += encode_batch(batch, encoder, options.passthrough, reader.quarantined)
            watch.lap("encode")
        finally:
            device_lock.release()
        tick()
    watch.lap("wait")
    rows, quarantined = (rows, reader.quarantined) if views is None else _whole_samples(rows, reader.quarantined)
    seconds = {"read": reader.read_s, "decode": reader.decode_s, **watch.seconds, "total": sum(watch.seconds.values())}
    return EncodedShard(
        sorted(rows, key=lambda row: row.place),
        quarantined,
        reader.num_samples,
        {stage: round(spent, 4) for stage, spent in seconds.items()},
        reader.notes | passthrough_notes(rows, options.passthrough),
    )


def _whole_samples(rows: list[TokenRow], quarantined: list[Quarantined]) -> tuple[list[TokenRow], list[Quarantined]]:
    """Quarantines a sample once if any of its views is in quarantine, and drops its other views."""
    first: dict[int, Quarantined] = {}
    for one in quarantined:
        first.setdefault(one.source_index, one)
    return [row for row in rows if row.source_index not in first], list(first.values())


@dataclass
class DecodedSample:
    """A sample and the array that its bytes decode to. view: the number of the crop; None for the whole sample."""

    sample: Sample
    decoded: Decoded
    view: int | None = None


class ShardReader:
    """One pass over a shard. The counts are complete once the last batch was taken.

    passed_over: members that belong to no sample, by what they are. decode_notes: what was not used of decoded samples.
    notes: both, as in Commit.
    quarantined: samples that could not be decoded. num_samples: all that were read, skipped and quarantined ones too.
    read_s, decode_s: seconds; decode_s is summed over all threads. only: indices of the samples to decode; the others
    are counted, but neither decoded nor quarantined. tick: called for each sample read. member: see decode_sample.
    views: the crops to make of each sample; None for the whole sample.
    """

    def __init__(
        self,
        shard: Shard,
        modality: Modality,
        options: TokensConfig,
        *,
        only: Collection[int] | None = None,
        tick: Callable[[], None] = lambda: None,
        member: str = "",
        views: Views | None = None,
    ):
        self.member, self.views = member, views
        self.shard, self.options, self.only, self.tick = shard, options, only, tick
        self.modality = modality.with_limits(options.limits())
        self.quarantined: list[Quarantined] = []
        self.passed_over: collections.Counter[str] = collections.Counter()
        self.decode_notes: collections.Counter[str] = collections.Counter()
        self.num_samples = 0
        self.read_s = self.decode_s = 0.0

    @property
    def notes(self) -> dict[str, int]:
        return passed_over_notes(self.passed_over) | {f"samples: {note}": n for note, n in self.decode_notes.items()}

    def batches(self) -> Iterator[list[DecodedSample]]:
        """Batches of one shape each, read and decoded in threads beside the caller's work.

        They depend on the shard and the options alone, never on workers or timing. Raises ShardError, also if the
        shard has changed since it was listed.
        """
        modality = self.modality
        budget = modality.elements(self.options.batch_budget or modality.default_budget)
        batches = in_buckets(self._decoded(), lambda one: one.decoded.array, modality.bucket, budget)
        yield from prefetch(batches)

    def _decoded(self) -> Iterator[DecodedSample]:
        wanted = (sample for sample in self._samples() if self.only is None or sample.index in self.only)
        for outcome, seconds in map_in_threads(self._decode, wanted, self.options.decode_threads):
            self.decode_s += seconds
            if isinstance(outcome, Quarantined):
                self.quarantined.append(outcome)
                continue
            for one in outcome:
                self.decode_notes.update(one.decoded.notes)
                yield one

    def _samples(self) -> Iterator[Sample]:
        passed_over = self.passed_over if self.only is None else None  # else the first pass has counted them
        samples = read_samples(self.shard.url, self.shard.version, passed_over=passed_over)
        while True:
            start = time.monotonic()
            sample = next(samples, None)
            self.read_s += time.monotonic() - start
            if sample is None:
                return
            self.num_samples += 1
            self.tick()
            yield sample

    def _decode(self, sample: Sample) -> tuple[list[DecodedSample] | Quarantined, float]:
        start = time.monotonic()
        whole = decode_sample(sample, self.modality, self.member, self.options.max_sample_bytes)
        outcome = whole if isinstance(whole, Quarantined) else crop_views(whole, self.modality, self.views)
        return outcome, time.monotonic() - start


def passed_over_notes(passed_over: Mapping[str, int]) -> dict[str, int]:
    """As sentences. passed_over: members that belong to no sample, by what they are."""
    return {f"members passed over: {what}": count for what, count in passed_over.items()}


def decode_sample(
    sample: Sample, modality: Modality, member: str = "", max_bytes: int = 0
) -> DecodedSample | Quarantined:
    """Decodes the sample's member of that name, or if it is empty its one member of this modality.

    A sample without it, or with a bad one, is quarantined. max_bytes: of all members together; larger samples are
    quarantined too. 0: no limit.
    """
    if sample.quarantine_reason:
        return Quarantined(sample.key, sample.index, "read", "BadSample", sample.quarantine_reason)
    num_bytes = sum(map(len, sample.members.values()))
    try:
        if max_bytes and num_bytes > max_bytes:
            raise BadSample(f"its files have {num_bytes} bytes, more than tokens.max_sample_bytes={max_bytes}")
        name = member or _only_medium(sample, modality)
        if name not in sample.members:
            raise BadSample(f"has no member {name} (data.member); it has {_members(sample)}")
        return DecodedSample(sample, modality.read(sample.members[name], name.rsplit(".", 1)[-1]))
    except BadSample as error:
        return _undecoded(sample, error)


def crop_views(whole: DecodedSample, modality: Modality, views: Views | None) -> list[DecodedSample] | Quarantined:
    """The views of a decoded sample, in their order; without views the sample itself."""
    if views is None:
        return [whole]
    sample, decoded, length = whole.sample, whole.decoded, modality.view_length(views.crop)
    try:
        array, note = modality.enlarged(decoded.array, length)
    except BadSample as error:
        return _undecoded(sample, error)
    places = [views.place(sample.key, view) for view in range(views.count)]
    crops = [Decoded(modality.crop(array, length, place), decoded.size) for place in places]
    crops[0].notes = [*decoded.notes, *([note] if note else [])]  # once per sample
    return [DecodedSample(sample, crop, view) for view, crop in enumerate(crops)]


def _undecoded(sample: Sample, error: BadSample) -> Quarantined:
    return Quarantined(sample.key, sample.index, "decode", type(error.__cause__ or error).__name__, str(error))


def _only_medium(sample: Sample, modality: Modality) -> str:
    media = [name for name in sample.members if name.rsplit(".", 1)[-1] in modality.extensions]
    if not media:
        raise BadSample(f"needs one member of {', '.join(modality.extensions)}; it has {_members(sample)}")
    if len(media) > 1:
        raise BadSample(f"has several {modality.name} members: {', '.join(media)}; set data.member to one of them")
    return media[0]


def _members(sample: Sample) -> str:
    return ", ".join(sample.members) or "nothing"


def encode_batch(
    batch: list[DecodedSample], encoder: LatentEncoder, passthrough: Sequence[str], quarantined: list[Quarantined]
) -> list[TokenRow]:
    """A row of tokens or latents for each sample. Samples that cannot be encoded are added to quarantined.

    passthrough: extensions of the members that become columns.
    """

    def encode(samples: list[DecodedSample]) -> list[np.ndarray]:
        return encoder.encode_batch([one.decoded.array for one in samples])

    rows = []
    for one, grid in apply_or_quarantine(encode, batch, quarantined):
        sample = one.sample
        kept = {name: sample.members[name] for name in passthrough if name in sample.members}
        rows.append(TokenRow(sample.key, sample.index, grid, one.decoded.size, kept, one.view))
    return rows


def apply_or_quarantine(
    function: Callable[[list[DecodedSample]], Sequence[R]], batch: list[DecodedSample], quarantined: list[Quarantined]
) -> list[tuple[DecodedSample, R]]:
    """Each sample of the batch with its result.

    function: takes a batch; raises BadSample if one of its samples is bad. Then it is applied to each sample alone, so
    that only the bad ones are quarantined. If memory runs out, it is applied to each half of the batch; a sample that
    does not fit alone is quarantined.
    """
    try:
        return list(zip(batch, function(batch), strict=True))
    except BadSample as error:
        reason, message, size = "BadSample", str(error), 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason, size = type(error).__name__, (len(batch) + 1) // 2
        message = f"not enough memory to encode it: {' '.join(str(error).split())[:200]}"
    # here the error is gone, and with it what its frames held
    if reason != "BadSample":
        release_memory()
    if len(batch) > 1:
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        return [pair for part in parts for pair in apply_or_quarantine(function, part, quarantined)]
    sample, view = batch[0].sample, batch[0].view
    message = message if view is None else f"view {view}: {message}"
    quarantined.append(Quarantined(sample.key, sample.index, "encode", reason, message))
    return []
