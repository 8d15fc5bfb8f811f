"""Quality and codebook usage on held-out shards: `tokenizer`, `data.shards`. With a picture report.

Writes RUN/reports/evaluate-<tokenizer>.json, .html (originals beside reconstructions) and .png (a sheet of them).
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs import cluster
from jobs.config import Config, ConfigError, TokensConfig
from jobs.frozen import load_tokenizer, tokenizer_url
from jobs.progress import Progress
from jobs.reading import Item, decoded_batches
from jobs.report import latents_png, page, pair, picture, sheet_png, table, usage_png
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.manifest import Shard, find_shards
from pipeline.tokens.output import Quarantined
from tokenizer.metrics import perplexity, usage
from tokenizer.tokenizer import Tokenizer

PLOTTED_LATENTS = 4000


@dataclass
class Part:
    """What one shard adds to the report. examples: (key, original, reconstruction) as files of the modality."""

    counts: np.ndarray
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    batch_perplexities: list[float] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)
    examples: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    num_bad: int = 0
    failure: str | None = None


def run(config: Config) -> int:
    config.require("data.shards")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    shards = find_shards(config.data.shards).shards
    cluster.start()
    settings = {"tokenizer_url": url, "options": config.tokens, "pictures": -(-config.limit // len(shards))}
    progress = Progress("evaluate", total=len(shards), unit="shards")
    parts: dict[str, Part] = {}
    for shard_url, part in cluster.map_shards(shards, EvaluateWorker, settings, config.workers):
        parts[shard_url] = part
        progress.advance(samples=len(next(iter(part.metrics.values()), [])), bad_samples=part.num_bad)
    progress.close()
    ordered = [parts[shard.url] for shard in shards]  # so that the report does not depend on who was first
    numbers = _summarise(ordered, tokenizer)
    _write(url, config, numbers, ordered, tokenizer.autoencoder.quantizer.codebook.numpy())
    for failure in (part.failure for part in ordered if part.failure):
        print(f"evaluate: failed shard: {failure}")
    return 3 if any(part.failure for part in ordered) else 0


class EvaluateWorker(cluster.ShardWorker):
    """Holds the tokenizer; encodes, decodes and compares."""

    def __init__(self, tokenizer_url: str, options: TokensConfig, pictures: int, **resources: Any):
        super().__init__(**resources)
        self.tokenizer = load_tokenizer(tokenizer_url, self.device)
        self.options, self.pictures = options, pictures

    def process(self, shard: Shard) -> tuple[str, Part]:
        part = Part(np.zeros(self.tokenizer.codebook_size, dtype=np.int64))
        quarantined: list[Quarantined] = []
        try:
            for batch in decoded_batches(shard.url, self.tokenizer, self.options, quarantined):
                self._add(batch, part)
        except ShardError as error:
            part.failure = str(error)
        part.num_bad = len(quarantined)
        return shard.url, part

    def _add(self, batch: list[Item], part: Part) -> None:
        tokenizer = self.tokenizer
        arrays = [item.decoded.array for item in batch]
        z = tokenizer.latents(arrays)
        tokens = tokenizer.quantize(z)
        rebuilt = tokenizer.decode(tokens, [item.decoded.size for item in batch])
        # measured on what a user would see: whole pixels, without the padding
        x, x_hat = (tokenizer.modality.batch(group, factor=1) for group in (arrays, rebuilt))
        for name, values in tokenizer.modality.metrics(x, x_hat).items():
            part.metrics[name] += values.tolist()
        counts = np.bincount(np.concatenate([t.ravel() for t in tokens]), minlength=tokenizer.codebook_size)
        part.counts += counts
        part.batch_perplexities.append(perplexity(counts))
        part.batch_tokens.append(int(counts.sum()))
        if sum(map(len, part.latents)) < PLOTTED_LATENTS:
            part.latents.append(z.flatten(0, -2).cpu().numpy())
        for item, array in list(zip(batch, rebuilt, strict=True))[: self.pictures - len(part.examples)]:
            to_bytes = tokenizer.modality.to_bytes
            part.examples.append((item.sample.key, to_bytes(item.decoded.array), to_bytes(array)))


def _summarise(parts: list[Part], tokenizer: Tokenizer) -> dict[str, Any]:
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id}
    metrics: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, values in part.metrics.items():
            metrics[name] += values
    if not metrics:
        raise ConfigError("no sample could be evaluated: every shard failed or is empty")
    numbers["num_samples"] = len(next(iter(metrics.values())))
    numbers["num_bad"] = sum(part.num_bad for part in parts)
    for name, values in metrics.items():
        defined = [value for value in values if not math.isnan(value)]
        numbers[name] = float(np.mean(defined)) if defined else math.nan
    counts = sum((part.counts for part in parts), np.zeros(tokenizer.codebook_size, dtype=np.int64))
    numbers |= usage(counts, tokenizer.autoencoder.quantizer.target_size)
    perplexities = [p for part in parts for p in part.batch_perplexities]
    numbers["perplexity_per_batch"] = float(np.mean(perplexities))
    numbers["tokens_per_batch"] = float(np.mean([n for part in parts for n in part.batch_tokens]))
    return numbers


def _write(url: str, config: Config, numbers: dict[str, Any], parts: list[Part], codebook: np.ndarray) -> None:
    name = url.rsplit("/", 1)[1]
    base = storage.join(url.rsplit("/", 2)[0], "reports", f"evaluate-{name}")
    examples = [example for part in parts for example in part.examples][: config.limit]
    z = np.concatenate([rows for part in parts for rows in part.latents])[:PLOTTED_LATENTS]
    counts = np.sum([part.counts for part in parts], axis=0)
    sections = [
        table(numbers),
        "<h2>Original and reconstruction</h2>",
        *[pair(original, rebuilt, key) for key, original, rebuilt in examples],
        "<h2>Codes</h2>",
        picture(usage_png(counts)),
        picture(latents_png(z, codebook)),
    ]
    storage.replace(f"{base}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    storage.replace(f"{base}.html", page(f"Evaluation of {name}", sections))
    storage.replace(f"{base}.png", sheet_png([(original, rebuilt) for _, original, rebuilt in examples]))
    shown = ("num_samples", "psnr", "ssim", "cvu", "cvu_target", "perplexity", "perplexity_per_batch", "utilisation")
    print("evaluate: " + "  ".join(f"{key} {numbers[key]:.4g}" for key in shown if key in numbers))
    print(f"evaluate: report at {base}.html, pictures at {base}.png")
