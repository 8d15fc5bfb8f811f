"""The ceiling of a codec: the quality of a comparison's net without quantization between encoder and decoder.

    python scripts/codec_ceiling.py configs/compare/e4_speech.yaml --out results/e4/ceiling --dims 3,4,5,64

Trains the net with the comparison's recipe once for each number of latent channels, and evaluates it on
`compare.heldout` and `compare.others`, without Ray and on one thread. Arguments KEY=VALUE override the configuration.
Each result is written to OUT.json when it is ready; rerun the same command to train only what is missing. OUT.md has
the table of the results for this configuration.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.config import Config, ConfigError, load_config
from jobs.shards import DecodedSample, decode_sample
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import find_shards
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.modalities.base import Modality, build_modality
from tokenizer.quantizers.base.quantizer import Quantizer, QuantizerOutput
from tokenizer.training.recipe import Recipe
from tokenizer.training.step import Trainer
from tokenizer.training.trial import training_batches

QUALITY = {"pesq": "PESQ", "stoi": "STOI", "si_sdr": "SI-SDR", "mel_distance": "mel distance", "mse": "MSE"}
LOG_EVERY = 50  # steps


class Unquantized(Quantizer):
    """Passes the latents on unchanged. It is not registered and has no codes, so no config or tokenizer can use it."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = self.in_dim = dim

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        return QuantizerOutput(z)

    def _eval_forward(self, z: Tensor) -> QuantizerOutput:
        return QuantizerOutput(z)


def unquantized(model: dict[str, Any], dim: int) -> Autoencoder:
    """The net between two projections to dim channels. With the same seed, the net starts as in a comparison's trial.

    model: as for Autoencoder; its quantizer is ignored.
    """
    autoencoder = Autoencoder({**model, "quantizer": {"name": "ema_vq", "codebook_size": 1, "dim": dim}})
    autoencoder.quantizer = Unquantized(dim)
    return autoencoder


