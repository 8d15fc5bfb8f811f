"""Our training step compared to a bare PyTorch loop, and the share of VP-VAE's perturbation in a step.

Both with nets of configs/, without Ray.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from benchmarks.measure import Table, interleaved, ratio_text
from jobs.config import load_config
from jobs.reports.training import TrainReport
from jobs.stopwatch import Stopwatch
from jobs.training.data import TrainBatch, TrainingData
from pipeline.corpus.shards import find_shards
from pipeline.errors import ShardError
from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.neighbors import build_index
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.vp_vae import VPVAE, VPVAEConfig
from tokenizer.training.recipe import Recipe
from tokenizer.training.step import Trainer

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5
STEPS = 20  # per round; ours logs once in that many steps by default
PROOF_STEPS = 3
BATCHES_IN_MEMORY = 8
BARE, OURS, OURS_WITH_DATA = "bare loop", "ours, same tensors", "ours, from shards"

F8_BATCH, F8_SEGMENT = 32, 128
F8_ROUNDS = 5 if DEVICE.type == "cuda" else 3
F8_PICTURES = F8_BATCH if DEVICE.type == "cuda" else 4  # on a CPU the whole batch would take minutes
F8_QUANTIZERS = ((1024, 4), (16384, 5))  # K and D


def run() -> Table:
    table = Table(
        "One training step: ours compared to a bare PyTorch loop, and VP-VAE's share of it",
        [
            "Ours: what a rank of `train` does with configs/demo.yaml, without Ray. It takes a batch, calls "
            "Trainer.update, records its position in the corpus, and writes a log row every "
            f"{STEPS} steps, once per round.",
            "Bare: the same model in ten lines of PyTorch: channels_last, l1 and L_norm, AdamW, clipping, warm-up and "
            "cosine. It logs nothing and does not check that the gradient is finite.",
            "VP-VAE's queue is full, so every step perturbs. Before timing we check that all loops have the same "
            f"losses over {PROOF_STEPS} steps from the same weights, batches and random numbers.",
            "From shards: samples/train, decoded in threads during training. The first batch of a round is not timed. "
            "waiting: the time that the loop waited for a batch.",
            f"Medians of {ROUNDS} interleaved rounds. Ratios and shares are per round; the range is in parentheses.",
            f"f=8: the net of configs/vqgan_f8.yaml at {F8_BATCH} x {F8_SEGMENT} px, fp32, only l1 (LPIPS would make "
            f"the share smaller), {F8_ROUNDS} rounds. Forward and backward are timed on {F8_PICTURES} pictures and "
            f"scaled to {F8_BATCH}; the optimizer is not scaled.",
            "perturbation: forward in train mode and backward of the quantizer on the latents of the whole batch, and "
            "rebuilding its index as often as the queue flushes at an update_probability of 0.01. (The default, auto, "
            "reaches 0.01 in long runs.) Latents and queue are from N(0, I), the distribution that L_norm aims for.",
            f"Device: {DEVICE.type}; torch threads: {torch.get_num_threads()}.",
        ],
        ["what", "s/step", "steps/s, ratio to bare", "share of waiting for data", "share of perturbation"],
    )
    _measure_loops(table)
    _measure_perturbation(table)
    return table


# -- our loop against a bare one --------------------------------------------------------------------------------------


@dataclass
class Round:
    """Seconds of wall time, and how many of them the loop waited for data."""

    wall_s: float
    waited_s: float


class Loop(Protocol):
    def step(self, batch: TrainBatch) -> Tensor:
        """Trains on the batch. Returns the loss."""
        ...


def _measure_loops(table: Table) -> None:
    config = load_config(
        [str(ROOT / "configs/demo.yaml"), f"data.shards={ROOT}/samples/train/*.tar", f"train.log_every={STEPS}"]
    )
    modality = build_modality(config.model.modality, config.data.preprocess)
    torch.manual_seed(config.train.seed)
    autoencoder = Autoencoder({**dataclasses.asdict(config.model), "quantizer": config.quantizer})
    shards = find_shards(config.data.shards).shards

    def training_data() -> TrainingData:
        return TrainingData(shards, config.train, modality, autoencoder.factor, 0, 1, on_bad_shard=_refuse)

    with stream(training_data()) as batches:
        in_memory = list(itertools.islice(batches, BATCHES_IN_MEMORY))
    fill_queue(Trainer(autoencoder, modality, config.train.recipe(), DEVICE), in_memory)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(TrainReport(folder, [], 0)) as report:

        def ours() -> OurLoop:
            trainer = Trainer(copy.deepcopy(autoencoder), modality, config.train.recipe(), DEVICE)
            return OurLoop(trainer, training_data(), report)

        with_data = ours()
        loops: dict[str, Loop] = {BARE: BareLoop(copy.deepcopy(autoencoder), config.train.recipe())}
        loops |= {OURS: ours(), OURS_WITH_DATA: with_data}
        difference = prove_equal(list(loops.values()), in_memory)
        table.notes.append(f"Largest relative difference of a loss in that check: {difference:.1e}.")
        found = run_rounds(loops, with_data.data, in_memory)
    wall = {name: [r.wall_s for r in rounds] for name, rounds in found.items()}
    waited = ratio_text([r.waited_s for r in found[OURS_WITH_DATA]], wall[OURS_WITH_DATA])
    for name, rounds in found.items():
        seconds = f"{statistics.median(wall[name]) / STEPS:.3g}"
        ratio = "1" if name == BARE else ratio_text(wall[BARE], wall[name])
        table.rows.append([name, seconds, ratio, waited if name == OURS_WITH_DATA else "", ""])
        table.raw[name] = [vars(r) for r in rounds]


class BareLoop:
    """What one would write for this model without Tokenmill."""

    def __init__(self, model: Autoencoder, recipe: Recipe):
        self.model = model.to(DEVICE).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.grad_clip = recipe.grad_clip
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(recipe.betas[0], recipe.betas[1]), weight_decay=recipe.weight_decay
        )
        warmup, cosine_steps = recipe.warmup_steps, recipe.steps - recipe.warmup_steps

        def schedule(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return (1 + math.cos(math.pi * (step - warmup) / cosine_steps)) / 2

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def step(self, batch: TrainBatch) -> Tensor:
        x = batch.x.to(DEVICE, non_blocking=True, memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        out = self.model(x)
        norm = out.quantized.losses
        loss = l1_loss(out.x_hat, x) + 0.1 * norm["norm_mean"] + 0.07 * norm["norm_var"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()


class OurLoop:
    """A step of jobs/training/loop.py in the same order, without what needs Ray."""

    def __init__(self, trainer: Trainer, data: TrainingData, report: TrainReport):
        self.trainer, self.data, self.report = trainer, data, report
        self.num_steps = 0

    def step(self, batch: TrainBatch) -> Tensor:
        result = self.trainer.update(batch.x, self.num_steps)
        self.num_steps += 1
        self.data.trained_on(batch)
        if self.num_steps % STEPS == 0:
            self.report.log({"step": self.num_steps, **self.trainer.numbers(result)})
        return result.loss


def _refuse(error: ShardError) -> None:
    raise error


def stream(data: TrainingData) -> contextlib.closing:
    return contextlib.closing(data.batches(pinned=DEVICE.type == "cuda"))


def fill_queue(trainer: Trainer, batches: list[TrainBatch]) -> None:
    """Trains until every step perturbs."""
    quantizer = trainer.autoencoder.quantizer
    assert isinstance(quantizer, VPVAE)
    for step, batch in enumerate(itertools.cycle(batches)):
        if quantizer.queue.full:
            return
        trainer.update(batch.x, step)


def prove_equal(loops: list[Loop], batches: list[TrainBatch]) -> float:
    """Raises AssertionError unless all have the first's losses to 1e-5. Returns the largest relative difference."""
    found = []
    for loop in loops:
        torch.manual_seed(1)
        found.append(torch.stack([loop.step(batch) for batch in batches[:PROOF_STEPS]]))
    losses = torch.stack(found)
    difference = float((losses / losses[0] - 1).abs().max())
    assert difference < 1e-5, f"the losses of {PROOF_STEPS} steps differ by {difference:.1e}: {losses.tolist()}"
    return difference


