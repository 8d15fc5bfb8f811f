"""One trial of a comparison: train, make the codebook, evaluate. A plain function of settings and arrays, without Ray.

result = run_trial(Trial(model=..., recipe=Recipe(steps=500)), train_arrays, heldout_arrays, device="cuda")
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.evaluation import Evaluation
from tokenizer.modalities.base import Decoded, Modality, build_modality
from tokenizer.tokenizer import Tokenizer
from tokenizer.training.resident import endless_order, resident_batches
from tokenizer.training.step import Recipe, Trainer

LOG_POINTS = 50  # rows of the training log


@dataclass
class Trial:
    """All that decides on a result, besides the arrays. model: the settings of Autoencoder; recipe.seed is the seed."""

    model: dict[str, Any]
    recipe: Recipe
    preprocess: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    max_latents: int = 262_144  # that the codebook is made from, of samples drawn at random
    eval_batch_size: int = 64  # samples
    pictures: int = 8


@dataclass
class TrialResult:
    """numbers: one value each; others: those of further corpora; history: rows of the training log; examples: PNGs."""

    numbers: dict[str, Any]
    others: dict[str, dict[str, Any]]
    history: list[dict[str, float]]
    examples: list[bytes]


def run_trial(
    trial: Trial,
    train: Sequence[np.ndarray],
    heldout: Sequence[np.ndarray],
    *,
    others: Mapping[str, Sequence[np.ndarray]] | None = None,
    device: str = "cpu",
    report: Callable[[dict[str, float]], None] = lambda row: None,
    resident: bool = False,
) -> TrialResult:
    """train, heldout, and others to evaluate on: samples as the modality reads them. report gets each row of the log.

    resident: keep all training pictures on the device and make the same batches there (`resident_batches`).
    Two trials that differ in the quantizer alone see the same samples in the same order, the same crops, and nets
    that start from the same weights. Raises FloatingPointError if training diverges.
    """
    torch.manual_seed(trial.recipe.seed)
    autoencoder = Autoencoder(trial.model)
    modality = build_modality(trial.model["modality"], trial.preprocess)
    trainer = Trainer(autoencoder, modality, trial.recipe, device)
    if resident:
        batches = resident_batches(train, trial.recipe, autoencoder.factor, trainer.device)
    else:
        batches = training_batches(modality, train, trial.recipe, autoencoder.factor)
    history, seconds = _train(trainer, batches, report)
    started = time.perf_counter()
    curve = _fit(trial, autoencoder, train, device)
    fit_s = time.perf_counter() - started
    tokenizer = Tokenizer(autoencoder, trial.preprocess).to(device)
    assert isinstance(tokenizer, Tokenizer)
    numbers, examples = _evaluate(trial, tokenizer, heldout)
    further = {name: _evaluate(trial, tokenizer, arrays)[0] for name, arrays in (others or {}).items()}
    numbers |= {"seconds_per_step": float(np.median(seconds)), "fit_s": fit_s, "fit_iterations": len(curve)}
    numbers |= {"num_parameters": sum(p.numel() for p in autoencoder.parameters()), "steps": trial.recipe.steps}
    return TrialResult(numbers, further, history, examples)


def training_batches(
    modality: Modality, arrays: Sequence[np.ndarray], recipe: Recipe, factor: int
) -> Iterator[tuple[int, Tensor]]:
    """(step, x) for every step. Order and crops depend on the recipe's seed alone: each epoch is a new permutation."""
    places = endless_order(len(arrays), recipe.seed)
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, 1, step])
        crops = [modality.segment(arrays[next(places)], recipe.segment, rng) for _ in range(recipe.batch_size)]
        yield step, modality.batch(crops, factor).x


def _train(
    trainer: Trainer, batches: Iterator[tuple[int, Tensor]], report: Callable[[dict[str, float]], None]
) -> tuple[list[dict[str, float]], list[float]]:
    """The training log, and the seconds of each update (data and logging left out)."""
    recipe, history, seconds = trainer.recipe, [], []
    every = max(1, recipe.steps // LOG_POINTS)
    for step, x in batches:
        started = time.perf_counter()
        result = trainer.update(x, step)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            history.append({"step": step + 1, **trainer.numbers(result), "seconds_per_step": seconds[-1]})
            report(history[-1])
    return history, seconds


def _fit(trial: Trial, autoencoder: Autoencoder, arrays: Sequence[np.ndarray], device: str) -> list[float]:
    """The codebook, from the latents of whole training samples, drawn at random until there are enough."""
    encoder = LatentEncoder(autoencoder, trial.preprocess).to(device)
    rng = np.random.default_rng([trial.recipe.seed, 2])
    chosen, total = rng.permutation(len(arrays)), 0
    found: list[Tensor] = []
    for start in range(0, len(chosen), trial.eval_batch_size):
        some = [arrays[i] for i in chosen[start : start + trial.eval_batch_size]]
        for group in _same_bucket(encoder.modality, some, len(some)):
            found += [z.flatten(0, -2).cpu() for z in encoder.latents(group)]
        total = sum(map(len, found))
        if total >= trial.max_latents:
            break
    latents = torch.cat(found)[: trial.max_latents].to(device)
    return autoencoder.quantizer.eval().fit(latents, seed=trial.recipe.seed)


def _evaluate(trial: Trial, tokenizer: Tokenizer, arrays: Sequence[np.ndarray]) -> tuple[dict[str, Any], list[bytes]]:
    modality = tokenizer.modality
    quality = modality.metrics(trial.metrics).to(tokenizer.device)
    evaluation = Evaluation.empty(tokenizer)
    examples: list[bytes] = []
    rates: list[float] = []
    for group in _same_bucket(modality, arrays, trial.eval_batch_size):
        samples = [Decoded(array, modality.size_of(array)) for array in group]
        started = time.perf_counter()
        tokens = tokenizer.encode(group)
        rates.append(sum(t.size for t in tokens) / (time.perf_counter() - started))
        rebuilt = evaluation.add(tokenizer, samples, quality)
        examples += [modality.view(array) for array in rebuilt[: trial.pictures - len(examples)]]
    numbers = evaluation.summary(tokenizer) | {"quality": evaluation.quality}
    numbers |= {"tokens_per_s": float(np.median(rates)), "tokenizer_id": tokenizer.id}
    return numbers, examples


def _same_bucket(modality: Modality, arrays: Sequence[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """Neighbours of one bucket, in order, at most batch_size together."""
    group: list[np.ndarray] = []
    for array in arrays:
        if group and (len(group) == batch_size or modality.bucket(array) != modality.bucket(group[0])):
            yield group
            group = []
        group.append(array)
    if group:
        yield group
