"""One pass over a corpus for its latents: a sample of them for the driver, or all of them in a cache."""

import collections
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jobs.actors import cluster
from jobs.actors.run import EncodeWorker, ShardResult, print_failures, print_notes, run_shards
from jobs.artifacts import latent_layout, load_encoder
from jobs.config import Config, ConfigError, TokensConfig
from jobs.encode import encode_missing
from jobs.shards import encode_shard
from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList
from pipeline.reservoir import Reservoir
from pipeline.tokens import Output
from tokenizer.encoder import LatentEncoder


def draw_latents(run_url: str, inputs: ShardList, config: Config) -> tuple[np.ndarray | None, int]:
    """A uniform sample [N, in_dim] of the corpus's latents, and the number of failed shards, which are not in it.

    The sample does not depend on the number of workers. It is None if the corpus gave no latents.
    """
    import ray

    cluster.start()
    options = config.codebook
    sample = Reservoir(options.max_latents, options.seed)
    bound: Any = ray.remote(_Bound).options(num_cpus=0, scheduling_strategy=cluster.on_this_node()).remote()
    settings = {
        "load": partial(load_encoder, run_url, config.data.preprocess),
        "options": replace(config.tokens, passthrough=[]),
        "member": config.data.member,
    }
    settings |= {"capacity": options.max_latents, "seed": options.seed, "bound": bound}
    failures = []
    for result in run_shards("codebook", inputs.shards, SampleWorker, settings, config.workers):
        if result.failure:
            failures.append(result.failure)
        else:
            sample.merge(result.sample)
            bound.set.remote(sample.bound)
    print_failures("codebook", failures)
    return sample.rows, len(failures)


class _Bound:
    """An actor. Rows above this priority can no longer enter the sample, so workers do not send them."""

    def __init__(self) -> None:
        self.below = 1.0

    def set(self, below: float) -> None:
        self.below = below

    def get(self) -> float:
        return self.below


@dataclass
class Sampled(ShardResult):
    """The part of the sample that comes from one shard."""

    sample: Reservoir | None = None
    num_latents: int = 0
    num_quarantined: int = 0

    def counts(self) -> dict[str, float]:
        return {"latents": self.num_latents, "quarantined": self.num_quarantined}


class SampleWorker(EncodeWorker[LatentEncoder]):
    """Encodes shards and draws from their latents."""

    in_flight = 2
    result = Sampled

    def __init__(self, capacity: int, seed: int, bound: Any, **rest: Any):
        super().__init__(**rest)
        self.capacity, self.seed, self.bound = capacity, seed, bound

    def work(self, shard: Shard) -> ShardResult:
        import ray

        tick = partial(self.tick, shard)
        encoded = encode_shard(shard, self.encoder, self.options, self.device_lock, tick, member=self.member)
        sampled = Sampled(shard, num_quarantined=len(encoded.quarantined), notes=encoded.notes)
        sampled.sample = Reservoir(self.capacity, self.seed, ray.get(self.bound.get.remote()))
        latents = [row.tokens.reshape(-1, row.tokens.shape[-1]) for row in encoded.rows]
        if latents:
            sampled.num_latents = sum(map(len, latents))
            sampled.sample.add(np.concatenate(latents), source=shard.url)
        return sampled


def fill_cache(run_url: str, inputs: ShardList, config: Config) -> Output:
    """Adds to RUN/latents the shards that it lacks, and returns it. Shards that fail are reported and left out."""
    load = partial(load_encoder, run_url, config.data.preprocess)
    encoder, url = load(), storage.join(run_url, "latents")
    options = _cache_options(url, encoder, config.tokens)
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(url)
    layout = latent_layout(encoder, options, config.data.member)
    cache = Output.create(url, layout, inputs, config.to_dict(), same_names=options.same_names)
    print(f"codebook: caching latents in {cache.url}")
    failures = encode_missing("codebook", inputs.shards, cache, load, config.with_changes(tokens=options))
    print_failures("codebook", failures)
    print_notes("codebook", sum((one.notes for one in cache.committed_shards()), collections.Counter()))
    return cache


def _cache_options(url: str, encoder: LatentEncoder, options: TokensConfig) -> TokensConfig:
    """The options with an existing cache's passthrough. Raises ConfigError if another encoder wrote it."""
    options = replace(options, latents="")
    try:
        layout = Output.open(url).layout
    except FileNotFoundError:
        return options
    if layout.tokenizer_id != encoder.encoder_id:
        raise ConfigError(
            f"{url} holds latents of another encoder or data.preprocess; restore data.preprocess, delete the cache, or "
            "choose another `run`"
        )
    return replace(options, passthrough=list(layout.passthrough))
