"""One pass over the pixels of a corpus, for its latents: a sample of them that comes back, or all into a cache."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jobs.config import Config, ConfigError, TokensConfig
from jobs.frozen import load_encoder
from jobs.latent_cache import layout_of
from jobs.progress import Progress
from jobs.reading import Tally, decoded_batches, one_by_one_if_bad
from jobs.shard_pool import ShardWorker, map_shards
from jobs.tokenize_corpus import TokenizeWorker
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.manifest import Manifest, Shard
from pipeline.reservoir import Reservoir
from pipeline.tokens import Output
from pipeline.tokens.output import Quarantined
from tokenizer.latents import LatentEncoder


def draw_latents(run_url: str, inputs: Manifest, config: Config) -> tuple[np.ndarray | None, int]:
    """A uniform sample [N, in_dim] of the corpus's latents, whatever the number of workers; None if it has none.

    And how many shards failed, of which there is nothing in it, or what came before the break.
    """
    num_failed = 0
    options = config.codebook
    drawn = Reservoir(options.max_latents, options.seed)
    settings = {"run_url": run_url, "preprocess": config.data.preprocess, "options": config.tokens}
    settings |= {"capacity": options.max_latents, "seed": options.seed}
    progress = Progress("codebook", total=len(inputs.shards), unit="shards")
    # each shard is told what can still enter: once the sample is full, little of what cannot stay comes here
    for part in map_shards(inputs.shards, SampleWorker, settings, config.workers, lambda: (drawn.bound,)):
        drawn.merge(part.sample)
        _tell_failure(part.failure)
        num_failed += part.failure is not None
        progress.advance(latents=part.num_latents, bad_samples=part.num_bad)
    progress.close()
    return drawn.rows, num_failed


@dataclass
class SamplePart:
    """One shard's share of the sample."""

    sample: Reservoir
    num_latents: int = 0
    num_bad: int = 0
    failure: str | None = None


class SampleWorker(ShardWorker):
    """Holds the encoder and turns shards into latents."""

    def __init__(
        self,
        run_url: str,
        preprocess: dict[str, Any],
        options: TokensConfig,
        capacity: int,
        seed: int,
        **resources: Any,
    ):
        super().__init__(**resources)
        self.encoder = load_encoder(run_url, preprocess).to(self.device)
        self.options, self.capacity, self.seed = options, capacity, seed

    def process(self, shard: Shard, below: float) -> SamplePart:
        quarantined: list[Quarantined] = []
        found: list[tuple[int, np.ndarray]] = []
        part, tally = SamplePart(Reservoir(self.capacity, self.seed, below)), Tally(partial(self.tick, shard))
        try:
            batches = decoded_batches(
                shard.url, self.encoder, self.options, quarantined, version=shard.version, tally=tally
            )
            for batch in batches:
                encoded = one_by_one_if_bad(
                    batch, lambda i: self.encoder.encode([j.decoded.array for j in i]), quarantined
                )
                found += [(item.sample.index, z.reshape(-1, z.shape[-1])) for item, z in encoded]
                self.tick(shard)
        except ShardError as error:  # what came before the break is as good a sample as any
            part.failure = str(error)
        if found:
            latents = np.concatenate([z for _, z in sorted(found, key=lambda pair: pair[0])])
            part.sample.add(latents, place=shard.url)
            part.num_latents = len(latents)
        part.num_bad = len(quarantined)
        return part

    @staticmethod
    def failed(shard: Shard, reason: str) -> SamplePart:
        return SamplePart(Reservoir(0, 0), failure=f"{shard.url}: {reason}")


def fill_cache(run_url: str, inputs: Manifest, config: Config) -> Output:
    """Writes what RUN/latents lacks, and returns it. A shard that failed is told of, and is not in it."""
    encoder = load_encoder(run_url, config.data.preprocess)
    url = storage.join(run_url, "latents")
    options = _as_before(url, encoder, config.tokens)
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(url)
    cache = Output.create(url, layout_of(encoder, options), inputs, config.to_dict())
    done = cache.committed_names()
    todo = [shard for shard in inputs.shards if shard.name not in done]
    print(f"codebook: {cache.url} has the latents of {len(inputs.shards) - len(todo)} of {len(inputs.shards)} shards")
    settings: dict[str, Any] = {"run_url": run_url, "preprocess": config.data.preprocess}
    settings |= {"output_url": cache.url, "options": options}
    progress = Progress("codebook", total=len(todo), unit="shards")
    for result in map_shards(todo, CacheWorker, settings, config.workers):
        _tell_failure(result.failure)
        progress.advance(samples=result.num_rows, bad_samples=result.num_quarantined)
    progress.close()
    return cache


def _as_before(url: str, encoder: LatentEncoder, options: TokensConfig) -> TokensConfig:
    """With the passthrough of the cache that is there, if one is: k-means reads none. Raises ConfigError if it is
    another encoder's."""
    try:
        layout = Output.open(url).layout
    except FileNotFoundError:
        return options
    if layout.tokenizer_id != encoder.encoder_id:
        raise ConfigError(f"{url} holds latents of another encoder or data.preprocess; delete it, or set another `run`")
    return replace(options, passthrough=list(layout.passthrough))


class CacheWorker(TokenizeWorker):
    """Takes shards from bytes to commit as that does, with latents in place of tokens."""

    def __init__(
        self, run_url: str, preprocess: dict[str, Any], output_url: str, options: TokensConfig, **resources: Any
    ):
        ShardWorker.__init__(self, **resources)
        self.encoder = load_encoder(run_url, preprocess).to(self.device)
        self.output, self.options, self.cache = Output.open(output_url), options, None


def _tell_failure(failure: str | None) -> None:
    if failure:
        print(f"codebook: failed shard: {failure.splitlines()[0]}")
