"""The page of `evaluate`: quality, pairs, best and worst samples, and the use of the codes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.reports.pages import charts, codes
from jobs.reports.pages.cards import SCALES, cards_of, thumbnail
from jobs.reports.pages.document import Header, render
from jobs.reports.pages.example import Example, Extremes
from jobs.reports.pages.metrics import Metric, metric
from jobs.reports.pages.pictures import as_array, flat_patches, psnr
from tokenizer.tokenizer import Tokenizer

USAGE = ("perplexity", "utilisation")
RATES = ("bits_per_pixel", "kbps")


@dataclass
class EvaluationReport:
    """What the page shows. values: of each sample, by metric. examples: the first ones of the corpus. latents [N, D].
    others: numbers of other tokenizers of the run on the same samples, by name.
    """

    name: str
    corpus: str
    command: str
    numbers: dict[str, Any]
    values: dict[str, list[float]]
    counts: np.ndarray  # [Q, K]
    ranked_by: str | None
    examples: list[Example]
    extremes: Extremes
    latents: np.ndarray
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rate(self) -> str:
        return next(name for name in RATES if name in self.numbers)


def evaluation_page(report: EvaluationReport, tokenizer: Tokenizer) -> bytes:
    colors = codes.CodeColors.of(codes.first_codebook(tokenizer))
    examples, badges = ordered(report)
    cards = cards_of(examples, badges, report.ranked_by, colors)
    header = _header(report, tokenizer)
    header.thumbnail = thumbnail(report.examples)
    patches = codes.patches(tokenizer, report.counts[0])
    return render(
        "evaluation.html",
        header,
        report.numbers,
        cards=cards,
        baseline=_baseline(report.examples, tokenizer),
        scale=SCALES[cards.kind]() if cards.cards else "",
        ranked_by=report.ranked_by,
        histograms=_histograms(report),
        usage=charts.usage_chart(report.counts.sum(axis=0)),
        usage_words=f"{codes.usage_sentence(report.numbers)} {codes.usage_facts(report.counts.sum(axis=0))}",
        latents=_map(report, tokenizer),
        patches=patches,
        codes=_codes(report.counts[0], patches),
        others=_others(report),
    )


def ordered(report: EvaluationReport) -> tuple[list[Example], list[list[str]]]:
    """Each example once: the worst, the best, and the first of the corpus. And its badges."""
    total = sum(value == value for value in report.values.get(report.ranked_by or "", []))
    up = metric(report.ranked_by).better > 0 if report.ranked_by else True
    sides = {"worst": report.extremes.low, "best": report.extremes.high}
    if not up:
        sides = {"worst": report.extremes.high, "best": report.extremes.low}
    shown: dict[str, tuple[Example, list[str]]] = {}
    for word, ranked in sides.items():
        for rank, (_, _, example) in enumerate(ranked, start=1):
            badge = word if rank == 1 else f"{word} {rank} of {total}"
            shown.setdefault(example.key, (example, []))[1].append(badge)
    for example in report.examples:
        shown.setdefault(example.key, (example, []))
    return [example for example, _ in shown.values()], [badges for _, badges in shown.values()]


def _header(report: EvaluationReport, tokenizer: Tokenizer) -> Header:
    quantizer, numbers = tokenizer.autoencoder.quantizer, report.numbers
    layers, bad = quantizer.num_quantizers, numbers["num_bad"]
    unit = "pixels a side" if report.rate == "bits_per_pixel" else "audio samples"
    facts = {
        "method": quantizer.name + (f", {layers} quantizers" if layers > 1 else ""),
        "codebook": f"{quantizer.codebook_size:,} codes",
        "a token covers": f"{tokenizer.autoencoder.factor} {unit}",
        "bits": f"{_bits(tokenizer):.4g} per token, {metric(report.rate).with_unit(numbers[report.rate])}",
        "corpus": report.corpus,
        "samples": f"{numbers['num_samples']:,}" + (f", and {bad:,} quarantined" if bad else ""),
        "tokenizer": tokenizer.id,
        "codes' id": tokenizer.codebook_id,
        "list of shards": numbers["input_manifest_id"],
    }
    headline = [name for name in report.values if name != "mse"] + [report.rate, *USAGE]
    title = f"Evaluation of {report.name}"
    return Header("evaluation", title, _lead(report, tokenizer), facts, headline, report.command)


def _bits(tokenizer: Tokenizer) -> float:
    """Of all tokens at one place of the grid."""
    return float(np.log2(tokenizer.codebook_size)) * tokenizer.autoencoder.quantizer.num_quantizers


def _lead(report: EvaluationReport, tokenizer: Tokenizer) -> str:
    """How good it is, and against what."""
    numbers, rate = report.numbers, metric(report.rate)
    shown = [name for name in report.values if name != "mse"][:2]
    quality = " and ".join(f"{metric(name).label} {metric(name).with_unit(numbers[name])}" for name in shown)
    raw, name = _raw(report, tokenizer)
    size = f"{rate.with_unit(numbers[report.rate])}, {raw / numbers[report.rate]:,.0f} times less than {name}"
    words = f"On {numbers['num_samples']:,} samples the reconstructions reach {quality}. The tokens take {size}."
    return f"{words} {_place(report)}".rstrip()


def _place(report: EvaluationReport) -> str:
    """The place among the tokenizers of the run on these samples; empty if there is only one."""
    name = report.ranked_by
    others = [numbers[name] for numbers in report.others.values() if name in numbers]
    if name is None or not others:
        return ""
    sign = -1 if metric(name).better > 0 else 1
    place = 1 + sum(sign * other < sign * report.numbers[name] for other in others)
    return f"By {metric(name).label} it is number {place} of {1 + len(others)} tokenizers of this run on these samples."


def _raw(report: EvaluationReport, tokenizer: Tokenizer) -> tuple[float, str]:
    """The rate of the samples without compression, in the unit of report.rate, and what it is."""
    if report.rate == "bits_per_pixel":
        return 24.0, "8-bit RGB"
    rate = tokenizer.modality.config.sample_rate
    return rate * 16 / 1000, f"16-bit mono at {rate / 1000:g} kHz"


def _baseline(examples: Sequence[Example], tokenizer: Tokenizer) -> str:
    """The PSNR of a simpler code, for pictures: one colour for each token."""
    pictures = [one for one in examples if one.mime.startswith("image/")]
    if not pictures:
        return ""
    factor = tokenizer.autoencoder.factor
    pairs = [tuple(map(as_array, one.views)) for one in pictures]
    ours = float(np.mean([psnr(original, other) for original, other in pairs]))
    flat = float(np.mean([psnr(original, flat_patches(original, factor)) for original, _ in pairs]))
    return (
        f"For comparison: if each {factor} x {factor} patch of the first {len(pairs)} samples had its mean colour "
        f"(24 bits), PSNR would be {flat:.2f} dB. The tokens ({_bits(tokenizer):.4g} bits) give {ours:.2f} dB."
    )


def _histograms(report: EvaluationReport) -> list[tuple[Metric, Any]]:
    """One for each metric that varies."""
    found = []
    for name, values in report.values.items():
        finite = {value for value in values if value == value}
        if len(finite) > 1:
            known = metric(name)
            found.append((known, charts.histogram(values, f"{known.label}{f' ({known.unit})' if known.unit else ''}")))
    return found


def _map(report: EvaluationReport, tokenizer: Tokenizer) -> Any:
    quantizer = tokenizer.autoencoder.quantizer
    codebook = quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    return charts.scatter(codes.projected(report.latents[:, : quantizer.dim], codebook), "first component", "second")


def _codes(counts: np.ndarray, patches: dict[str, Any] | None) -> dict[str, Any]:
    shares = counts.tolist() if len(counts) <= codes.MOST_COUNTS else {}
    return {"shares": shares, "patches": patches}


def _others(report: EvaluationReport) -> list[tuple[str, dict[str, Any]]]:
    return [(report.name, report.numbers), *report.others.items()] if report.others else []
