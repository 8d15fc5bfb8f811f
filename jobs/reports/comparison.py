"""The table and the plots of `compare`, from the results of its trials."""

import base64
import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from jobs.config import Config
from jobs.reports.pages.comparison import ComparisonReport, comparison_page
from jobs.reports.pages.index import write_index
from jobs.reports.plots import against_png, gallery_png
from pipeline import storage
from tokenizer.modalities.image.frechet import about

Column = tuple[str, str, Callable[[float], str]]  # name in `numbers`, heading, format of a value
QUALITY: dict[str, Column] = {  # all other metrics have their own name as heading, and four digits
    "mse": ("mse", "MSE e-3", lambda value: f"{1000 * value:.3f}"),
    "psnr": ("psnr", "PSNR", "{:.3f}".format),
    "ssim": ("ssim", "SSIM", "{:.4f}".format),
}
RECIPE_SHOWN = ("steps", "batch_size", "segment", "lr", "precision")
SIZES: list[Column] = [
    ("codebook_size", "codes", "{:.0f}".format),
    ("num_quantizers", "quantizers", "{:.0f}".format),
    ("num_tokens", "tokens", "{:,.0f}".format),
]
USAGE: list[Column] = [
    ("cvu", "CVU", "{:.4f}".format),
    ("cvu_target", "CVU of K", "{:.4f}".format),
    ("cvu_per_dim", "CVU per dim", "{:.4f}".format),
    ("perplexity", "perplexity", "{:.1f}".format),
    ("perplexity_per_batch", "per batch", "{:.1f}".format),
    ("utilisation", "used", "{:.4f}".format),
    ("bits_per_pixel", "bits/pixel", "{:.4f}".format),
    ("kbps", "kbit/s", "{:.3f}".format),
    ("seconds_per_step", "s/step", "{:.3f}".format),
    ("tokens_per_s", "tokens/s", "{:,.0f}".format),
]


def write_report(url: str, results: list[dict[str, Any]], originals: list[bytes], config: Config) -> None:
    """Writes the report and prints the table. results: of the trials. originals: the images of their `examples`."""
    if not results:
        print("compare: no trial has a result yet; no report")
        return
    base = storage.join(url, "reports", "compare")
    trials = [{key: value for key, value in one.items() if key not in ("examples", "history")} for one in results]
    tables, all_notes = {}, {}
    for name in ("", *config.compare.others):
        shown = [_evaluated_on(name, one) for one in results] if name else results
        tables[name or "heldout"] = rows = summarise(shown)
        place = f"{base}-{name}" if name else base
        text = markdown(rows, columns_of(rows))
        all_notes[name or "heldout"] = notes(shown, config, name)
        storage.replace(f"{place}.md", f"{text}\n{all_notes[name or 'heldout']}".encode())
        storage.replace(f"{place}.csv", to_csv(rows, [column for column, _, _ in columns_of(rows)]).encode())
        for kind, png in plots(rows).items():
            storage.replace(f"{place}-{kind}.png", png)
        print(f"{name}:\n{text}" if name else text)
    storage.replace(f"{base}.json", (json.dumps({"tables": tables, "trials": trials}, indent=1) + "\n").encode())
    if originals:
        storage.replace(f"{base}-pictures.png", gallery_png(_gallery(results, originals)))
    report = ComparisonReport(config, tables, _headings(tables), all_notes, results, originals)
    storage.replace(f"{base}.html", comparison_page(report))
    write_index(base.rsplit("/", 1)[0])
    print(f"compare: report at {base}.html, .md, .json, .csv; plots at {base}-*.png")


