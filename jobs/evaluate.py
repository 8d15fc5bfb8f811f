"""Quality and codebook usage on held-out shards: `tokenizer`, `data.shards`. With a picture report.

Writes RUN/reports/evaluate-<tokenizer>.json, .html (originals beside reconstructions) and .png (a sheet of them).
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs import cluster
from jobs.config import Config, ConfigError, TokensConfig, checked
from jobs.frozen import load_tokenizer, tokenizer_url
from jobs.progress import Progress
from jobs.reading import Item, decoded_batches
from jobs.report import Example, latents_png, page, picture, sheet_png, side_by_side, table, usage_png
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.manifest import Shard, find_shards
from pipeline.tokens.output import Quarantined
from tokenizer.errors import BadSample
from tokenizer.evaluation import Evaluation
from tokenizer.quantizer import Quantizer
from tokenizer.tokenizer import Tokenizer

PLOTTED_LATENTS = 4000


@dataclass
class Part:
    """What one shard adds to the report."""

    evaluation: Evaluation
    examples: list[Example] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    num_bad: int = 0
    failure: str | None = None


def run(config: Config) -> int:
    config.require("data.shards")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    shards = find_shards(config.data.shards).shards
    with checked("metrics"):
        tokenizer.modality.metrics(config.metrics)
    cluster.start()
    settings = {
        "tokenizer_url": url,
        "options": config.tokens,
        "metrics": config.metrics,
        "pictures": -(-config.limit // len(shards)),
    }
    progress = Progress("evaluate", total=len(shards), unit="shards")
    parts: dict[str, Part] = {}
    for shard_url, part in cluster.map_shards(shards, EvaluateWorker, settings, config.workers):
        parts[shard_url] = part
        progress.advance(samples=len(part.evaluation.sizes), bad_samples=part.num_bad)
    progress.close()
    ordered = [parts[shard.url] for shard in shards]  # so that the report does not depend on who was first
    numbers = _summarise(ordered, tokenizer)
    _write(url, config, numbers, ordered, tokenizer.autoencoder.quantizer)
    for failure in (part.failure for part in ordered if part.failure):
        print(f"evaluate: failed shard: {failure}")
    return 3 if any(part.failure for part in ordered) else 0


class EvaluateWorker(cluster.ShardWorker):
    """Holds the tokenizer; encodes, decodes and compares."""

    def __init__(
        self, tokenizer_url: str, options: TokensConfig, metrics: dict[str, Any], pictures: int, **resources: Any
    ):
        super().__init__(**resources)
        self.tokenizer = load_tokenizer(tokenizer_url, self.device)
        self.quality = self.tokenizer.modality.metrics(metrics).to(self.device)
        self.options, self.pictures = options, pictures

    def process(self, shard: Shard) -> tuple[str, Part]:
        part = Part(Evaluation.empty(self.tokenizer))
        quarantined: list[Quarantined] = []
        try:
            for batch in decoded_batches(shard.url, self.tokenizer, self.options, quarantined):
                self._add_or_leave_out(batch, part, quarantined)
        except ShardError as error:
            part.failure = str(error)
        part.num_bad = len(quarantined)
        return shard.url, part

    def _add_or_leave_out(self, batch: list[Item], part: Part, bad: list[Quarantined]) -> None:
        """A sample whose latents are NaN counts as bad, and its neighbours do not."""
        try:
            self._add(batch, part)
        except BadSample as error:
            for item in batch if len(batch) > 1 else []:
                self._add_or_leave_out([item], part, bad)
            if len(batch) == 1:
                sample = batch[0].sample
                bad.append(Quarantined(sample.key, sample.index, "encode", "BadSample", str(error)))

    def _add(self, batch: list[Item], part: Part) -> None:
        tokenizer = self.tokenizer
        rebuilt = part.evaluation.add(tokenizer, [item.decoded for item in batch], self.quality)
        if sum(map(len, part.latents)) < PLOTTED_LATENTS:
            latents = tokenizer.latents([item.decoded.array for item in batch])
            part.latents += [z.flatten(0, -2).cpu().numpy() for z in latents]
        for item, array in list(zip(batch, rebuilt, strict=True))[: self.pictures - len(part.examples)]:
            pair = (item.decoded.array, array)
            views = tuple(map(tokenizer.modality.view, pair))
            files = tuple(map(tokenizer.modality.to_bytes, pair))
            part.examples.append(Example(item.sample.key, tokenizer.modality.mime, views, files))


def _summarise(parts: list[Part], tokenizer: Tokenizer) -> dict[str, Any]:
    whole = Evaluation.empty(tokenizer)
    for part in parts:
        whole.merge(part.evaluation)
    if not whole.sizes:
        raise ConfigError("no sample could be evaluated: every shard failed or is empty")
    num_bad = sum(part.num_bad for part in parts)
    return {"tokenizer_id": tokenizer.id, "num_bad": num_bad, **whole.summary(tokenizer)}


def _write(url: str, config: Config, numbers: dict[str, Any], parts: list[Part], quantizer: Quantizer) -> None:
    name = url.rsplit("/", 1)[1]
    rate = ("bits_per_pixel", "kbps")
    base = storage.join(url.rsplit("/", 2)[0], "reports", f"evaluate-{name}")
    examples = [example for part in parts for example in part.examples][: config.limit]
    z = np.concatenate([rows for part in parts for rows in part.latents])[:PLOTTED_LATENTS, : quantizer.dim]
    codebook = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    counts = np.sum([part.evaluation.counts for part in parts], axis=(0, 1))
    sections = [
        table(numbers),
        "<h2>Original and reconstruction</h2>",
        *map(side_by_side, examples),
        "<h2>Codes</h2>",
        picture(usage_png(counts)),
        picture(latents_png(z, codebook)),
    ]
    storage.replace(f"{base}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    storage.replace(f"{base}.html", page(f"Evaluation of {name}", sections))
    if examples:
        storage.replace(f"{base}.png", sheet_png([example.views for example in examples]))
    quality = list(dict.fromkeys(name for part in parts for name in part.evaluation.metrics))
    shown = ("num_samples", *quality, "cvu", "cvu_target", "perplexity", "perplexity_per_batch", "utilisation", *rate)
    told = [f"{key} {numbers[key]:{'' if isinstance(numbers[key], int) else '.4g'}}" for key in shown if key in numbers]
    print(f"evaluate: {'  '.join(told)}")
    print(f"evaluate: report at {base}.html, pictures at {base}.png")
