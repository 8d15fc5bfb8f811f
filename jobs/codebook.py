"""After training: latents over the corpus, k-means, a frozen tokenizer per size: `run`, `codebook.size`, `data.shards`.

Writes RUN/tokenizers/<quantizer>-K<size> and a report of error, CVU, dead codes and usage beside the others. Methods
whose codes are learned or fixed take the same road: their codebook is frozen as it is, and reported on.
"""

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jobs import cluster
from jobs.config import Config, ConfigError, TokensConfig
from jobs.progress import Progress
from jobs.reading import Item, decoded_batches, one_by_one_if_bad
from jobs.report import latents_png, line_png, page, picture, table, usage_png
from jobs.shard_pool import ShardWorker, map_shards
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.manifest import Shard, find_shards
from pipeline.reservoir import Reservoir
from pipeline.tokens.output import Quarantined
from tokenizer.autoencoder import Autoencoder
from tokenizer.latents import LatentEncoder
from tokenizer.metrics import count_codes, digit_usage, usage
from tokenizer.tokenizer import Tokenizer

PLOTTED_LATENTS = 4000


def run(config: Config) -> int:
    config.require("run", "data.shards")
    run_url = storage.normalise(config.run)
    autoencoder = _trained(run_url)
    with _explained():
        autoencoder.change_fit(config.codebook.settings)
    places = {size: _place(run_url, autoencoder, size, config) for size in _sizes(config.codebook.size)}
    todo = [size for size, place in places.items() if not storage.exists(storage.join(place, "tokenizer.json"))]
    for size, place in places.items():
        if size not in todo:
            print(f"codebook: {place} is there already")
    if not todo:
        return 0
    latents = _gather_latents(config, run_url)
    for size in todo:
        _make(copy.deepcopy(autoencoder), latents, size, config, places[size])
    return 0


def _trained(run_url: str) -> Autoencoder:
    try:
        with storage.downloaded(storage.join(run_url, "model")) as folder:
            return Autoencoder.load(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_url} holds no trained model; run `tokenmill train` first ({error})") from error


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


def _gather_latents(config: Config, run_url: str) -> torch.Tensor:
    """A uniform sample of the corpus's latents [N, in_dim]; the same whatever the number of workers."""
    shards = find_shards(config.data.shards).shards
    cluster.start()
    settings = {
        "run_url": run_url,
        "preprocess": config.data.preprocess,
        "options": config.tokens,
        "capacity": config.codebook.max_latents,
        "seed": config.codebook.seed,
    }
    progress = Progress("codebook", total=len(shards), unit="shards")
    everything = Reservoir(config.codebook.max_latents, config.codebook.seed)
    for part in map_shards(shards, LatentWorker, settings, config.workers):
        everything.merge(part.sample)
        if part.failure:
            print(f"codebook: failed shard: {part.failure}")
        progress.advance(latents=part.num_latents, bad_samples=part.num_bad)
    progress.close()
    if everything.rows is None:
        raise ConfigError("the corpus gave no latents: every shard failed or is empty; see the messages above")
    return torch.from_numpy(everything.rows)


@dataclass
class LatentPart:
    """One shard's share of the sample."""

    sample: Reservoir
    num_latents: int = 0
    num_bad: int = 0
    failure: str | None = None


class LatentWorker(ShardWorker):
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
        self.encoder = LatentEncoder(_trained(run_url), preprocess)
        self.encoder.to(self.device)
        self.options, self.capacity, self.seed = options, capacity, seed

    def process(self, shard: Shard) -> LatentPart:
        quarantined: list[Quarantined] = []
        rows: list[np.ndarray] = []
        part = LatentPart(Reservoir(self.capacity, self.seed))
        try:
            for batch in decoded_batches(shard.url, self.encoder, self.options, quarantined):
                rows += [latents for _, latents in one_by_one_if_bad(batch, self._latents, quarantined)]
                self.tick(shard)
        except ShardError as error:  # what came before the break is as good a sample as any
            part.failure = str(error)
        if rows:
            latents = np.concatenate(rows)
            part.sample.add(latents, place=shard.url)
            part.num_latents = len(latents)
        part.num_bad = len(quarantined)
        return part

    @staticmethod
    def failed(shard: Shard, reason: str) -> LatentPart:
        return LatentPart(Reservoir(0, 0), failure=f"{shard.url}: {reason}")

    def _latents(self, items: list[Item]) -> list[np.ndarray]:
        """[N, in_dim] of each."""
        found = self.encoder.latents([item.decoded.array for item in items])
        return [z.flatten(0, -2).cpu().numpy() for z in found]


def _make(autoencoder: Autoencoder, latents: torch.Tensor, size: int | None, config: Config, place: str) -> None:
    """Fits one codebook, freezes the tokenizer, and reports."""
    with _explained():
        curve = autoencoder.quantizer.eval().fit(latents, size, seed=config.codebook.seed)
    tokenizer = Tokenizer(autoencoder, config.data.preprocess)
    numbers, counts = _measure(tokenizer, latents, curve)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        storage.upload(folder, place)
    run_url, _, name = place.rsplit("/", 2)
    reports = storage.join(run_url, "reports")
    storage.replace(storage.join(reports, f"codebook-{name}.json"), json.dumps(numbers, indent=1).encode())
    storage.replace(storage.join(reports, f"codebook-{name}.html"), _page(tokenizer, latents, numbers, counts, curve))
    told = "  ".join(f"{key} {numbers[key]:.4g}" for key in ("mse", "cvu", "perplexity", "dead_codes"))
    print(f"codebook: {place}  tokenizer {tokenizer.id}  {told}")


def _measure(tokenizer: Tokenizer, latents: torch.Tensor, curve: list[float]) -> tuple[dict[str, Any], np.ndarray]:
    quantizer = tokenizer.autoencoder.quantizer
    indices = quantizer.encode(latents)
    counts = count_codes(indices.reshape(len(indices), -1).T.numpy(), tokenizer.codebook_size)
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id, "codebook_id": tokenizer.codebook_id}
    numbers |= usage(counts, quantizer.target_size) | {"num_latents": len(latents), "iterations": len(curve)}
    if quantizer.index_levels:
        numbers["cvu_per_dim"] = digit_usage(counts[0], quantizer.index_levels)
    # of what the quantizer hands on; a method that reads more channels (weights, variances) has its latents first
    numbers["mse"] = float((quantizer.decode(indices) - latents[:, : quantizer.dim]).square().sum(dim=1).mean())
    return numbers, counts.sum(axis=0)


def _page(
    tokenizer: Tokenizer, latents: torch.Tensor, numbers: dict[str, Any], counts: np.ndarray, curve: list[float]
) -> bytes:
    quantizer = tokenizer.autoencoder.quantizer
    codes = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    pictures = [usage_png(counts), latents_png(latents[:PLOTTED_LATENTS, : quantizer.dim].numpy(), codes)]
    if curve:
        pictures.insert(0, line_png(curve, "error per latent (weighted, if balanced)", "Lloyd iteration"))
    return page(f"Codebook of {tokenizer.codebook_size} codes", [table(numbers), *map(picture, pictures)])
