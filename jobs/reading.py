"""A shard to batches of decoded samples, on the road that codebook, tokenize and evaluate share."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from jobs.config import TokensConfig
from pipeline.batches import in_buckets, map_in_threads, prefetch
from pipeline.samples import Sample, read_samples
from pipeline.tokens.output import Quarantined
from tokenizer.errors import BadSample
from tokenizer.latents import LatentEncoder
from tokenizer.modality import Decoded, Modality


@dataclass
class Item:
    """A sample whose bytes became an array."""

    sample: Sample
    decoded: Decoded


def decoded_batches(
    url: str, encoder: LatentEncoder, options: TokensConfig, quarantined: list[Quarantined]
) -> Iterator[list[Item]]:
    """Batches of one shape each, read and decoded beside the caller's work. Bad samples are added to quarantined.

    Raises ShardError. The batches depend on the shard and the options alone, never on workers or timing.
    """

    def sound() -> Iterator[Item]:
        decode = partial(decode_sample, modality=encoder.modality)
        for outcome in map_in_threads(decode, read_samples(url), options.decode_threads):
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome)
            else:
                yield outcome

    batches = in_buckets(sound(), lambda item: item.decoded.array, encoder.modality.bucket, options.batch_budget)
    yield from prefetch(batches)


def decode_sample(sample: Sample, modality: Modality) -> Item | Quarantined:
    """The sample's medium as an array, or why it is none."""
    if sample.problem:
        return Quarantined(sample.key, sample.index, "read", "BadSample", sample.problem)
    found = [e for e in sample.members if e.rsplit(".", 1)[-1] in modality.extensions]
    try:
        if len(found) != 1:
            have = ", ".join(sample.members) or "nothing"
            raise BadSample(f"needs one member of {', '.join(modality.extensions)}; it has {have}")
        return Item(sample, modality.read(sample.members[found[0]], found[0].rsplit(".", 1)[-1]))
    except BadSample as error:
        return Quarantined(sample.key, sample.index, "decode", type(error.__cause__ or error).__name__, str(error))


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
