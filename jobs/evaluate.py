"""Quality and codebook usage on held-out shards: `tokenizer`, `data.shards`. With a picture report.

Writes RUN/reports/evaluate-<tokenizer>.json, .html (originals beside reconstructions) and .png (a sheet of them).
"""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jobs.actors.run import EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import load_tokenizer, tokenizer_url
from jobs.config import Config, ConfigError, checked
from jobs.reports.html import Example, page, picture, side_by_side, table
from jobs.reports.plots import latents_png, sheet_png, usage_png
from jobs.shards import Item, decoded_batches, one_by_one_if_bad
from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.errors import ShardError
from pipeline.tokens.output import Quarantined
from tokenizer.evaluation import Evaluation
from tokenizer.modalities.image.frechet import about
from tokenizer.quantizers.base.quantizer import Quantizer
from tokenizer.tokenizer import Tokenizer

PLOTTED_LATENTS = 4000


@dataclass
class Evaluated(ShardResult):
    """What one shard adds to the report; evaluation is None where its workers died."""

    evaluation: Evaluation | None = None
    examples: list[Example] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    num_bad: int = 0

    def counts(self) -> dict[str, float]:
        return {"samples": len(self.evaluation.sizes) if self.evaluation else 0, "bad_samples": self.num_bad}


def run(config: Config) -> int:
    config.require("data.shards")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    shards = find_shards(config.data.shards).shards
    with checked("metrics"):
        tokenizer.modality.metrics(config.metrics)
    settings = {
        "load": partial(load_tokenizer, url),
        "options": config.tokens,
        "metrics": config.metrics,
        "pictures": -(-config.evaluate.num_examples // len(shards)),
    }
    parts: dict[str, Evaluated] = {}
    whole = Evaluation.empty(tokenizer)
    for part in run_shards("evaluate", shards, EvaluateWorker, settings, config.workers):
        parts[part.shard.url] = part
        if part.evaluation is not None:
            whole.take_sums(part.evaluation)  # 67 MB a shard, so they must not pile up here
    ordered = [parts[shard.url] for shard in shards]  # so that the report does not depend on who was first
    _merge(whole, ordered)
    num_bad = sum(part.num_bad for part in ordered)
    numbers = {"tokenizer_id": tokenizer.id, "num_bad": num_bad, **whole.summary(tokenizer)}
    _write(url, config, numbers, whole, ordered, tokenizer.autoencoder.quantizer)
    failures = [part.failure for part in ordered if part.failure]
    print_failures("evaluate", failures)
    return 3 if failures else 0


class EvaluateWorker(EncodeWorker[Tokenizer]):
    """Holds the tokenizer; encodes, decodes and compares."""

    result = Evaluated

    def __init__(self, metrics: dict[str, Any], pictures: int, **rest: Any):
        super().__init__(**rest)
        self.quality = self.encoder.modality.metrics(metrics).to(self.device)
        self.pictures = pictures

    def work(self, shard: Shard) -> ShardResult:
        part = Evaluated(shard, evaluation=Evaluation.empty(self.encoder))
        quarantined: list[Quarantined] = []
        try:
            for batch in decoded_batches(shard.url, self.encoder, self.options, quarantined):
                self._add(batch, part, quarantined)
                self.tick(shard)
        except ShardError as error:  # what came before the break counts
            part.failure = str(error)
        part.num_bad = len(quarantined)
        return part

    def _add(self, batch: list[Item], part: Evaluated, bad: list[Quarantined]) -> None:
        evaluation, tokenizer = part.evaluation, self.encoder
        assert evaluation is not None

        def rebuild(items: list[Item]) -> list[np.ndarray]:
            return evaluation.add(tokenizer, [item.decoded for item in items], self.quality)

        pairs = one_by_one_if_bad(batch, rebuild, bad)
        if pairs and sum(map(len, part.latents)) < PLOTTED_LATENTS:
            latents = tokenizer.latents([item.decoded.array for item, _ in pairs])
            part.latents += [z.flatten(0, -2).cpu().numpy() for z in latents]
        for item, rebuilt in pairs[: self.pictures - len(part.examples)]:
            pair = (item.decoded.array, rebuilt)
            views = tuple(map(tokenizer.modality.view, pair))
            files = tuple(map(tokenizer.modality.to_bytes, pair))
            part.examples.append(Example(item.sample.key, tokenizer.modality.mime, views, files))


def _merge(whole: Evaluation, parts: list[Evaluated]) -> None:
    for part in parts:
        if part.evaluation is not None:
            whole.merge(part.evaluation)
    if not whole.sizes:
        raise ConfigError("no sample could be evaluated: every shard failed or is empty")


def _write(
    url: str, config: Config, numbers: dict[str, Any], whole: Evaluation, parts: list[Evaluated], quantizer: Quantizer
) -> None:
    name = url.rsplit("/", 1)[1]
    base = storage.join(url.rsplit("/", 2)[0], "reports", f"evaluate-{name}")
    examples = [example for part in parts for example in part.examples][: config.evaluate.num_examples]
    z = np.concatenate([rows for part in parts for rows in part.latents])[:PLOTTED_LATENTS, : quantizer.dim]
    codebook = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    sections = [
        table(numbers),
        "<h2>Original and reconstruction</h2>",
        *map(side_by_side, examples),
        "<h2>Codes</h2>",
        picture(usage_png(whole.counts.sum(axis=0))),
        picture(latents_png(z, codebook)),
    ]
    storage.replace(f"{base}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    storage.replace(f"{base}.html", page(f"Evaluation of {name}", sections))
    if examples:
        storage.replace(f"{base}.png", sheet_png([example.views for example in examples]))
    used = ("cvu", "cvu_target", "perplexity", "perplexity_per_batch", "utilisation")
    shown = ("num_samples", *whole.quality, *used, "bits_per_pixel", "kbps")
    told = [f"{key} {numbers[key]:{'' if isinstance(numbers[key], int) else '.4g'}}" for key in shown if key in numbers]
    print(f"evaluate: {'  '.join(told)}")
    for name in whole.sums:
        print(f"evaluate: {about(name, numbers)}")
    print(f"evaluate: report at {base}.html, pictures at {base}.png")
