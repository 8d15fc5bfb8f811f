"""One pass over the samples of a corpus for its latents: a sample of them that comes back, or all into a cache."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jobs.actors import cluster
from jobs.actors.run import EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import load_encoder
from jobs.config import Config, ConfigError, TokensConfig
from jobs.latents.cache import latent_layout
from jobs.shards import encode_shard
from jobs.tokenize_corpus import TokenizeWorker
from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList
from pipeline.reservoir import Reservoir
from pipeline.tokens import Output
from tokenizer.encoder import LatentEncoder


def draw_latents(run_url: str, inputs: ShardList, config: Config) -> tuple[np.ndarray | None, int]:
    """A uniform sample [N, in_dim] of the corpus's latents, the same for any number of workers; None if it has none.

    And how many shards failed; the sample has nothing from them.
    """
    import ray

    cluster.start()
    options = config.codebook
    drawn = Reservoir(options.max_latents, options.seed)
    bound: Any = ray.remote(_Bound).options(num_cpus=0, scheduling_strategy=cluster.on_this_node()).remote()
    settings = {"load": partial(load_encoder, run_url, config.data.preprocess), "options": _no_columns(config.tokens)}
    settings |= {"capacity": options.max_latents, "seed": options.seed, "bound": bound}
    failures = []
    for part in run_shards("codebook", inputs.shards, SampleWorker, settings, config.workers):
        if part.failure:
            failures.append(part.failure)
        else:
            drawn.merge(part.sample)
            bound.set.remote(drawn.bound)
    print_failures("codebook", failures)
    return drawn.rows, len(failures)


def _no_columns(options: TokensConfig) -> TokensConfig:
    return replace(options, passthrough=[])


class _Bound:
    """Rows of a higher priority cannot enter the sample. Workers ask, and so do not send what would be thrown away."""

    def __init__(self) -> None:
        self.below = 1.0

    def set(self, below: float) -> None:
        self.below = below

    def get(self) -> float:
        return self.below


@dataclass
class Sampled(ShardResult):
    """One shard's share of the sample."""

    sample: Reservoir | None = None
    num_latents: int = 0
    num_bad: int = 0

    def counts(self) -> dict[str, float]:
        return {"latents": self.num_latents, "bad_samples": self.num_bad}


class SampleWorker(EncodeWorker[LatentEncoder]):
    """Holds the encoder and draws from the latents of one shard after the other."""

    in_flight = 2
    result = Sampled

    def __init__(self, capacity: int, seed: int, bound: Any, **rest: Any):
        super().__init__(**rest)
        self.capacity, self.seed, self.bound = capacity, seed, bound

    def work(self, shard: Shard) -> ShardResult:
        import ray

        found = encode_shard(shard, self.encoder, self.options, self.device_lock, partial(self.tick, shard))
        sampled = Sampled(shard, num_bad=len(found.quarantined))
        sampled.sample = Reservoir(self.capacity, self.seed, ray.get(self.bound.get.remote()))
        latents = [row.tokens.reshape(-1, row.tokens.shape[-1]) for row in found.rows]
        if latents:
            sampled.num_latents = sum(map(len, latents))
            sampled.sample.add(np.concatenate(latents), source=shard.url)
        return sampled


def fill_cache(run_url: str, inputs: ShardList, config: Config) -> Output:
    """Writes what RUN/latents lacks, and returns it. A shard that fails is reported and is not in it."""
    encoder = load_encoder(run_url, config.data.preprocess)
    url = storage.join(run_url, "latents")
    options = _as_before(url, encoder, config.tokens)
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(url)
    cache = Output.create(url, latent_layout(encoder, options), inputs, config.to_dict())
    done = cache.committed_names()
    todo = [shard for shard in inputs.shards if shard.name not in done]
    print(f"codebook: {cache.url} has the latents of {len(inputs.shards) - len(todo)} of {len(inputs.shards)} shards")
    settings: dict[str, Any] = {"load": partial(load_encoder, run_url, config.data.preprocess)}
    settings |= {"output_url": cache.url, "options": options}
    results = run_shards("codebook", todo, TokenizeWorker, settings, config.workers)
    print_failures("codebook", [result.failure for result in results if result.failure])
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
