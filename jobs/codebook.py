"""After training: fits a codebook to the latents of a corpus, for each size: `run`, `data.shards`, `codebook`.

Writes RUN/tokenizers/<quantizer>-K<size>, and a report on error, usage and dead codes. If a method learns its codes in
training, or its codes are fixed, its codebook is kept unchanged, with a report.
"""

import copy
import json
import tempfile
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.actors import cluster
from jobs.actors.run import FIX_AND_RERUN
from jobs.artifacts import check_limits, check_member, load_tokenizer, load_trained, with_rules_of_run
from jobs.config import Config, ConfigError
from jobs.latents.extract import draw_latents, fill_cache
from jobs.latents.sharded import CachedLatents
from jobs.reports.pages.codebook import codebook_page
from jobs.reports.pages.document import in_words
from jobs.reports.pages.index import write_index
from pipeline import storage
from pipeline.corpus.shards import ShardList, find_shards
from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.latents import InMemory, Latents
from tokenizer.modalities.base import build_modality
from tokenizer.tokenizer import Tokenizer
from tokenizer.usage import digit_usage, quantization_sums, usage

IDENTITY = ("settings", "max_latents", "seed", "full", "warm_start")  # keys that decide what a codebook is
KEYS = {"input_manifest_id": "data.shards (its list of shards)", "member": "data.member"}
SHOWN_LATENTS = 1_000_000  # of all latents: for the scatter plot and the perturbation ratio
SHOWN = ("mse", "cvu", "perplexity", "dead_codes", "perturbation_ratio")


def run(config: Config) -> int:
    config.require("run", "data.shards")
    run_url = storage.normalise(config.run)
    autoencoder, inputs = load_trained(run_url), find_shards(config.data.shards)
    config = with_rules_of_run(config, run_url, "codebook")
    modality = build_modality(autoencoder.settings["modality"], config.data.preprocess)
    check_member(config.data.member, modality)
    check_limits(modality, config.tokens)
    sizes = _sizes(config.codebook.size)
    try:
        autoencoder.change_fit(config.codebook.settings)
        for size in sizes:
            autoencoder.quantizer.check_size(size)
    except ValueError as error:
        raise ConfigError(f"codebook: {error}") from error
    urls = {size: _tokenizer_url(run_url, autoencoder, size, config) for size in sizes}
    made_by = {name: getattr(config.codebook, name) for name in IDENTITY} | {"input_manifest_id": inputs.id}
    made_by |= {"member": config.data.member} if config.data.member else {}
    existing = {size for size, url in urls.items() if _exists(url, made_by)}
    if existing == set(urls):
        return 0
    latents, num_failed = _gather(config, run_url, inputs, autoencoder.quantizer.in_dim)
    if latents is None:
        print(f"codebook: incomplete: {num_failed} shards failed; {FIX_AND_RERUN}")
        return 3
    made_by["num_failed_shards"] = num_failed
    previous = autoencoder
    # the smallest size first: with codebook.warm_start each fit starts from the size before it, old or new
    for size in sorted(urls, key=lambda size: size or autoencoder.quantizer.codebook_size):
        if size in existing:
            previous = load_tokenizer(urls[size]).autoencoder
        else:
            previous = copy.deepcopy(previous if config.codebook.warm_start else autoencoder)
            write_codebook(previous, latents, size, made_by, config, urls[size])
    if num_failed:
        print(f"codebook: incomplete: {num_failed} shards failed, so the codebooks are made from the others only")
    return 3 if num_failed else 0


def _sizes(size: Any) -> list[int | None]:
    """The values of codebook.size. None: as many codes as in training."""
    if size is None:
        return [None]
    try:
        sizes = [int(value) for value in (size if isinstance(size, list) else [size])]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"codebook.size is {size!r}; it must be a number of codes, or a list of them") from error
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"codebook.size is {size!r}; it must be above 0")
    return list(sizes)


def _tokenizer_url(run_url: str, autoencoder: Autoencoder, size: int | None, config: Config) -> str:
    quantizer = autoencoder.quantizer
    changed = "".join(f"-{name}{value}" for name, value in config.codebook.settings.items())
    return storage.join(run_url, "tokenizers", f"{quantizer.name}-K{size or quantizer.codebook_size}{changed}")


