"""Quality and codebook usage on held-out shards: `tokenizer`, `data.shards`, `metrics`, `evaluate.num_examples`.

Writes RUN/reports/evaluate-<tokenizer>.json, .html (originals beside reconstructions) and .png (a sheet of
`evaluate.num_examples` pairs).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jobs.actors.run import EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import check_limits, check_member, load_tokenizer, tokenizer_url
from jobs.config import Config, ConfigError, checked
from jobs.reports.pages.document import in_words
from jobs.reports.pages.evaluation import EvaluationReport, evaluation_page
from jobs.reports.pages.example import Example, Extremes, example_of
from jobs.reports.pages.index import write_index
from jobs.reports.pages.metrics import ranking
from jobs.reports.plots import sheet_png
from jobs.shards import DecodedSample, ShardReader, apply_or_quarantine
from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.errors import ShardError
from pipeline.tokens import Quarantined
from tokenizer.evaluation import Evaluation
from tokenizer.modalities.image.frechet import about
from tokenizer.tokenizer import Tokenizer

PLOTTED_LATENTS = 4000
EXTREMES = 4  # worst and best samples that the page shows, each
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
    num_extremes = min(EXTREMES, config.evaluate.num_examples)
    settings = {
        "load": partial(load_tokenizer, url),
        "options": config.tokens,
        "metrics": config.metrics,
        "member": config.data.member,
        "num_examples": -(-config.evaluate.num_examples // len(shards)),
        "num_extremes": num_extremes,
    }
    found = run_shards("evaluate", shards, EvaluateWorker, settings, config.workers)
    whole, extremes, results = merged(found, shards, tokenizer, num_extremes)
    failures = [result.failure for result in results if result.failure]
    print_failures("evaluate", failures)
    if not whole.sizes:
        raise ConfigError("no sample could be evaluated: every shard failed or is empty; see the messages above")
    numbers = numbers_of(whole, results, tokenizer, inputs.id)
    report = write_report(url, config, numbers, whole, results, extremes, tokenizer)
    shown = [key for key in ("num_samples", *whole.quality, *USAGE, "bits_per_pixel", "kbps") if key in numbers]
    line = [f"{key} {numbers[key]:{'' if isinstance(numbers[key], int) else '.4g'}}" for key in shown]
    print(f"evaluate: {'  '.join(line)}")
    for name in whole.sums:
        print(f"evaluate: {about(name, numbers)}")
    print(f"evaluate: report at {report}.html, pictures at {report}.png")
    return 3 if failures else 0


def merged(
    found: Iterable["Evaluated"], shards: Sequence[Shard], tokenizer: Tokenizer, num_extremes: int
) -> tuple[Evaluation, Extremes, list["Evaluated"]]:
    """All shards as one: the evaluation, the best and worst samples, and the results in the order of the shards.

    Nothing depends on the order in which the results come.
    """
    by_url: dict[str, Evaluated] = {}
    whole, extremes = Evaluation.empty(tokenizer), Extremes(num_extremes)
    for result in found:
        by_url[result.shard.url] = result
        if result.evaluation is not None:
            whole.take_sums(result.evaluation)  # 67 MB per shard: they must not accumulate here
        extremes.merge(result.extremes)
        result.extremes = Extremes(0)  # neither must these
    results = [by_url[shard.url] for shard in shards]
    for result in results:
        if result.evaluation is not None:
            whole.merge(result.evaluation)
    return whole, extremes, results


def numbers_of(
    whole: Evaluation, results: Sequence["Evaluated"], tokenizer: Tokenizer, input_manifest_id: str
) -> dict[str, Any]:
    """The numbers of the report."""
    numbers: dict[str, Any] = {"tokenizer_id": tokenizer.id, "input_manifest_id": input_manifest_id}
    numbers |= {"num_bad": sum(result.num_quarantined for result in results)}
    return numbers | whole.summary(tokenizer)


@dataclass
class Evaluated(ShardResult):
    """What one shard adds to the report. evaluation: None if its workers died."""

    evaluation: Evaluation | None = None
    examples: list[Example] = field(default_factory=list)
    extremes: Extremes = field(default_factory=lambda: Extremes(0))
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

    def __init__(self, metrics: dict[str, Any], num_examples: int, num_extremes: int, **rest: Any):
        super().__init__(**rest)
        self.quality = self.encoder.modality.metrics(metrics).to(self.device)
        self.num_examples, self.num_extremes = num_examples, num_extremes

    def work(self, shard: Shard) -> ShardResult:
        result = Evaluated(shard, evaluation=Evaluation.empty(self.encoder), extremes=Extremes(self.num_extremes))
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
        if pairs:
            self._keep(pairs, result)

    def _keep(self, pairs: list[tuple[DecodedSample, np.ndarray]], result: Evaluated) -> None:
        """Keeps the samples to show. pairs: the last ones that were added to the evaluation."""
        assert result.evaluation is not None
        latest = {name: values[-len(pairs) :] for name, values in result.evaluation.metrics.items()}
        ranked_by = ranking(list(latest))
        for number, (one, reconstruction) in enumerate(pairs):
            metrics = {name: values[number] for name, values in latest.items()}
            make = partial(self._example, one, reconstruction, metrics)
            if len(result.examples) < self.num_examples:
                result.examples.append(make())
            if ranked_by is not None:
                result.extremes.offer(metrics[ranked_by], f"{result.shard.url} {one.sample.index:09d}", make)

    def _example(self, one: DecodedSample, reconstruction: np.ndarray, metrics: dict[str, float]) -> Example:
        [tokens] = self.encoder.encode_batch([one.decoded.array])
        pair = (one.decoded.array, reconstruction)
        return example_of(self.encoder.modality, one.sample.key, pair, metrics, tokens)


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


def write_report(
    url: str,
    config: Config,
    numbers: dict[str, Any],
    whole: Evaluation,
    results: list[Evaluated],
    extremes: Extremes,
    tokenizer: Tokenizer,
) -> str:
    """Writes the report. Returns its URL without the extension."""
    base = _base(url, config, numbers)
    examples = [example for result in results for example in result.examples][: config.evaluate.num_examples]
    report = EvaluationReport(
        name=url.rsplit("/", 1)[1],
        corpus=in_words(config.to_dict()["data"]["shards"]),
        command=config.command,
        numbers=numbers,
        values=dict(whole.metrics),
        counts=whole.counts,
        ranked_by=ranking(list(whole.metrics)),
        examples=examples,
        extremes=extremes,
        latents=np.concatenate([rows for result in results for rows in result.latents])[:PLOTTED_LATENTS],
        others=_others(base, numbers),
    )
    storage.replace(f"{base}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    storage.replace(f"{base}.html", evaluation_page(report, tokenizer))
    if examples:
        storage.replace(f"{base}.png", sheet_png([example.views for example in examples]))
    write_index(base.rsplit("/", 1)[0])
    return base


def _others(base: str, numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of other tokenizers of this run on the same samples, by name."""
    found = {}
    for file in storage.glob(storage.join(base.rsplit("/", 1)[0], "evaluate-*.json")):
        other = json.loads(storage.read(file.url))
        ids = (other.get("input_manifest_id"), other.get("tokenizer_id"))
        if ids[0] == numbers["input_manifest_id"] and ids[1] != numbers["tokenizer_id"]:
            found[file.url.rsplit("/", 1)[1].removeprefix("evaluate-").removesuffix(".json")] = other
    return found