def _headings(tables: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """The names of the columns of each table."""
    return {name: [column for column, _, _ in columns_of(rows)] for name, rows in tables.items()}


def _evaluated_on(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The trial's result, with the numbers of another evaluation corpus in place of the held-out shards'."""
    if "numbers" not in result:
        return result
    return {**result, "numbers": {**result["numbers"], **result["others"][name]}}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method and size: the mean over the seeds, and the standard deviation as `<name>_sd`."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["size"]), []).append(result)
    rows = []
    for (label, size), trials in groups.items():
        numbers = [trial["numbers"] for trial in trials if "numbers" in trial]
        row: dict[str, Any] = {"method": label, "K": size, "seeds": len(trials), "diverged": len(trials) - len(numbers)}
        row["quality"] = numbers[0].get("quality", []) if numbers else []
        for name in numbers[0] if numbers else ():
            values = [one[name] for one in numbers if isinstance(one.get(name), int | float)]
            if values:
                row[name] = float(np.mean(values))
                row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        rows.append(row)
    return rows


def columns_of(rows: list[dict[str, Any]]) -> list[Column]:
    """The columns that have a value in any row. Quality metrics come in the modality's order."""
    names = {name for row in rows for name in row}
    quality: list[Column] = []
    for name in _quality(rows):
        quality.append(QUALITY.get(name, (name, name, "{:.4f}".format)))
        if f"{name}_samples" in names:  # a Frechet distance has no meaning without its number of samples
            quality.append((f"{name}_samples", "of samples", "{:,.0f}".format))
    if all(row.get("num_quantizers", 1) == 1 for row in rows):
        names -= {"num_quantizers"}
    return [column for column in [*SIZES, *quality, *USAGE] if column[0] in names]


def _quality(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("quality", ())))


def markdown(rows: list[dict[str, Any]], columns: list[Column]) -> str:
    """The table in Markdown: the mean, and ± the standard deviation if there are several seeds."""
    lines = [["method", "K", *[heading for _, heading, _ in columns]]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        name = row["method"] + (f" ({row['diverged']} of {row['seeds']} diverged)" if row["diverged"] else "")
        lines.append([name, str(row["K"]), *[_cell(row, key, form) for key, _, form in columns]])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(row: dict[str, Any], name: str, form: Callable[[float], str]) -> str:
    if row.get(name) is None or math.isnan(row[name]):
        return "-"
    spread = row.get(f"{name}_sd", math.nan)
    return form(row[name]) + (f" ± {form(spread)}" if spread > 0 else "")


def notes(results: list[dict[str, Any]], config: Config, name: str = "") -> str:
    """The notes under the table: data, recipe, seeds, metrics, machine."""
    recipe = asdict(config.train.recipe())
    shown = ", ".join(f"{key} {recipe[key]}" for key in RECIPE_SHOWN)
    numbers: dict[str, Any] = next((one["numbers"] for one in results if "numbers" in one), {})
    seeds = ", ".join(str(seed) for seed in config.compare.seeds)
    saved = config.to_dict()
    evaluated = saved["compare"]["others"][name] if name else saved["compare"]["heldout"]
    lines = [
        f"Trained on {saved['data']['shards']}, evaluated on {evaluated}: "
        f"{numbers.get('num_samples')} samples, {numbers.get('num_tokens')} tokens.",
        f"Net {config.model.net}; {shown}; seeds {seeds}. With one seed, all methods start from the same weights and "
        "see the same samples and crops in the same order.",
        *[f"Has its own recipe: {one}." for one in _own_recipes(results, recipe)],
        "Mean ± standard deviation over the seeds. CVU is relative to the actual number of codes, `CVU of K` to the "
        "requested number.",
        f"`perplexity` is over all tokens; `per batch` is the mean over batches of "
        f"{numbers.get('tokens_per_batch', 0):.0f} tokens, of hard codes; for GM-VQ, of the mean q(c|x) as in its "
        "paper.",
        *[f"{about(one, numbers)}." for one in numbers.get("quality", ()) if f"{one}_samples" in numbers],
        f"Metrics: {config.metrics or 'the default ones'}. s/step and tokens/s depend on the machine "
        "and its load: compare them within this table only.",
        f"Machine: {'; '.join(sorted({one['machine'] for one in results}))}. Last trial finished "
        f"{max(one['finished'] for one in results)}.",
    ]
    return "\n".join(lines) + "\n"


def _own_recipes(results: list[dict[str, Any]], recipe: dict[str, Any]) -> list[str]:
    """Methods whose recipe differs from the comparison's, with the settings that differ."""
    differing: dict[str, str] = {}
    for result in results:
        own = result["settings"]["recipe"]
        changed = [f"{key} {own[key]}" for key in RECIPE_SHOWN if own[key] != recipe[key]]
        if changed:
            differing[result["label"]] = f"{result['label']} ({', '.join(changed)})"
    return list(differing.values())


def to_csv(rows: list[dict[str, Any]], names: list[str]) -> str:
    """method, K, seeds, diverged, and mean and standard deviation of each column."""
    out = io.StringIO()
    fields = ["method", "K", "seeds", "diverged", *[f for name in names for f in (name, f"{name}_sd")]]
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def plots(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Quality and usage against K, and quality against the bit rate."""
    names = {name for row in rows for name in row}
    quality = [name for name in _quality(rows) if name in names and name != "mse"]
    panels = {"sizes": against_png(rows, "K", "requested codes", [*quality, "cvu", "perplexity"])}
    for name, label in (("bits_per_pixel", "bits per pixel"), ("kbps", "kbit/s")):
        if name in names:
            panels["rate"] = against_png(rows, name, label, quality)
    return panels


def _gallery(results: list[dict[str, Any]], originals: list[bytes]) -> list[tuple[str, list[bytes]]]:
    """Rows of images: the originals, then each method at its largest size, first seed."""
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        if "examples" in result and result["size"] > best.get(result["label"], {"size": -1})["size"]:
            best[result["label"]] = result
    rows = [("original", originals)]
    for label, result in best.items():
        pictures = [base64.b64decode(png) for png in result["examples"]]
        quality = [f"{name} {result['numbers'][name]:.4g}" for name in result["numbers"]["quality"] if name != "mse"][
            :1
        ]
        rows.append((f"{label}\nK={result['size']}  {' '.join(quality)}", pictures))
    return rows
