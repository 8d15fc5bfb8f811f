"""One update of an autoencoder, the same under Ray Train, in a comparison, and on a bare machine."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder, AutoencoderOutput
from tokenizer.distributed import mean_across_ranks
from tokenizer.modalities.base import Modality
from tokenizer.training.discriminator import Adversary, DiscriminatorConfig, balance
from tokenizer.usage import perplexity

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
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    precision: str = "fp32"  # fp32, or bf16 for autocast; the quantizer is fp32 in either
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.grad_clip <= 0:
            raise ValueError(f"train.grad_clip is {self.grad_clip}; it must be above 0 (a large number clips nothing)")
        if len(self.betas) != 2:
            raise ValueError(f"train.betas is {self.betas}; it must be two numbers")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision is {self.precision!r}; choose one of: {', '.join(PRECISIONS)}")


@dataclass
class StepResult:
    """Of one update: the weighted sum of the losses, each of them (and how the discriminator fared), and what the
    autoencoder gave (for the last piece, where the batch was cut)."""

    loss: Tensor
    losses: dict[str, Tensor]
    out: AutoencoderOutput


class Trainer:
    """Holds losses and optimizer. `model` is the autoencoder or a wrapper that synchronises its gradients.

    accumulate: pieces that a batch is cut into, one in memory at a time. What is no mean over samples is then one over
    pieces (log_mse, batch norm), and quantizers that follow their latents do so once for each piece.

    Raises ValueError where the discriminator does not fit the modality or the segment.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        modality: Modality,
        recipe: Recipe,
        device: str | torch.device,
        accumulate: int = 1,
    ):
        self.autoencoder, self.recipe, self.device = autoencoder, recipe, torch.device(device)
        self.accumulate = accumulate
        self.autoencoder.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = autoencoder
        self.losses = modality.losses(recipe.losses).to(self.device)
        self.loss_weights = known_losses(autoencoder, modality) | recipe.loss_weights
        self.optimizer = torch.optim.AdamW(
            parameter_groups(autoencoder),
            betas=(recipe.betas[0], recipe.betas[1]),
            weight_decay=recipe.weight_decay,
        )
        self.adversary = build_adversary(recipe, modality, self.device)
        self.lap: Callable[[str], None] = lambda stage: None  # told at the end of each stage of an update

    def update(self, x: Tensor, step: int) -> StepResult:
        """x [B, ...] as the modality batches it, on any device; step counts from 0 and sets the learning rate.

        Raises FloatingPointError, before any weight changes, where a loss or its gradient is not finite; on every
        rank, whosever loss it is.
        """
        adversary = self._adversary_at(step)
        self._prepare(adversary, step)
        pieces = x.chunk(self.accumulate)
        results, overwritten = [], []
        for i, piece in enumerate(pieces):
            with contextlib.nullcontext() if i + 1 == len(pieces) else self._without_synchronising():
                results.append(self._add_gradients(piece, len(piece) / len(x), adversary))
            overwritten.append(self.autoencoder.quantizer.overwritten_rows())
        result = _summed(results)
        norm = nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.recipe.grad_clip)
        _check_finite("loss", result.loss, norm, step, "lower train.lr, or warm up longer")
        if adversary is not None:
            norm, loss = adversary.clip_gradients(self.recipe.grad_clip), result.losses["discriminator"]
            _check_finite("discriminator's loss", loss, norm, step, "lower train.discriminator.lr")
            adversary.optimizer.step()
        for rows in overwritten:
            self._forget_moments(rows)
        self.optimizer.step()
        self.lap("optimizer")
        return result

    def _adversary_at(self, step: int) -> Adversary | None:
        return self.adversary if step >= self.recipe.discriminator.start_step else None

    def _prepare(self, adversary: Adversary | None, step: int) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.recipe) * group.get("lr_scale", 1.0)  # none in older checkpoints
        self.optimizer.zero_grad(set_to_none=True)
        if adversary is not None:
            adversary.optimizer.zero_grad(set_to_none=True)

    def _add_gradients(self, x: Tensor, share: float, adversary: Adversary | None) -> StepResult:
        """Those of share times the loss; so much of the batch x is. The result's losses are times share too."""
        # channels_last is faster for pictures, on CPU and GPU alike
        layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
        x = x.to(self.device, non_blocking=True, memory_format=layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            out: AutoencoderOutput = self.model(x)
        x_hat = out.x_hat.float()
        losses = {**self.losses(x, x_hat), **out.quantized.losses}
        losses = {name: share * value for name, value in losses.items()}
        loss = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        if adversary is not None:
            losses["adversarial"] = adversarial = share * adversary.loss_of(x_hat)
            loss = loss + self.recipe.discriminator.weight * balance(loss, adversarial, x_hat) * adversarial
        self.lap("forward")
        loss.backward()
        self.lap("backward")
        if adversary is not None:
            losses |= adversary.add_gradients(x, x_hat, share)
            self.lap("discriminator")
        return StepResult(loss.detach(), {name: value.detach() for name, value in losses.items()}, out)

    def _without_synchronising(self) -> contextlib.AbstractContextManager:
        no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)  # of DistributedDataParallel
        return no_sync()

    def numbers(self, result: StepResult) -> dict[str, float]:
        """What is worth logging of an update; reading it makes a GPU wait."""
        told = {"loss": result.loss, **result.losses, **result.out.quantized.metrics}
        row = {name: float(value.detach()) for name, value in told.items()}
        if "mse" in row:
            row["psnr"] = -10 * math.log10(max(row["mse"], 1e-10))
        indices = result.out.quantized.indices
        if indices is not None:
            if self.autoencoder.quantizer.num_quantizers > 1:
                indices = indices[..., 0]  # of several, the first is the one that is never dropped
            counts = torch.bincount(indices.flatten(), minlength=self.autoencoder.quantizer.codebook_size)
            row["perplexity"] = perplexity(counts.cpu().numpy())
        return row

    def _forget_moments(self, overwritten: dict[str, Tensor]) -> None:
        for name, rows in overwritten.items():
            for moment in self.optimizer.state.get(self.autoencoder.quantizer.get_parameter(name), {}).values():
                if moment.ndim > 0:
                    moment[rows] = 0


