"""One trial of a comparison: train, make the codebook, evaluate. A plain function of settings and arrays; no Ray.

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
from tokenizer.training.recipe import Recipe
from tokenizer.training.resident import endless_order, resident_batches
from tokenizer.training.step import Trainer

LOG_POINTS = 50  # rows of the training log


@dataclass
class Trial:
    """Everything that determines a result, except the arrays. model: the settings of Autoencoder."""

    model: dict[str, Any]
    recipe: Recipe
    preprocess: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    max_latents: int = 262_144  # for making the codebook, from randomly drawn samples
    eval_batch_size: int = 64  # samples
    num_examples: int = 8  # reconstructions in the result


@dataclass
class TrialResult:
    """numbers: the metrics. others: those on further corpora. history: rows of the training log. examples: PNGs."""

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
    """Trains on `train`; evaluates on `heldout` and `others`. Arrays are samples as the modality reads them.

    report is called with each row of the log. resident: keep all training pictures on the device and make the same
    batches there (`resident_batches`). Two trials that differ only in the quantizer see the same samples in the same
    order with the same crops, and their nets start from the same weights. Raises FloatingPointError if training
    diverges.
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
    """Yields (step, x). Order and crops depend only on the recipe's seed: each epoch is a new permutation."""
    positions = endless_order(len(arrays), recipe.seed)
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, 1, step])
        crops = [modality.segment(arrays[next(positions)], recipe.segment, rng) for _ in range(recipe.batch_size)]
        yield step, modality.batch(crops, factor).x


def _train(
    trainer: Trainer, batches: Iterator[tuple[int, Tensor]], report: Callable[[dict[str, float]], None]
) -> tuple[list[dict[str, float]], list[float]]:
    """Returns the training log and the seconds of each update, without data loading and logging."""
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
    """Makes the codebook from the latents of randomly drawn training samples. Returns the error per iteration."""
    encoder = LatentEncoder(autoencoder, trial.preprocess).to(device)
    rng = np.random.default_rng([trial.recipe.seed, 2])
    order = rng.permutation(len(arrays))
    encoded: list[Tensor] = []
    for start in range(0, len(order), trial.eval_batch_size):
        samples = [arrays[i] for i in order[start : start + trial.eval_batch_size]]
        for batch in _same_bucket(encoder.modality, samples, len(samples)):
            encoded += [z.flatten(0, -2).cpu() for z in encoder.latents(batch)]
        if sum(map(len, encoded)) >= trial.max_latents:
            break
    latents = torch.cat(encoded)[: trial.max_latents].to(device)
    return autoencoder.quantizer.eval().fit(latents, seed=trial.recipe.seed)


def _evaluate(trial: Trial, tokenizer: Tokenizer, arrays: Sequence[np.ndarray]) -> tuple[dict[str, Any], list[bytes]]:
    modality = tokenizer.modality
    quality = modality.metrics(trial.metrics).to(tokenizer.device)
    evaluation = Evaluation.empty(tokenizer)
    examples: list[bytes] = []
    rates: list[float] = []
    for batch in _same_bucket(modality, arrays, trial.eval_batch_size):
        samples = [Decoded(array, modality.size_of(array)) for array in batch]
        started = time.perf_counter()
        tokens = tokenizer.encode_batch(batch)
        rates.append(sum(t.size for t in tokens) / (time.perf_counter() - started))
        reconstructions = evaluation.add(tokenizer, samples, quality)
        examples += [modality.view(array) for array in reconstructions[: trial.num_examples - len(examples)]]
    numbers = evaluation.summary(tokenizer) | {"quality": evaluation.quality}
    numbers |= {"tokens_per_s": float(np.median(rates)), "tokenizer_id": tokenizer.id}
    return numbers, examples


def _same_bucket(modality: Modality, arrays: Sequence[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """Batches of consecutive arrays of one bucket, at most batch_size each."""
    batch: list[np.ndarray] = []
    for array in arrays:
        if batch and (len(batch) == batch_size or modality.bucket(array) != modality.bucket(batch[0])):
            yield batch
            batch = []
        batch.append(array)
    if batch:
        yield batch