def run_rounds(loops: dict[str, Loop], data: TrainingData, in_memory: list[TrainBatch]) -> dict[str, list[Round]]:
    """Runs each loop once per round. Each round starts with a different loop."""
    names = list(loops)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for r in range(ROUNDS):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if name == OURS_WITH_DATA:
                with stream(data) as batches:  # closed afterwards, so that no thread decodes while another loop runs
                    next(batches)
                    found[name].append(run_round(loops[name], batches))
            else:
                found[name].append(run_round(loops[name], itertools.cycle(in_memory)))
    return found


def run_round(loop: Loop, batches: Iterator[TrainBatch]) -> Round:
    start, waited = time.perf_counter(), 0.0
    for _ in range(STEPS):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        loop.step(batch)
    settle()
    return Round(time.perf_counter() - start, waited)


def settle() -> None:
    """Waits until the GPU has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# -- the share of VP-VAE's perturbation -------------------------------------------------------------------------------


def _measure_perturbation(table: Table) -> None:
    config = load_config([str(ROOT / "configs/vqgan_f8.yaml")])
    recipe = dataclasses.replace(config.train.recipe(), losses={}, precision="fp32")
    torch.manual_seed(0)
    settings = {**dataclasses.asdict(config.model), "quantizer": config.quantizer}
    autoencoder = Autoencoder(settings)  # its own queue never fills, so it perturbs nothing
    trainer = Trainer(autoencoder, build_modality("image", {}), recipe, DEVICE)
    x = torch.rand(F8_PICTURES, 3, F8_SEGMENT, F8_SEGMENT)
    stages: list[dict[str, float]] = []

    def net() -> None:
        watch = Stopwatch(torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None)
        trainer.lap = watch.lap
        trainer.update(x, 0)
        stages.append(watch.seconds)

    num_latents = F8_BATCH * (F8_SEGMENT // autoencoder.factor) ** 2
    perturbers = {f"VP-VAE K={size} D={dim}": Perturber(size, dim, num_latents) for size, dim in F8_QUANTIZERS}
    sides: dict[str, Callable[[], object]] = {"net": net}
    for name, perturber in perturbers.items():
        sides |= {f"{name}: rebuild": perturber.rebuild, f"{name}: step": perturber.step}
    found = {side: [t.wall_s for t in times] for side, times in interleaved(sides, F8_ROUNDS).items()}
    table.raw |= {"f=8: net": stages, **{f"f=8: {side}": times for side, times in found.items()}}
    nets = [whole_batch(seconds) for seconds in stages[1:]]  # without the warm-up
    for name, perturber in perturbers.items():
        pairs = zip(found[f"{name}: step"], found[f"{name}: rebuild"], strict=True)
        perturbations = [step + perturber.rebuilds_per_step * rebuild for step, rebuild in pairs]
        steps = [one + other for one, other in zip(nets, perturbations, strict=True)]
        share = ratio_text(perturbations, steps)
        table.rows.append([f"f=8 autoencoder, {name}", f"{statistics.median(steps):.3g}", "", "", share])


def whole_batch(stages: dict[str, float]) -> float:
    """Seconds of forward, backward and optimizer for F8_BATCH pictures, scaled from F8_PICTURES."""
    return (stages["forward"] + stages["backward"]) * F8_BATCH / F8_PICTURES + stages["optimizer"]


class Perturber:
    """VP-VAE with a full queue, and the latents of one batch."""

    def __init__(self, codebook_size: int, dim: int, num_latents: int):
        self.quantizer = (
            VPVAE(VPVAEConfig(codebook_size=codebook_size, dim=dim, update_probability=0.01)).to(DEVICE).train()
        )
        queue = self.quantizer.queue
        queue.add(torch.randn(queue.capacity, dim, device=DEVICE))
        self.z = torch.randn(num_latents, dim, device=DEVICE, requires_grad=True)
        self.gradient = torch.randn_like(self.z)
        entering = max(1, round(0.01 * num_latents))
        self.rebuilds_per_step = entering / queue.flush

    def rebuild(self) -> None:  # also prepares the index for the step, if this round's flush has dropped it
        self.quantizer._index = build_index(self.quantizer.queue.samples, self.quantizer.config.backend)
        settle()

    def step(self) -> None:
        out = self.quantizer(self.z)
        norm_loss = torch.stack(list(out.losses.values())).sum()
        torch.autograd.grad([out.z_q, norm_loss], self.z, [self.gradient, torch.ones_like(norm_loss)])
        settle()
