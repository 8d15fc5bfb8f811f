"""The effect of other loss weights on a comparison: trains its methods, and its net without a quantizer, with them.

    python scripts/mel_weight.py configs/compare/e4_speech.yaml --out results/e4/mel_weight --name "mel 7" \\
        --before results/e4/compare.json --before-none results/e4/ceiling.json train.loss_weights.mel=7

Each trial is a trial of the comparison with its first seed and the weights set by KEY=VALUE, without Ray and on one
thread. Each result is written to OUT.json when it is ready; rerun the same command to run only what is missing. OUT.md
has a table of all results in OUT.json, next to the earlier ones of the comparison and of scripts/codec_ceiling.py.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec_ceiling import QUALITY, Results, corpora, footing, measure, model_of, quality_cells, recipe_of, table, train

from jobs.config import Config, load_config, with_method
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.training.trial import Trial, run_trial

NONE = "none"  # label of the net without a quantizer


def quantizer_of(config: Config, label: str, size: int) -> dict[str, Any]:
    """Settings of the comparison's method at this size, as in `compare`."""
    method = config.compare.methods[label]
    method = {"file": method} if isinstance(method, str) else dict(method)
    own = {"quantizer": method.get("quantizer", {})}
    first = with_method(config, method["file"], own).quantizer
    known = {field.name for field in dataclasses.fields(QUANTIZERS.get(first["name"]).Config)}
    wanted = {"codebook_size": size, "dim": config.compare.dims[size]}
    given = {"name": first["name"], **{key: wanted[key] for key in wanted if key in known}}
    return with_method(config, method["file"], {"quantizer": {**given, **own["quantizer"]}}).quantizer


def without_quantizer(config: Config, dim: int, arrays: dict[str, Any]) -> dict[str, Any]:
    """Quality on the held-out clips, and the norm of the gradient before clipping: 5th, 50th and 95th percentile."""
    modality, recipe = build_modality(config.model.modality, config.data.preprocess), recipe_of(config)
    autoencoder, history = train(model_of(config), dim, recipe, modality, arrays["train"])
    norms = [row["gradient_norm"] for row in history]
    return {
        "numbers": measure(autoencoder, modality, config, arrays["heldout"]),
        "gradient_norm": np.percentile(norms, [5, 50, 95]).tolist(),
        "clipped": float(np.mean(np.array(norms) > recipe.grad_clip)),
    }


def with_quantizer(config: Config, quantizer: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Quality on the held-out clips, and code usage."""
    trial = Trial(
        model={**model_of(config), "quantizer": quantizer},
        recipe=recipe_of(config),
        preprocess=config.data.preprocess,
        metrics=config.metrics,
        eval_batch_size=config.compare.eval_batch_size,
        num_examples=0,
    )
    return {"numbers": run_trial(trial, arrays["train"], arrays["heldout"]).numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="YAML files and KEY=VALUE, as for `tokenmill compare`")
    parser.add_argument("--out", required=True, type=Path, help="write results to OUT.json and OUT.md")
    parser.add_argument("--name", required=True, help="name of these weights in the table")
    parser.add_argument(
        "--methods", default=f"{NONE},FSP,VP-VAE,VQ-VAE", help="labels of methods of the comparison, or none"
    )
    parser.add_argument("--size", type=int, default=1024, help="codes")
    parser.add_argument("--before", type=Path, help="compare.json of the comparison, for the table")
    parser.add_argument("--before-none", type=Path, help="JSON file of codec_ceiling.py, for the table")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    config = load_config(given.config)
    arrays = corpora(config, build_modality(config.model.modality, config.data.preprocess))
    results, recipe = Results(given.out.with_suffix(".json"), arrays), dataclasses.asdict(recipe_of(config))
    methods, dim = given.methods.split(","), config.compare.dims[given.size]
    for label in methods:
        quantizer = None if label == NONE else quantizer_of(config, label, given.size)
        settings = {"model": model_of(config), "quantizer": quantizer, "recipe": recipe, "metrics": config.metrics}
        if results.missing(f"{label}, {given.name}", settings):
            started = time.process_time()
            print(f"mel_weight: {label}, {given.name}", flush=True)
            if quantizer is None:
                found = without_quantizer(config, dim, arrays)
            else:
                found = with_quantizer(config, quantizer, arrays)
            results.add(f"{label}, {given.name}", settings, found, time.process_time() - started)
    before = earlier(given.before, given.before_none, given.size, dim)
    given.out.with_suffix(".md").write_text(report(results, methods, before))
    print(given.out.with_suffix(".md").read_text())


def earlier(compared: Path | None, ceiling: Path | None, size: int, dim: int) -> dict[str, dict[str, float]]:
    """Numbers by method with the comparison's own weights, from the given files."""
    found = {}
    if compared:
        rows = json.loads(compared.read_text())["tables"]["heldout"]
        found = {row["method"]: row for row in rows if row["K"] == size}
    if ceiling:
        found[NONE] = json.loads(ceiling.read_text())[f"dim {dim}"]["numbers"]["heldout"]
    return found


def report(results: Results, methods: Sequence[str], before: dict[str, dict[str, float]]) -> str:
    body = []
    for label in methods:
        if label in before:
            body.append([label, "before", *quality_cells(before[label]), _cvu(before[label])])
        named = [name for name in results.rows if name.startswith(f"{label}, ")]
        for name in named:
            numbers = results.rows[name]["numbers"]
            body.append([label, name.removeprefix(f"{label}, "), *quality_cells(numbers), _cvu(numbers)])
    numbers = next(iter(results.rows.values()))["numbers"]
    header = ["quantizer", "weights", *[QUALITY[name] for name in QUALITY if name in numbers], "CVU"]
    norms = [
        f"Norm of the gradient before clipping, {name}: {low:.1f}, {median:.1f}, {high:.1f} (5 %, median, 95 % of the "
        f"steps); {row['clipped']:.0%} of the steps are clipped.\n"
        for name, row in results.rows.items()
        if "gradient_norm" in row
        for low, median, high in [row["gradient_norm"]]
    ]
    return f"{table(header, body)}\n{''.join(norms)}\n{footing(list(results.rows.values()))}"


def _cvu(numbers: dict[str, float]) -> str:
    return f"{numbers['cvu']:.3f}" if "cvu" in numbers else ""


if __name__ == "__main__":
    main()
