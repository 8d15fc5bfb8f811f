"""One update of an autoencoder, the same under Ray Train, in a comparison, and on a bare machine."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder, AutoencoderOutput
from tokenizer.metrics import perplexity
from tokenizer.modality import Modality

PRECISIONS = ("fp32", "bf16")


@dataclass
class Recipe:
    """How to train. batch_size: samples per worker and step. segment: of the random pieces
    that are trained on: their side in pixels, or their length in samples."""

    steps: int = 10_000
    batch_size: int = 32
    segment: int = 128
    lr: float = 1e-3
    lr_min: float = 0.0  # where the cosine ends
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0
    loss_weights: dict[str, float] = field(default_factory=dict)  # over the defaults of modality and quantizer
    losses: dict[str, Any] = field(default_factory=dict)  # settings of the modality's losses, e.g. perceptual
    precision: str = "fp32"  # fp32, or bf16 for autocast; the quantizer is fp32 in either
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 1 or more")
        if len(self.betas) != 2:
            raise ValueError(f"train.betas is {self.betas}; it must be two numbers")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision is {self.precision!r}; choose one of: {', '.join(PRECISIONS)}")


@dataclass
class StepResult:
    """Of one update: the weighted sum of the losses, each of them, and what the autoencoder gave."""

    loss: Tensor
    losses: dict[str, Tensor]
    out: AutoencoderOutput


class Trainer:
    """Holds losses and optimizer. `model` is the autoencoder or a wrapper that synchronises its gradients."""

    def __init__(self, autoencoder: Autoencoder, modality: Modality, recipe: Recipe, device: str | torch.device):
        self.autoencoder, self.recipe, self.device = autoencoder, recipe, torch.device(device)
        self.autoencoder.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = autoencoder
        self.losses = modality.losses(recipe.losses).to(self.device)
        self.loss_weights = known_losses(autoencoder, modality) | recipe.loss_weights
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in autoencoder.parameters() if parameter.requires_grad],
            betas=(recipe.betas[0], recipe.betas[1]),
            weight_decay=recipe.weight_decay,
        )

    def update(self, x: Tensor, step: int) -> StepResult:
        """x [B, ...] as the modality batches it, on any device; step counts from 0 and sets the learning rate."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.recipe)
        layout = (
            torch.channels_last if x.ndim == 4 else torch.preserve_format
        )  # faster for pictures on CPU and GPU alike
        x = x.to(self.device, non_blocking=True, memory_format=layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            out: AutoencoderOutput = self.model(x)
        losses = {**self.losses(x, out.x_hat.float()), **out.quantized.losses}
        loss = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.recipe.grad_clip)
        self._forget_moments()
        self.optimizer.step()
        return StepResult(loss, losses, out)

    def numbers(self, result: StepResult, step: int) -> dict[str, float]:
        """What is worth logging of an update; reading it makes a GPU wait.

        Raises FloatingPointError where the loss is not finite: going on would only spoil the weights.
        """
        told = {"loss": result.loss, **result.losses, **result.out.quantized.metrics}
        row = {name: float(value.detach()) for name, value in told.items()}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} at step {step + 1}; lower train.lr, or warm up longer")
        if "mse" in row:
            row["psnr"] = -10 * math.log10(max(row["mse"], 1e-10))
        indices = result.out.quantized.indices
        if indices is not None:
            if self.autoencoder.quantizer.num_quantizers > 1:
                indices = indices[..., 0]  # of several, the first is the one that is never dropped
            counts = torch.bincount(indices.flatten(), minlength=self.autoencoder.quantizer.codebook_size)
            row["perplexity"] = perplexity(counts.cpu().numpy())
        return row

    def _forget_moments(self) -> None:
        quantizer = self.autoencoder.quantizer
        for name, rows in quantizer.overwritten_rows().items():
            for moment in self.optimizer.state.get(quantizer.get_parameter(name), {}).values():
                if moment.ndim > 0:
                    moment[rows] = 0


def known_losses(autoencoder: Autoencoder, modality: Modality) -> dict[str, float]:
    """Every loss that this training can have, with its default weight."""
    return {**modality.default_loss_weights, **autoencoder.quantizer.default_loss_weights}


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up to lr, then half a cosine down to lr_min at the last step."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * done)) / 2
