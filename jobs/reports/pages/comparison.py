"""The page of `compare`: a table that sorts, plots with error bars, and all methods on the same samples."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.config import Config
from jobs.reports.pages import charts
from jobs.reports.pages.document import Header, in_words, render
from jobs.reports.pages.metrics import Metric, metric, ranking
from jobs.reports.pages.pictures import LOSSLESS_BUDGET, compact_urls

USAGE = ("cvu", "perplexity")
RATES = ("bits_per_pixel", "kbps")
TRAINING = ("psnr", "loss")  # the curve that is shown is the first of them that the methods log
HELD_OUT = "heldout"  # the first table
Row = dict[str, Any]


@dataclass
class ComparisonReport:
    """tables: rows by the name of the corpus; a row is a method and size, with means and `<name>_sd`. columns: names of
    the numbers of each table. notes: lines under each table. results: of the trials. originals: PNGs of the samples
    whose reconstructions the results hold.
    """

    config: Config
    tables: dict[str, list[Row]]
    columns: dict[str, list[str]]
    notes: dict[str, str]
    results: list[Row]
    originals: list[bytes]


def comparison_page(report: ComparisonReport) -> bytes:
    rows = report.tables[HELD_OUT]
    header = Header("comparison", _title(report), _lead(rows), _facts(report), command=report.config.command)
    gallery = _gallery(report)
    header.thumbnail = _thumbnail(gallery)
    corpora = {name: _corpus(report, name) for name in report.tables}
    sizes = sorted({row["K"] for row in rows})
    return render(
        "comparison.html", header, {}, corpora=corpora, sizes=sizes, gallery=gallery, training=_training(report.results)
    )


def _corpus(report: ComparisonReport, name: str) -> dict[str, Any]:
    """The table, notes and plots of one corpus. Quality comes first, and what only says sizes last."""
    rows = report.tables[name]
    quality = [one for one in _quality(rows) if one in report.columns[name]]
    quality.sort(key=lambda one: one == "mse")
    rest = [one for one in report.columns[name] if one not in quality]
    columns = [*quality, *sorted(rest, key=lambda one: not metric(one).better)]
    cells = [_cells(row, rows, columns) for row in rows]
    return {"rows": cells, "columns": columns, "notes": report.notes[name].strip().splitlines(), "plots": plots(rows)}


def _thumbnail(gallery: dict[str, Any] | None) -> str:
    return gallery["rows"][0]["pictures"][0] if gallery and gallery["rows"] else ""


def _title(report: ComparisonReport) -> str:
    methods = len({row["method"] for row in report.tables[HELD_OUT]})
    return (
        f"Comparison of {methods} methods"
        if methods > 1
        else f"{report.tables[HELD_OUT][0]['method']} at several sizes"
    )


def _lead(rows: Sequence[Row]) -> str:
    """Which method is the best, by how much, and at how many sizes."""
    name = ranking(_quality(rows))
    measured = [row for row in rows if name in row]
    if name is None or not measured:
        return "No trial has a result that can be compared."
    known, sizes = metric(name), sorted({row["K"] for row in measured})
    winners = {size: _best([row for row in measured if row["K"] == size], name) for size in sizes}
    first = winners[sizes[-1]]
    words = f"{first['method']} has the best {known.label} at K = {sizes[-1]:,}: {_with_spread(known, first, name)}"
    others = [row for row in measured if row["K"] == sizes[-1] and row is not first]
    if others:
        second = _best(others, name)
        words += f"; the next is {second['method']} with {_with_spread(known, second, name)}"
    if len(sizes) > 1:
        won = sum(row["method"] == first["method"] for row in winners.values())
        words += f". It is the best at {won} of {len(sizes)} sizes"
    return f"{words}."


def _best(rows: Sequence[Row], name: str) -> Row:
    sign = metric(name).better or 1
    return max(rows, key=lambda row: sign * row[name])


def _with_spread(known: Metric, row: Row, name: str) -> str:
    spread = row.get(f"{name}_sd", math.nan)
    return f"{known.with_spread(row[name], spread)} {known.unit}".rstrip()


def _facts(report: ComparisonReport) -> dict[str, Any]:
    config, rows, saved = report.config, report.tables[HELD_OUT], report.config.to_dict()
    samples = next((row["num_samples"] for row in rows if "num_samples" in row), None)
    return {
        "net": f"{config.model.net['name']}, {config.model.modality}",
        "trained on": in_words(saved["data"]["shards"]),
        "evaluated on": in_words(saved["compare"]["heldout"]),
        "samples": f"{samples:,.0f}" if samples else "",
        "sizes": ", ".join(f"{size:,}" for size in sorted({row["K"] for row in rows})),
        "seeds": ", ".join(map(str, config.compare.seeds)),
        "steps": f"{config.train.steps:,} of {config.train.batch_size} samples",
        "trials": f"{len(report.results)}",
    }


def _cells(row: Row, rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    """A row of the table. A value is the best of the rows with the same K if `best` says so."""
    same = [other for other in rows if other["K"] == row["K"]]
    cells = []
    for name in columns:
        known, value = metric(name), row.get(name)
        values = [other[name] for other in same if other.get(name) is not None and not math.isnan(other[name])]
        best = (max if known.better > 0 else min)(values) if known.better and len(values) > 1 else None
        spread = row.get(f"{name}_sd", math.nan)
        text = known.with_spread(value, spread)
        cells.append(
            {"text": text, "value": "" if value is None else value, "best": best is not None and value == best}
        )
    diverged = f"{row['diverged']} of {row['seeds']} diverged" if row["diverged"] else ""
    return {"method": row["method"], "K": row["K"], "seeds": row["seeds"], "diverged": diverged, "cells": cells}


def plots(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Quality and usage against K, or by method if there is one K; then quality against the bit rate."""
    names = {name for row in rows for name in row}
    quality = [name for name in _quality(rows) if name != "mse" and name in names]
    shown = [*quality, *(name for name in USAGE if name in names)]
    if len({row["K"] for row in rows}) == 1:
        return [_plot(name, charts.dots(_values(rows, name), _label(name))) for name in shown]
    found = [_plot(name, _lines(rows, name, "K", "requested codes K")) for name in shown]
    rate = next((name for name in RATES if name in names), None)
    if rate is not None:
        found += [_plot(name, _lines(rows, name, rate, _label(rate))) for name in quality]
    return found