def train(
    model: dict[str, Any], dim: int, recipe: Recipe, modality: Modality, arrays: Sequence[np.ndarray]
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """Trains like `run_trial`: the same samples, crops and order.

    Returns the autoencoder, and a row for every step. "gradient_norm" is the norm before clipping.
    """
    torch.manual_seed(recipe.seed)
    autoencoder = unquantized(model, dim)
    trainer = Trainer(autoencoder, modality, recipe, "cpu")
    norms, history = [], []

    def after(stage: str) -> None:
        if stage == "backward":
            found = [parameter.grad.norm() for parameter in autoencoder.parameters() if parameter.grad is not None]
            norms.append(float(torch.stack(found).norm()))

    trainer.lap = after
    for step, x in training_batches(modality, arrays, recipe, autoencoder.factor):
        result = trainer.update(x, step)
        history.append({"step": step + 1, **trainer.numbers(result), "gradient_norm": norms[-1]})
        if (step + 1) % LOG_EVERY == 0:
            print(f"  step {step + 1}/{recipe.steps}  loss {history[-1]['loss']:.4g}", flush=True)
    return autoencoder, history


@torch.inference_mode()
def measure(autoencoder: Autoencoder, modality: Modality, config: Config, arrays: Sequence[np.ndarray]) -> Any:
    """Means over the clips where a metric is defined, as in `Evaluation`. Each clip is a batch of its own."""
    encoder = LatentEncoder(autoencoder, config.data.preprocess)
    quality = modality.metrics(config.metrics)
    found: dict[str, list[float]] = {}
    for array in arrays:
        x_hat = autoencoder.reconstruct(encoder.latents([array])[0][None])
        rebuilt = modality.unbatch(x_hat, [modality.size_of(array)])
        of_clip = quality(modality.batch([array], factor=1), modality.batch(rebuilt, factor=1))
        for name, value in of_clip.items():
            found.setdefault(name, []).append(float(value))
    defined = {name: [value for value in values if not math.isnan(value)] for name, values in found.items()}
    return {name: float(np.mean(values)) if values else math.nan for name, values in defined.items()}


# -- data and results -----------------------------------------------------------------------------------------------


def samples(shards: Any, modality: Modality) -> list[np.ndarray]:
    """All samples in the order of the shards, as in a comparison. Raises ConfigError on a bad sample."""
    arrays = []
    for shard in find_shards(shards).shards:
        for sample in read_samples(shard.url):
            item = decode_sample(sample, modality)
            if not isinstance(item, DecodedSample):
                raise ConfigError(f"{shard.url}: sample {sample.key} cannot be read: {item}")
            arrays.append(item.decoded.array)
    return arrays


def corpora(config: Config, modality: Modality) -> dict[str, list[np.ndarray]]:
    """The samples of "train", "heldout" and each name in compare.others."""
    config.require("data.shards", "compare.heldout")
    shards = {"train": config.data.shards, "heldout": config.compare.heldout, **config.compare.others}
    return {name: samples(found, modality) for name, found in shards.items()}


def recipe_of(config: Config, **changes: Any) -> Recipe:
    """The recipe of the comparison with its first seed."""
    return dataclasses.replace(config.train.recipe(), **{"seed": config.compare.seeds[0], **changes})


def model_of(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config.model)


class Results:
    """Rows by name in a JSON file. A row is valid only for the settings and samples that it was made from."""

    def __init__(self, file: Path, arrays: Mapping[str, Sequence[np.ndarray]]):
        self.file = file
        self.rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
        self._samples = {name: _digest(some) for name, some in arrays.items()}

    def missing(self, name: str, settings: dict[str, Any]) -> bool:
        there = self.rows.get(name)
        return there is None or (there["settings"], there["samples"]) != (_plain(settings), self._samples)

    def add(self, name: str, settings: dict[str, Any], found: dict[str, Any], cpu_s: float) -> None:
        about = {"finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "machine": machine(), "cpu_s": cpu_s}
        self.rows[name] = {**found, **about, "settings": _plain(settings), "samples": self._samples}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.rows, indent=1) + "\n")

    def chosen(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        return (self.rows[name] for name in names)


def _plain(settings: dict[str, Any]) -> Any:
    return json.loads(json.dumps(settings))


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return f"{len(arrays)} samples, {digest.hexdigest()[:16]}"


def machine() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread, torch {torch.__version__}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first column is left-aligned, the numbers are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def footing(rows: Sequence[dict[str, Any]]) -> str:
    """The origin of the numbers: command, machine, dates, CPU time."""
    dates = sorted(row["finished"] for row in rows)
    minutes = sum(row["cpu_s"] for row in rows) / 60
    command = " ".join(["python", *sys.argv])
    return f"`{command}`\n\n{rows[0]['machine']}; {dates[0]} to {dates[-1]}; {minutes:.0f} minutes of CPU time.\n"


def quality_cells(numbers: dict[str, float]) -> list[str]:
    return [f"{numbers[name]:.4f}" if name == "mse" else f"{numbers[name]:.3f}" for name in QUALITY if name in numbers]


# -- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="YAML files and KEY=VALUE, as for `tokenmill compare`")
    parser.add_argument("--out", required=True, type=Path, help="write results to OUT.json and OUT.md")
    parser.add_argument("--dims", default="3,4,5,64", help="channels of the latents")
    given = parser.parse_intermixed_args()
    dims = [int(dim) for dim in given.dims.split(",")]
    torch.set_num_threads(1)
    config = load_config(given.config)
    modality = build_modality(config.model.modality, config.data.preprocess)
    arrays = corpora(config, modality)
    results, recipe, model = Results(given.out.with_suffix(".json"), arrays), recipe_of(config), model_of(config)
    for dim in dims:
        settings = {"model": model, "dim": dim, "recipe": dataclasses.asdict(recipe), "metrics": config.metrics}
        if results.missing(f"dim {dim}", settings):
            started = time.process_time()
            print(f"codec_ceiling: latents of {dim} channels", flush=True)
            autoencoder, _ = train(model, dim, recipe, modality, arrays["train"])
            measured = {n: measure(autoencoder, modality, config, some) for n, some in arrays.items() if n != "train"}
            results.add(f"dim {dim}", settings, {"numbers": measured}, time.process_time() - started)
    rows = list(results.chosen([f"dim {dim}" for dim in dims]))
    given.out.with_suffix(".md").write_text(report(dims, rows, recipe))
    print(given.out.with_suffix(".md").read_text())


def report(dims: Sequence[int], rows: Sequence[dict[str, Any]], recipe: Recipe) -> str:
    places = list(rows[0]["numbers"])
    names = [QUALITY[name] for name in QUALITY if name in rows[0]["numbers"][places[0]]]
    header = ["channels", *[f"{place}: {name}" for place in places for name in names]]
    body = [
        [str(dim), *[cell for place in places for cell in quality_cells(row["numbers"][place])]]
        for dim, row in zip(dims, rows, strict=True)
    ]
    what = f"No quantizer, {recipe.steps} steps, seed {recipe.seed}. The rows are numbers of latent channels.\n"
    return f"{what}\n{table(header, body)}\n{footing(rows)}"


if __name__ == "__main__":
    main()
