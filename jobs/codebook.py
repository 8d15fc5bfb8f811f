"""After training: latents over the corpus, k-means, a frozen tokenizer per size: `run`, `codebook.size`, `data.shards`.

Writes RUN/tokenizers/<quantizer>-K<size> and a report of error, CVU, dead codes and usage beside the others. Methods
whose codes are learned or fixed take the same road: their codebook is frozen as it is, and reported on.
"""

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs import cluster
from jobs.cached_latents import CachedLatents, CacheReader
from jobs.config import Config, ConfigError
from jobs.frozen import load_trained
from jobs.latent_pass import draw_latents, fill_cache
from jobs.report import latents_png, line_png, page, picture, table, usage_png
from jobs.shard_pool import ShardPool
from pipeline import storage
from pipeline.manifest import find_shards
from tokenizer.autoencoder import Autoencoder
from tokenizer.coding import coding
from tokenizer.latent_parts import InMemory, Latents
from tokenizer.metrics import digit_usage, usage
from tokenizer.tokenizer import Tokenizer

SHOWN_LATENTS = 1_000_000  # of a whole corpus: what the scatter and the perturbation are of
PLOTTED_LATENTS = 4000


def run(config: Config) -> int:
    config.require("run", "data.shards")
    run_url = storage.normalise(config.run)
    autoencoder = load_trained(run_url)
    with _explained():
        autoencoder.change_fit(config.codebook.settings)
    places = {size: _place(run_url, autoencoder, size, config) for size in _sizes(config.codebook.size)}
    todo = [size for size, place in places.items() if not storage.exists(storage.join(place, "tokenizer.json"))]
    for size, place in places.items():
        if size not in todo:
            print(f"codebook: {place} is there already")
    if not todo:
        return 0
    with _gathered(config, run_url, autoencoder) as latents:
        _make_all(autoencoder, latents, {size: places[size] for size in todo}, config)
    return 0


@contextlib.contextmanager
def _gathered(config: Config, run_url: str, autoencoder: Autoencoder) -> Iterator[Latents]:
    """Latents of the corpus: a sample of them in memory, or all, with the workers."""
    inputs, options = find_shards(config.data.shards), config.codebook
    cluster.start()
    if not (options.cache or options.full):
        rows = draw_latents(run_url, inputs, config)
        yield _some(None if rows is None else InMemory(torch.from_numpy(rows)))
        return
    cache, dim = fill_cache(run_url, inputs, config), autoencoder.quantizer.in_dim
    with ShardPool(CacheReader, {"cache_url": cache.url, "dim": dim}, config.workers) as pool:
        names = {shard.name for shard in inputs.shards}  # the cache may hold more than this corpus
        cached = CachedLatents.of(cache, names, pool, dim, options.max_latents, options.seed)
        yield _some(cached if options.full or cached is None else InMemory(cached.drawn))


def _some(latents: Latents | None) -> Latents:
    if latents is None:
        raise ConfigError("the corpus gave no latents: every shard failed or is empty; see the messages above")
    return latents


def _make_all(autoencoder: Autoencoder, latents: Latents, places: dict[int | None, str], config: Config) -> None:
    """The smallest first, so that each can start from the one before."""
    previous = autoencoder
    for size in sorted(places, key=lambda size: size or autoencoder.quantizer.codebook_size):
        fitted = copy.deepcopy(previous if config.codebook.warm_start else autoencoder)
        _make(fitted, latents, size, config, places[size])
        previous = fitted


def _sizes(size: Any) -> list[int | None]:
    if size is None:
        return [None]
    try:
        sizes = [int(value) for value in (size if isinstance(size, list) else [size])]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"codebook.size is {size!r}; it must be a number of codes, or a list of them") from error
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"codebook.size is {size!r}; it must be above 0")
    return list(sizes)


def _place(run_url: str, autoencoder: Autoencoder, size: int | None, config: Config) -> str:
    quantizer = autoencoder.quantizer
    changed = "".join(f"-{name}{value}" for name, value in config.codebook.settings.items())
    return storage.join(run_url, "tokenizers", f"{quantizer.name}-K{size or quantizer.codebook_size}{changed}")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A setting or size that the quantizer refuses is a mistake in the configuration."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"codebook: {error}") from error


def _make(autoencoder: Autoencoder, latents: Latents, size: int | None, config: Config, place: str) -> None:
    """Fits one codebook, freezes the tokenizer, and reports."""
    with _explained():
        curve = autoencoder.quantizer.eval().fit(latents, size, seed=config.codebook.seed)
    tokenizer = Tokenizer(autoencoder, config.data.preprocess)
    some = latents.sample(SHOWN_LATENTS, seed=0).latents
    numbers, counts = _measured(tokenizer, latents, some, curve)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        storage.upload(folder, place)
    run_url, _, name = place.rsplit("/", 2)
    reports = storage.join(run_url, "reports")
    storage.replace(storage.join(reports, f"codebook-{name}.json"), json.dumps(numbers, indent=1).encode())
    storage.replace(storage.join(reports, f"codebook-{name}.html"), _page(tokenizer, some, numbers, counts, curve))
    shown = ("mse", "cvu", "perplexity", "dead_codes", "perturbation_ratio")
    told = "  ".join(f"{key} {numbers[key]:.4g}" for key in shown if key in numbers)
    print(f"codebook: {place}  tokenizer {tokenizer.id}  {told}")


def _measured(
    tokenizer: Tokenizer, latents: Latents, some: Tensor, curve: list[float]
) -> tuple[dict[str, Any], np.ndarray]:
    quantizer = tokenizer.autoencoder.quantizer
    total = latents.total(partial(coding, quantizer=quantizer))
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id, "codebook_id": tokenizer.codebook_id}
    numbers |= usage(total.counts, quantizer.target_size) | {"num_latents": len(latents), "iterations": len(curve)}
    if quantizer.index_levels:
        numbers["cvu_per_dim"] = digit_usage(total.counts[0], quantizer.index_levels)
    numbers["mse"] = total.squared_error / len(latents)
    ratio = quantizer.perturbation_ratio(some)
    if ratio is not None:
        numbers["perturbation_ratio"] = ratio
    return numbers | {"curve": curve}, total.counts.sum(axis=0)


def _page(tokenizer: Tokenizer, some: Tensor, numbers: dict[str, Any], counts: np.ndarray, curve: list[float]) -> bytes:
    quantizer = tokenizer.autoencoder.quantizer
    codes = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    pictures = [usage_png(counts), latents_png(some[:PLOTTED_LATENTS, : quantizer.dim].numpy(), codes)]
    if curve:
        pictures.insert(0, line_png(curve, "error per latent (weighted, if balanced)", "Lloyd iteration"))
    shown = {name: value for name, value in numbers.items() if name != "curve"}
    return page(f"Codebook of {tokenizer.codebook_size} codes", [table(shown), *map(picture, pictures)])