def _plot(name: str, chart: Any) -> dict[str, Any]:
    return {"metric": metric(name), "chart": chart}


def _lines(rows: Sequence[Row], name: str, x: str, label: str) -> Any:
    series = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted(
            (row for row in rows if row["method"] == method and name in row and x in row), key=lambda row: row[x]
        )
        series.append(
            charts.Series(method, [row[x] for row in own], [row[name] for row in own], [_spread(r, name) for r in own])
        )
    return charts.line_chart(series, label, _label(name), log_x=True)


def _values(rows: Sequence[Row], name: str) -> list[tuple[str, float, float]]:
    """The best first."""
    own = sorted((row for row in rows if name in row), key=lambda row: -(metric(name).better or 1) * row[name])
    return [(row["method"], row[name], _spread(row, name)) for row in own]


def _spread(row: Row, name: str) -> float:
    spread = row.get(f"{name}_sd", math.nan)
    return 0.0 if math.isnan(spread) else spread


def _label(name: str) -> str:
    known = metric(name)
    return f"{known.label} ({known.unit})" if known.unit else known.label


def _quality(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("quality", ())))


def _gallery(report: ComparisonReport) -> dict[str, Any] | None:
    """The reconstructions of each method and size, of the first seed, beside the originals. None if there are none.

    If they would take too much of the page, only the largest size of each method is kept.
    """
    shown: dict[tuple[str, int], Row] = {}
    for result in report.results:
        if result.get("examples"):
            shown.setdefault((result["label"], result["size"]), result)
    if not shown:
        return None
    pictures = {key: [base64.b64decode(png) for png in one["examples"]] for key, one in shown.items()}
    if sum(len(png) for pngs in pictures.values() for png in pngs) > 4 * LOSSLESS_BUDGET:
        largest = {label: max(size for name, size in shown if name == label) for label, _ in shown}
        pictures = {key: pngs for key, pngs in pictures.items() if largest[key[0]] == key[1]}
    flat = [*report.originals, *(png for pngs in pictures.values() for png in pngs)]
    urls = iter(compact_urls(flat))
    originals = [next(urls) for _ in report.originals]
    rows = [
        {"method": key[0], "K": key[1], "metrics": _shown_metrics(shown[key]), "pictures": [next(urls) for _ in pngs]}
        for key, pngs in pictures.items()
    ]
    return {"originals": originals, "rows": rows, "sizes": sorted({row["K"] for row in rows})}


def _shown_metrics(result: Row) -> dict[str, float]:
    numbers = result["numbers"]
    name = ranking(numbers["quality"])
    return {name: numbers[name]} if name else {}


def _training(results: Sequence[Row]) -> dict[str, Any] | None:
    """How the methods trained: a curve of the first seed at the largest size of each."""
    latest: dict[str, Row] = {}
    for result in results:
        before = latest.get(result["label"])
        if len(result.get("history", ())) > 1 and (before is None or result["size"] > before["size"]):
            latest[result["label"]] = result
    name = next((one for one in TRAINING if latest and all(one in r["history"][-1] for r in latest.values())), None)
    if name is None:
        return None
    lines = []
    for label, result in latest.items():
        rows = [row for row in result["history"] if name in row]
        lines.append(charts.Series(label, [row["step"] for row in rows], [row[name] for row in rows]))
    return _plot(name, charts.line_chart(lines, "step", _label(name)))