class Averages:
    """Moving averages of all floats that a model is saved with: its weights, and codes and scales that are buffers."""

    def __init__(self, autoencoder: Autoencoder, decay: float):
        self.autoencoder, self.decay = autoencoder, decay
        self.values = {name: tensor.clone() for name, tensor in self._current().items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After update number `step`, counted from 0. The first ones weigh more: what lay before them is chance."""
        decay = min(self.decay, step / (step + 10))
        for name, tensor in self._current().items():
            self.values[name].lerp_(tensor, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the autoencoder has the averages for weights."""
        before = {name: tensor.clone() for name, tensor in self._current().items()}
        try:
            self.load(self.values)
            yield
        finally:
            self.load(before)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._current().items():
            tensor.copy_(values[name])

    def _current(self) -> dict[str, Tensor]:
        state = self.autoencoder.inference_state()
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def compile_nets(autoencoder: Autoencoder, backend: str = "inductor") -> None:
    """torch.compile for encoder and decoder, at their first use. The quantizer's branches on data would break it up."""
    net = autoencoder.net
    net.encode = torch.compile(net.encode, backend=backend)  # type: ignore[method-assign]
    net.decode = torch.compile(net.decode, backend=backend)  # type: ignore[method-assign]


def build_adversary(recipe: Recipe, modality: Modality, device: torch.device) -> Adversary | None:
    """None where recipe.discriminator is off. Raises ValueError where it does not fit the modality or the segment."""
    settings = recipe.discriminator
    if not settings.weight:
        return None
    if modality.name != "image":
        raise ValueError(
            f"train.discriminator.weight is {settings.weight}; there is a discriminator for modality image alone, "
            f"set it to 0 for {modality.name}"
        )
    if recipe.segment < settings.smallest_side:
        raise ValueError(
            f"train.crop_size is {recipe.segment}; a discriminator of {settings.layers} layers needs "
            f"{settings.smallest_side} pixels or more: lower train.discriminator.layers, or raise train.crop_size"
        )
    return Adversary(settings, device, recipe.seed, autocast=recipe.precision == "bf16")


def _check_finite(what: str, loss: Tensor, norm: Tensor, step: int, advice: str) -> None:
    loss = mean_across_ranks(loss)  # of which each rank has its own, while the gradient is the same on all
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise FloatingPointError(
            f"the {what} is {loss.item():.4g} and the norm of its gradient {norm.item():.4g} "
            f"at step {step + 1}; {advice}"
        )


def _summed(results: list[StepResult]) -> StepResult:
    losses = {name: torch.stack([one.losses[name] for one in results]).sum() for name in results[0].losses}
    return StepResult(torch.stack([one.loss for one in results]).sum(), losses, results[-1].out)


def known_losses(autoencoder: Autoencoder, modality: Modality) -> dict[str, float]:
    """Every loss that this training can have, with its default weight.

    Weights of the quantizer's `per_token_losses` are times T / D_x, tokens per value of the input.
    """
    quantizer, values_per_token = autoencoder.quantizer, autoencoder.net.values_per_token
    weights = {
        name: weight / values_per_token if name in quantizer.per_token_losses else weight
        for name, weight in quantizer.default_loss_weights.items()
    }
    return {**modality.default_loss_weights, **weights}


def parameter_groups(autoencoder: Autoencoder) -> list[dict[str, Any]]:
    """Groups for the optimizer: one of all parameters that train, and one for each `lr_scale` of the quantizer."""
    scales = {f"quantizer.{name}": scale for name, scale in autoencoder.quantizer.lr_scales().items()}
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in autoencoder.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up to lr, then half a cosine down to lr_min at the last step."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * done)) / 2
