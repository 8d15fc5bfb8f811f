"""Quality and codebook usage on held-out shards: `tokenizer`, `data.shards`, `metrics`, `evaluate.num_examples`.

Writes RUN/reports/evaluate-<tokenizer>.json, .html (originals beside reconstructions) and .png (a sheet of
`evaluate.num_examples` pairs).
"""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jobs.actors.run import EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import check_limits, check_member, load_tokenizer, tokenizer_url
from jobs.config import Config, ConfigError, checked
from jobs.reports.html import Example, page, picture, side_by_side, table
from jobs.reports.plots import latents_png, sheet_png, usage_png
from jobs.shards import DecodedSample, ShardReader, apply_or_quarantine
from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.errors import ShardError
from pipeline.tokens import Quarantined
from tokenizer.evaluation import Evaluation
from tokenizer.modalities.image.frechet import about
from tokenizer.quantizers.base.quantizer import Quantizer
from tokenizer.tokenizer import Tokenizer

PLOTTED_LATENTS = 4000
USAGE = ("cvu", "cvu_target", "perplexity", "perplexity_per_batch", "utilisation")


def run(config: Config) -> int:
    config.require("data.shards")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    tokenizer.require_decoder()
    check_member(config.data.member, tokenizer.modality)
    check_limits(tokenizer.modality, config.tokens)
    inputs = find_shards(config.data.shards)
    shards = inputs.shards
    with checked("metrics"):
        tokenizer.modality.metrics(config.metrics)
    settings = {
        "load": partial(load_tokenizer, url),
        "options": config.tokens,
        "metrics": config.metrics,
        "member": config.data.member,
        "num_examples": -(-config.evaluate.num_examples // len(shards)),
    }
    by_url: dict[str, Evaluated] = {}
    whole = Evaluation.empty(tokenizer)
    for result in run_shards("evaluate", shards, EvaluateWorker, settings, config.workers):
        by_url[result.shard.url] = result
        if result.evaluation is not None:
            whole.take_sums(result.evaluation)  # 67 MB per shard: they must not accumulate here
    results = [by_url[shard.url] for shard in shards]  # so that the report does not depend on the workers' timing
    for result in results:
        if result.evaluation is not None:
            whole.merge(result.evaluation)
    failures = [result.failure for result in results if result.failure]
    print_failures("evaluate", failures)
    if not whole.sizes:
        raise ConfigError("no sample could be evaluated: every shard failed or is empty; see the messages above")
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id, "input_manifest_id": inputs.id}
    numbers |= {"num_bad": sum(result.num_quarantined for result in results)}
    numbers |= whole.summary(tokenizer)
    report = _write(url, config, numbers, whole, results, tokenizer.autoencoder.quantizer)
    shown = [key for key in ("num_samples", *whole.quality, *USAGE, "bits_per_pixel", "kbps") if key in numbers]
    line = [f"{key} {numbers[key]:{'' if isinstance(numbers[key], int) else '.4g'}}" for key in shown]
    print(f"evaluate: {'  '.join(line)}")
    for name in whole.sums:
        print(f"evaluate: {about(name, numbers)}")
    print(f"evaluate: report at {report}.html, pictures at {report}.png")
    return 3 if failures else 0


@dataclass
class Evaluated(ShardResult):
    """What one shard adds to the report. evaluation: None if its workers died."""

    evaluation: Evaluation | None = None
    examples: list[Example] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)  # [N, in_dim], a few for the plot
    num_quarantined: int = 0

    def counts(self) -> dict[str, float]:
        return {
            "samples": len(self.evaluation.sizes) if self.evaluation else 0,
            "quarantined": self.num_quarantined,
        }


class EvaluateWorker(EncodeWorker[Tokenizer]):
    """Encodes and decodes the samples of a shard, and compares."""

    result = Evaluated

    def __init__(self, metrics: dict[str, Any], num_examples: int, **rest: Any):
        super().__init__(**rest)
        self.quality = self.encoder.modality.metrics(metrics).to(self.device)
        self.num_examples = num_examples

    def work(self, shard: Shard) -> ShardResult:
        result = Evaluated(shard, evaluation=Evaluation.empty(self.encoder))
        reader = ShardReader(shard, self.encoder.modality, self.options, member=self.member)
        try:
            for batch in reader.batches():
                self._add(batch, result, reader.quarantined)
                self.tick(shard)
        except ShardError as error:  # the samples before the error count
            result.failure = str(error)
        result.num_quarantined, result.notes = len(reader.quarantined), reader.notes
        return result

    def _add(self, batch: list[DecodedSample], result: Evaluated, quarantined: list[Quarantined]) -> None:
        evaluation, tokenizer = result.evaluation, self.encoder
        assert evaluation is not None

        def reconstruct(samples: list[DecodedSample]) -> list[np.ndarray]:
            return evaluation.add(tokenizer, [one.decoded for one in samples], self.quality)

        pairs = apply_or_quarantine(reconstruct, batch, quarantined)
        if pairs and sum(map(len, result.latents)) < PLOTTED_LATENTS:
            # one by one, because the whole batch may not fit into memory
            latents = [tokenizer.latents([one.decoded.array])[0] for one, _ in pairs]
            result.latents += [z.flatten(0, -2).cpu().numpy() for z in latents]
        for one, reconstruction in pairs[: self.num_examples - len(result.examples)]:
            pair = (one.decoded.array, reconstruction)
            views = tuple(map(tokenizer.modality.view, pair))
            files = tuple(map(tokenizer.modality.to_bytes, pair))
            result.examples.append(Example(one.sample.key, tokenizer.modality.mime, views, files))


def _base(url: str, config: Config, numbers: dict[str, Any]) -> str:
    """URL of the report without the extension: in `run`, or else beside the tokenizer's folder.

    A report about other shards or another tokenizer stays; the new one then has the ids of both
    in its name.
    """
    run_url = storage.normalise(config.run) if config.run else url.rsplit("/", 2)[0]
    base = storage.join(run_url, "reports", f"evaluate-{url.rsplit('/', 1)[1]}")
    existing = storage.read_if_exists(f"{base}.json")
    if existing is None:
        return base
    before = json.loads(existing)
    same = all(before.get(key, numbers[key]) == numbers[key] for key in ("tokenizer_id", "input_manifest_id"))
    return base if same else f"{base}-{numbers['tokenizer_id'][:8]}-{numbers['input_manifest_id'][:8]}"


def _write(
    url: str, config: Config, numbers: dict[str, Any], whole: Evaluation, results: list[Evaluated], quantizer: Quantizer
) -> str:
    """Writes the report. Returns its URL without the extension."""
    name = url.rsplit("/", 1)[1]
    base = _base(url, config, numbers)
    examples = [example for result in results for example in result.examples][: config.evaluate.num_examples]
    z = np.concatenate([rows for result in results for rows in result.latents])[:PLOTTED_LATENTS, : quantizer.dim]
    codebook = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    sections = [
        table(numbers),
        "<h2>Originals and reconstructions</h2>",
        *map(side_by_side, examples),
        "<h2>Codes</h2>",
        picture(usage_png(whole.counts.sum(axis=0))),
        picture(latents_png(z, codebook)),
    ]
    storage.replace(f"{base}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    storage.replace(f"{base}.html", page(f"Evaluation of {name}", sections))
    if examples:
        storage.replace(f"{base}.png", sheet_png([example.views for example in examples]))
    return base
