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

from jobs.actors.run import FIX_AND_RERUN
from jobs.artifacts import load_tokenizer, load_trained
from jobs.config import Config, ConfigError
from jobs.latents.extract import draw_latents, fill_cache
from jobs.latents.sharded import CachedLatents
from jobs.reports.html import page, picture, table
from jobs.reports.plots import latents_png, line_png, usage_png
from pipeline import storage
from pipeline.corpus.shards import ShardList, find_shards
from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.latents import InMemory, Latents
from tokenizer.tokenizer import Tokenizer
from tokenizer.usage import digit_usage, quantization_sums, usage

SHOWN_LATENTS = 1_000_000  # of a whole corpus: what the scatter and the perturbation are of
PLOTTED_LATENTS = 4000


def run(config: Config) -> int:
    config.require("run", "data.shards")
    run_url = storage.normalise(config.run)
    autoencoder, inputs = load_trained(run_url), find_shards(config.data.shards)
    sizes = _sizes(config.codebook.size)
    with _explained():
        autoencoder.change_fit(config.codebook.settings)
        for size in sizes:
            autoencoder.quantizer.check_size(size)
    places = {size: _place(run_url, autoencoder, size, config) for size in sizes}
    made_by = _made_by(config, inputs)
    ready = {size for size, place in places.items() if _is_ready(place, made_by)}
    if ready == set(places):
        return 0
    latents, num_failed = _gather(config, run_url, inputs, autoencoder.quantizer.in_dim)
    if latents is None:
        print(f"codebook: incomplete: {num_failed} shards failed; {FIX_AND_RERUN}")
        return 3
    _make_all(autoencoder, latents, places, ready, {**made_by, "num_failed_shards": num_failed}, config)
    if num_failed:
        print(f"codebook: incomplete: {num_failed} shards failed, and the codebooks are of the others")
    return 3 if num_failed else 0


def _made_by(config: Config, inputs: ShardList) -> dict[str, Any]:
    """What decides on a codebook, besides the model and its size."""
    given = {name: getattr(config.codebook, name) for name in ("settings", "max_latents", "seed", "full", "warm_start")}
    return {**given, "input_manifest_id": inputs.id}


def _is_ready(place: str, made_by: dict[str, Any]) -> bool:
    """Whether a tokenizer is there. Raises ConfigError if it was made in another way than is asked for now."""
    if not storage.exists(storage.join(place, "tokenizer.json")):
        return False
    try:
        before = json.loads(storage.read(_report_place(place, "json"))).get("made_by", made_by)
    except FileNotFoundError:
        before = made_by
    for name, value in made_by.items():
        if before.get(name) != value:
            what = "data.shards (its list of shards)" if name == "input_manifest_id" else f"codebook.{name}"
            raise ConfigError(
                f"{place} was made with another {what}: {before.get(name)}, not {value}; delete it to make it anew, or "
                "leave that as it was"
            )
    print(f"codebook: {place} already exists")
    return True


def _gather(config: Config, run_url: str, inputs: ShardList, dim: int) -> tuple[Latents | None, int]:
    """Latents of the corpus, and how many shards failed: a sample of them in memory, or all, on the cluster's nodes.

    None if a cache lacks shards: a codebook of all latents is not made from a part of them.
    """
    options = config.codebook
    if not (options.cache or options.full):
        rows, num_failed = draw_latents(run_url, inputs, config)
        return _some(None if rows is None else InMemory(torch.from_numpy(rows))), num_failed
    cache = fill_cache(run_url, inputs, config)
    names = {shard.name for shard in inputs.shards}  # the cache may hold more than this corpus
    entries = [entry for entry in cache.commits() if entry.name in names]
    if len(entries) < len(names):
        return None, len(names) - len(entries)
    cached = CachedLatents.of(cache, entries, dim, options.max_latents, options.seed, config.workers)
    return _some(cached if options.full or cached is None else InMemory(cached.drawn)), 0


def _some(latents: Latents | None) -> Latents:
    if latents is None:
        raise ConfigError("the corpus gave no latents: every shard failed or is empty; see the messages above")
    return latents


def _make_all(
    autoencoder: Autoencoder,
    latents: Latents,
    places: dict[int | None, str],
    ready: set[int | None],
    made_by: dict[str, Any],
    config: Config,
) -> None:
    """The smallest first, so that each can start from the one before; also where that was made by an earlier run."""
    previous = autoencoder
    for size in sorted(places, key=lambda size: size or autoencoder.quantizer.codebook_size):
        if size in ready:
            fitted = load_tokenizer(places[size]).autoencoder
        else:
            fitted = copy.deepcopy(previous if config.codebook.warm_start else autoencoder)
            _make(fitted, latents, size, made_by, config, places[size])
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


def _make(
    autoencoder: Autoencoder, latents: Latents, size: int | None, made_by: dict[str, Any], config: Config, place: str
) -> None:
    """Fits one codebook, reports, and last freezes the tokenizer."""
    curve = autoencoder.quantizer.eval().fit(latents, size, seed=config.codebook.seed)
    tokenizer = Tokenizer(autoencoder, config.data.preprocess)
    some = latents.sample(SHOWN_LATENTS, seed=0).latents
    numbers, counts = _measured(tokenizer, latents, some, curve)
    report = json.dumps({**numbers, "made_by": made_by, "curve": curve}, indent=1)
    storage.replace(_report_place(place, "json"), report.encode())
    storage.replace(_report_place(place, "html"), _page(tokenizer, some, numbers, counts, curve))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        storage.upload(folder, place)
    shown = ("mse", "cvu", "perplexity", "dead_codes", "perturbation_ratio")
    told = "  ".join(f"{key} {numbers[key]:.4g}" for key in shown if key in numbers)
    print(f"codebook: {place}  tokenizer {tokenizer.id}  {told}")


def _report_place(place: str, ending: str) -> str:
    run_url, _, name = place.rsplit("/", 2)
    return storage.join(run_url, "reports", f"codebook-{name}.{ending}")


def _measured(
    tokenizer: Tokenizer, latents: Latents, some: Tensor, curve: list[float]
) -> tuple[dict[str, Any], np.ndarray]:
    quantizer = tokenizer.autoencoder.quantizer
    total = latents.total(partial(quantization_sums, quantizer=quantizer))
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id, "codebook_id": tokenizer.codebook_id}
    numbers |= usage(total.counts, quantizer.target_size) | {"num_latents": len(latents), "iterations": len(curve)}
    if quantizer.index_levels:
        numbers["cvu_per_dim"] = digit_usage(total.counts[0], quantizer.index_levels)
    numbers["mse"] = total.squared_error / len(latents)
    ratio = quantizer.perturbation_ratio(some)
    if ratio is not None:
        numbers["perturbation_ratio"] = ratio
    return numbers, total.counts.sum(axis=0)


def _page(tokenizer: Tokenizer, some: Tensor, numbers: dict[str, Any], counts: np.ndarray, curve: list[float]) -> bytes:
    quantizer = tokenizer.autoencoder.quantizer
    codes = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    pictures = [usage_png(counts), latents_png(some[:PLOTTED_LATENTS, : quantizer.dim].numpy(), codes)]
    if curve:
        pictures.insert(0, line_png(curve, "error per latent (weighted, if balanced)", "Lloyd iteration"))
    return page(f"Codebook of {tokenizer.codebook_size} codes", [table(numbers), *map(picture, pictures)])
