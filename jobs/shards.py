"""A shard to batches of decoded samples, and those to rows of tokens or latents."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from jobs.config import TokensConfig
from pipeline.corpus.batches import in_buckets, map_in_threads, prefetch
from pipeline.corpus.samples import Sample, read_samples
from pipeline.corpus.shards import Shard
from pipeline.tokens import Quarantined, TokenRow
from pipeline.tokens.schema import passthrough_value
from tokenizer.encoder import LatentEncoder
from tokenizer.errors import BadSample
from tokenizer.modalities.base import Decoded, Modality

R = TypeVar("R")
TICK_S = 5.0  # while waiting for the device


@dataclass
class EncodedShard:
    """All rows of a shard in its order, what went to quarantine, and how many samples the reader counted.

    seconds: read and decode are sums over the threads that run beside the encoder. wait: for data; queue: for the
    device, which another shard had; encode; total.
    """

    rows: list[TokenRow]
    quarantined: list[Quarantined]
    num_samples: int
    seconds: dict[str, float]


def encode_shard(
    shard: Shard,
    encoder: LatentEncoder,
    options: TokensConfig,
    device_lock: "threading.Lock | None" = None,
    tick: Callable[[], None] = lambda: None,
    *,
    only: Collection[int] | None = None,
) -> EncodedShard:
    """Reads, decodes and encodes a shard: to tokens if encoder is a tokenizer, else to latents.

    device_lock is held while a batch is encoded. tick is called for each sample that is read, for each batch that is
    encoded, and while another shard has the device. only: source indices; all other samples are counted and skipped.

    Raises ShardError if the shard cannot be read to its end.
    """
    rows: list[TokenRow] = []
    quarantined: list[Quarantined] = []
    tally, watch = Tally(tick), Stopwatch()
    device_lock = device_lock or threading.Lock()
    batches = decoded_batches(shard.url, encoder, options, quarantined, version=shard.version, only=only, tally=tally)
    for batch in batches:
        watch.lap("wait")
        while not device_lock.acquire(timeout=TICK_S):
            tick()
        try:
            watch.lap("queue")
            rows += rows_of(batch, encoder, options.passthrough, quarantined)
            watch.lap("encode")
        finally:
            device_lock.release()
        tick()
    watch.lap("wait")
    seconds = {"read": tally.read_s, "decode": tally.decode_s, **watch.seconds, "total": sum(watch.seconds.values())}
    return EncodedShard(sorted(rows, key=lambda row: row.source_index), quarantined, tally.num_samples, seconds)


@dataclass
class Item:
    """A sample whose bytes became an array."""

    sample: Sample
    decoded: Decoded


@dataclass
class Tally:
    """What reading a shard came to; complete once its last batch was taken.

    tick: called for each sample that is read. num_samples: all that the reader found, skipped and bad ones too.
    decode_s adds up the seconds of all threads.
    """

    tick: Callable[[], None] = lambda: None
    num_samples: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0


def decoded_batches(
    url: str,
    encoder: LatentEncoder,
    options: TokensConfig,
    quarantined: list[Quarantined],
    *,
    version: str | None = None,
    only: Collection[int] | None = None,
    tally: Tally | None = None,
) -> Iterator[list[Item]]:
    """Batches of one shape each, read and decoded beside the caller's work. Bad samples are added to quarantined.

    version: of the shard; another one is a ShardError. only: source indices; the other samples are counted, but
    neither decoded nor quarantined. Raises ShardError. The batches depend on the shard and the options alone, never on
    workers or timing.
    """
    tally = Tally() if tally is None else tally

    def decode(sample: Sample) -> tuple[Item | Quarantined, float]:
        start = time.monotonic()
        return decode_sample(sample, encoder.modality), time.monotonic() - start

    def sound() -> Iterator[Item]:
        wanted = (s for s in _tallied(read_samples(url, version), tally) if only is None or s.index in only)
        for outcome, seconds in map_in_threads(decode, wanted, options.decode_threads):
            tally.decode_s += seconds
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome)
            else:
                yield outcome

    modality = encoder.modality
    budget = modality.elements(options.batch_budget or modality.default_budget)
    batches = in_buckets(sound(), lambda item: item.decoded.array, modality.bucket, budget)
    yield from prefetch(batches)


def _tallied(samples: Iterator[Sample], tally: Tally) -> Iterator[Sample]:
    while True:
        start = time.monotonic()
        sample = next(samples, None)
        tally.read_s += time.monotonic() - start
        if sample is None:
            return
        tally.num_samples += 1
        tally.tick()
        yield sample


def decode_sample(sample: Sample, modality: Modality) -> Item | Quarantined:
    """The sample's medium as an array, or why it is none."""
    if sample.quarantine_reason:
        return Quarantined(sample.key, sample.index, "read", "BadSample", sample.quarantine_reason)
    found = [e for e in sample.members if e.rsplit(".", 1)[-1] in modality.extensions]
    try:
        if len(found) != 1:
            have = ", ".join(sample.members) or "nothing"
            raise BadSample(f"needs one member of {', '.join(modality.extensions)}; it has {have}")
        return Item(sample, modality.read(sample.members[found[0]], found[0].rsplit(".", 1)[-1]))
    except BadSample as error:
        return Quarantined(sample.key, sample.index, "decode", type(error.__cause__ or error).__name__, str(error))


def one_by_one_if_bad(
    batch: list[Item], function: Callable[[list[Item]], Sequence[R]], quarantined: list[Quarantined]
) -> list[tuple[Item, R]]:
    """Each item with what the function gives for it, which takes a batch and raises BadSample if one of it is bad.

    The batch is then gone through one by one, so that the bad ones go to quarantine and their neighbours do not.
    """
    try:
        return list(zip(batch, function(batch), strict=True))
    except BadSample as error:
        if len(batch) > 1:
            return [pair for item in batch for pair in one_by_one_if_bad([item], function, quarantined)]
        sample = batch[0].sample
        quarantined.append(Quarantined(sample.key, sample.index, "encode", "BadSample", str(error)))
        return []


def rows_of(
    batch: list[Item], encoder: LatentEncoder, passthrough: Sequence[str], quarantined: list[Quarantined]
) -> list[TokenRow]:
    """A row for each sample of the batch that gives one; the others are added to quarantined.

    encoder: a tokenizer for tokens; else the rows hold latents. passthrough: extensions of members that become columns.
    """
    rows = []
    for item, grid in one_by_one_if_bad(batch, lambda items: _encode(encoder, items), quarantined):
        sample = item.sample
        kept = {name: sample.members[name] for name in passthrough if name in sample.members}
        row = TokenRow(sample.key, sample.index, grid, item.decoded.size, kept)
        try:
            for name in kept:
                passthrough_value(name, row)
        except ValueError as error:
            quarantined.append(
                Quarantined(
                    sample.key, sample.index, "passthrough", type(error.__cause__ or error).__name__, str(error)
                )
            )
            continue
        rows.append(row)
    return rows


def _encode(encoder: LatentEncoder, items: list[Item]) -> list[np.ndarray]:
    return encoder.encode([item.decoded.array for item in items])


class Stopwatch:
    """Seconds by stage, for the manifest entry."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """What passed since the last lap counts towards this stage."""
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now
