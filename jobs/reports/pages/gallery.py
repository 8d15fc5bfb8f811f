"""The page of `view`: rows of a token output, decoded, with their tokens; quarantined samples; usage and lengths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.reports.pages import charts, codes
from jobs.reports.pages.document import Header, in_words, render
from jobs.reports.pages.example import Example
from jobs.reports.pages.pictures import as_array, compact_urls
from jobs.reports.pages.sounds import as_waveform, players_of, spectrogram_url
from pipeline.tokens import Quarantined
from tokenizer.tokenizer import Tokenizer
from tokenizer.usage import usage


@dataclass
class GalleryRow:
    """example: the decoded sample and its tokens. size: of the original. texts: passthrough columns."""

    example: Example
    shard: str
    index: int
    view: int | None
    size: dict[str, int]
    texts: dict[str, str]


@dataclass
class GalleryReport:
    """counts [Q, K] and lengths: of all rows of the shards that were read. quarantined: with the URL of the shard."""

    url: str
    command: str
    about: dict[str, Any]
    num_shards: int
    num_read: int
    num_rows: int = 0
    rows: list[GalleryRow] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), dtype=np.int64))
    lengths: list[int] = field(default_factory=list)
    num_quarantined: int = 0
    quarantined: list[tuple[str, Quarantined]] = field(default_factory=list)


def gallery_page(report: GalleryReport, tokenizer: Tokenizer) -> bytes:
    numbers: dict[str, Any] = {"num_samples": report.num_rows, "num_bad": report.num_quarantined}
    numbers |= usage(report.counts, tokenizer.autoencoder.quantizer.target_size)
    header = Header(
        "tokens", f"Tokens of {_name(report.url)}", _lead(report), _facts(report, tokenizer), [], report.command
    )
    header.in_run = False
    header.headline = ["num_samples", "num_bad", "num_tokens", "perplexity", "utilisation"]
    patches = codes.patches(tokenizer, report.counts[0])
    return render(
        "gallery.html",
        header,
        numbers,
        cards=_cards(report, tokenizer),
        shards=sorted({_name(row.shard) for row in report.rows} | {_name(shard) for shard, _ in report.quarantined}),
        reasons=Counter(sample.message for _, sample in report.quarantined).most_common(20),
        quarantined=[(_name(shard), sample) for shard, sample in report.quarantined],
        num_quarantined=report.num_quarantined,
        usage=charts.usage_chart(report.counts.sum(axis=0)),
        usage_words=f"{codes.usage_sentence(numbers)} {codes.usage_facts(report.counts.sum(axis=0))}",
        lengths=charts.histogram(report.lengths, "tokens of a row") if len(set(report.lengths)) > 1 else None,
        length=report.lengths[0],
        codes={
            "shares": report.counts[0].tolist() if report.counts.shape[1] <= codes.MOST_COUNTS else {},
            "patches": patches,
        },
        part=_part(report),
    )


def _lead(report: GalleryReport) -> str:
    many = report.num_quarantined
    bad = "no sample is" if not many else "one sample is" if many == 1 else f"{many:,} samples are"
    words = f"The output has {report.num_rows:,} rows in {report.num_shards:,} shards, and {bad} in quarantine."
    return f"{words} {_part(report)}"


def _part(report: GalleryReport) -> str:
    """What the page is based on."""
    if report.num_read == report.num_shards:
        read = "Usage and lengths are those of all rows"
    else:
        read = f"Usage and lengths are those of {len(report.lengths):,} rows in {report.num_read} random shards"
    shown = (
        "all of them" if len(report.rows) == report.num_rows else f"{len(report.rows):,} random rows of these shards"
    )
    return f"{read}; {shown} are shown."


def _facts(report: GalleryReport, tokenizer: Tokenizer) -> dict[str, Any]:
    layers = tokenizer.autoencoder.quantizer.num_quantizers
    return {
        "method": tokenizer.autoencoder.quantizer.name,
        "codebook": f"{f'{layers} x ' if layers > 1 else ''}{tokenizer.codebook_size:,} codes",
        "corpus": in_words(report.about["config"].get("data", {}).get("shards", "")),
        "output": report.url,
        "tokenizer": tokenizer.id,
        "codes' id": tokenizer.codebook_id,
    }


def _cards(report: GalleryReport, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    colors = codes.CodeColors.of(codes.first_codebook(tokenizer))
    examples = [row.example for row in report.rows]
    is_picture = tokenizer.modality.mime.startswith("image/")
    media = _pictures(examples) if is_picture else _sounds(examples)
    layers = tokenizer.autoencoder.quantizer.num_quantizers
    cards = []
    for row, medium in zip(report.rows, media, strict=True):
        assert row.example.tokens is not None
        view = [] if row.view is None else [f"view {row.view}"]
        shape = " x ".join(map(str, row.example.tokens.shape))
        size = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in row.size.items())
        card = {**medium, "key": row.example.key, "shard": _name(row.shard), "place": row.index, "badges": view}
        card |= {"size": size, "shape": shape, "texts": row.texts}
        cards.append(card | {"tokens": colors.card(codes.first_layer(row.example.tokens, layers))})
    return cards


def _pictures(examples: Sequence[Example]) -> list[dict[str, Any]]:
    urls = compact_urls([one.views[0] for one in examples])
    sizes = [as_array(one.views[0]).shape[:2] for one in examples]
    return [{"picture": url, "height": h, "width": w, "player": None} for url, (h, w) in zip(urls, sizes, strict=True)]


def _sounds(examples: Sequence[Example]) -> list[dict[str, Any]]:
    sounds = [as_waveform(one.files[0]) for one in examples]
    players, _ = players_of([(sound,) for sound in sounds])
    pictures = [spectrogram_url(*sound, size=(360, 120)) for sound in sounds]
    return [
        {"picture": picture, "height": 120, "width": 360, "player": player and player[0]}
        for picture, player in zip(pictures, players, strict=True)
    ]


def _name(url: str) -> str:
    """The last part of a URL; for an output in a run, with the run before it."""
    parts = url.rstrip("/").rsplit("/", 2)
    return "/".join(parts[-2:]) if parts[-1] == "tokens" else parts[-1]