def _report_url(url: str, extension: str) -> str:
    run_url, _, name = url.rsplit("/", 2)
    return storage.join(run_url, "reports", f"codebook-{name}.{extension}")


def _exists(url: str, made_by: dict[str, Any]) -> bool:
    """Whether the tokenizer exists. Raises ConfigError if it was made with other settings."""
    if not storage.exists(storage.join(url, "tokenizer.json")):
        return False
    try:
        before = json.loads(storage.read(_report_url(url, "json"))).get("made_by", made_by)
    except FileNotFoundError:
        before = made_by
    for name in dict.fromkeys([*made_by, "member"]):  # a report has a member only if one was chosen
        if before.get(name) != made_by.get(name):
            key = KEYS.get(name, f"codebook.{name}")
            raise ConfigError(
                f"{url} was made with another {key}: {before.get(name)}, not {made_by.get(name)}; delete it to make it "
                "again, or restore the value"
            )
    print(f"codebook: {url} already exists")
    return True


def _gather(config: Config, run_url: str, inputs: ShardList, dim: int) -> tuple[Latents | None, int]:
    """Latents of the corpus, and how many shards failed: a sample in memory, or all of them on the cluster's nodes.

    None if a cache lacks shards: a codebook of all latents is not made from some of them.
    """
    options = config.codebook
    latents: Latents | None
    if not (options.cache or options.full):
        rows, num_failed = draw_latents(run_url, inputs, config)
        latents = None if rows is None else InMemory(torch.from_numpy(rows))
    else:
        cache, num_failed = fill_cache(run_url, inputs, config), 0
        names = {shard.name for shard in inputs.shards}  # the cache may hold more than this corpus
        entries = [entry for entry in cache.commits() if entry.name in names]
        if len(entries) < len(names):
            return None, len(names) - len(entries)
        cluster.start()
        cached = CachedLatents.of(cache, entries, dim, options.max_latents, options.seed, config.workers)
        latents = cached if options.full or cached is None else InMemory(cached.drawn)
    if latents is None:
        raise ConfigError("the corpus gave no latents: every shard failed or is empty; see the messages above")
    return latents, num_failed


def write_codebook(
    autoencoder: Autoencoder, latents: Latents, size: int | None, made_by: dict[str, Any], config: Config, url: str
) -> None:
    """Fits one codebook, writes its report, and then the tokenizer: a tokenizer that exists has its report."""
    try:
        curve = autoencoder.quantizer.eval().fit(latents, size, seed=config.codebook.seed)
    except ValueError as error:
        raise ConfigError(f"codebook: {error}") from error
    tokenizer = Tokenizer(autoencoder, config.data.preprocess)
    sample = latents.sample(SHOWN_LATENTS, seed=0).latents
    numbers, counts = _measure(tokenizer, latents, sample, curve)
    report = json.dumps({**numbers, "made_by": made_by, "curve": curve}, indent=1)
    storage.replace(_report_url(url, "json"), report.encode())
    about = {"name": url.rsplit("/", 1)[1], "command": config.command}
    about["corpus"] = in_words(config.to_dict()["data"]["shards"])
    storage.replace(_report_url(url, "html"), codebook_page(tokenizer, sample.numpy(), numbers, counts, curve, **about))
    write_index(_report_url(url, "html").rsplit("/", 1)[0])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        storage.upload(folder, url)
    shown = "  ".join(f"{key} {numbers[key]:.4g}" for key in SHOWN if key in numbers)
    print(f"codebook: {url}  tokenizer {tokenizer.id}  {shown}")


def _measure(
    tokenizer: Tokenizer, latents: Latents, sample: Tensor, curve: list[float]
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of the report, and how often each code is used, [K]. sample [N, in_dim]."""
    quantizer = tokenizer.autoencoder.quantizer
    total = latents.total(partial(quantization_sums, quantizer=quantizer))
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id, "codebook_id": tokenizer.codebook_id}
    numbers |= usage(total.counts, quantizer.target_size) | {"num_latents": len(latents), "iterations": len(curve)}
    if quantizer.index_levels:
        numbers["cvu_per_dim"] = digit_usage(total.counts[0], quantizer.index_levels)
    numbers["mse"] = total.squared_error / len(latents)
    ratio = quantizer.perturbation_ratio(sample)
    if ratio is not None:
        numbers["perturbation_ratio"] = ratio
    return numbers, total.counts.sum(axis=0)
