"""One training step of an autoencoder: the same under Ray Train, in a comparison and in a plain script."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder, AutoencoderOutput
from tokenizer.distributed import mean_across_ranks
from tokenizer.modalities.base import Modality
from tokenizer.training.gan_loss import GanLoss, adaptive_weight
from tokenizer.training.recipe import Recipe, learning_rate
from tokenizer.usage import perplexity


@dataclass
class StepResult:
    """loss: the weighted sum. losses: each loss unweighted, and the discriminator's mean logits. out: the
    autoencoder's output, for the last micro-batch if gradients were accumulated."""

    loss: Tensor
    losses: dict[str, Tensor]
    out: AutoencoderOutput


class Trainer:
    """Holds the losses and the optimizer. `model` is the autoencoder, or a wrapper that synchronises its gradients.

    grad_accum_steps: micro-batches per batch; only one is in memory at a time. The gradient is that of the whole batch,
    except for what is not a mean over samples (log_mse, batch norm). Quantizers that track their latents are updated
    once per micro-batch.

    Raises ValueError if the discriminator does not support the modality or train.segment.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        modality: Modality,
        recipe: Recipe,
        device: str | torch.device,
        grad_accum_steps: int = 1,
    ):
        self.autoencoder, self.recipe, self.device = autoencoder, recipe, torch.device(device)
        self.grad_accum_steps = grad_accum_steps
        self.autoencoder.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = autoencoder
        self.losses = modality.losses(recipe.losses).to(self.device)
        self.loss_weights = known_losses(autoencoder, modality) | recipe.loss_weights
        self.optimizer = torch.optim.AdamW(
            parameter_groups(autoencoder),
            betas=(recipe.betas[0], recipe.betas[1]),
            weight_decay=recipe.weight_decay,
        )
        self.gan_loss = build_gan_loss(recipe, modality, self.device)
        self.lap: Callable[[str], None] = lambda stage: None  # called at the end of each stage of an update

    def update(self, x: Tensor, step: int) -> StepResult:
        """One optimizer step. x [B, ...] as the modality batches it, on any device; step counts from 0.

        Raises FloatingPointError if a loss or its gradient is not finite: before any weight changes, and on every rank.
        """
        gan_loss = self.gan_loss if step >= self.recipe.discriminator.start_step else None
        self._prepare(gan_loss, step)
        micro_batches = x.chunk(self.grad_accum_steps)
        results, overwritten = [], []
        for i, micro_batch in enumerate(micro_batches):
            with contextlib.nullcontext() if i + 1 == len(micro_batches) else self._no_sync():
                results.append(self._add_gradients(micro_batch, len(micro_batch) / len(x), gan_loss))
            overwritten.append(self.autoencoder.quantizer.overwritten_rows())
        result = _summed(results)
        norm = nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.recipe.grad_clip)
        _check_finite("loss", result.loss, norm, step, "lower train.lr, or raise train.warmup_steps")
        if gan_loss is not None:
            norm, loss = gan_loss.clip_gradients(self.recipe.grad_clip), result.losses["discriminator"]
            _check_finite("discriminator's loss", loss, norm, step, "lower train.discriminator.lr")
            gan_loss.optimizer.step()
        for rows in overwritten:
            self._reset_moments(rows)
        self.optimizer.step()
        self.lap("optimizer")
        return result

    def _prepare(self, gan_loss: GanLoss | None, step: int) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            # older checkpoints have no lr_scale
            group["lr"] = learning_rate(step, self.recipe) * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        if gan_loss is not None:
            gan_loss.optimizer.zero_grad(set_to_none=True)

    def _add_gradients(self, x: Tensor, share: float, gan_loss: GanLoss | None) -> StepResult:
        """Adds the gradients of one micro-batch.

        share: its fraction of the batch, by which all losses are multiplied.
        """
        # channels_last is faster for pictures, on CPU and GPU
        layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
        x = x.to(self.device, non_blocking=True, memory_format=layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            out: AutoencoderOutput = self.model(x)
        x_hat = out.x_hat.float()
        losses = {**self.losses(x, x_hat), **out.quantized.losses}
        losses = {name: share * value for name, value in losses.items()}
        loss = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        if gan_loss is not None:
            losses["adversarial"] = adversarial = share * gan_loss.generator_loss(x_hat)
            weight = self.recipe.discriminator.weight * adaptive_weight(loss, adversarial, x_hat)
            loss = loss + weight * adversarial
        self.lap("forward")
        loss.backward()
        self.lap("backward")
        if gan_loss is not None:
            losses |= gan_loss.add_gradients(x, x_hat, share)
            self.lap("discriminator")
        return StepResult(loss.detach(), {name: value.detach() for name, value in losses.items()}, out)

    def _no_sync(self) -> contextlib.AbstractContextManager[object]:
        """DistributedDataParallel's `no_sync`, where the model has it."""
        return getattr(self.model, "no_sync", contextlib.nullcontext)()

    def numbers(self, result: StepResult) -> dict[str, float]:
        """The numbers to log for a step. Reading them makes the CPU wait for the GPU."""
        values = {"loss": result.loss, **result.losses, **result.out.quantized.metrics}
        row = {name: float(value.detach()) for name, value in values.items()}
        if "mse" in row:
            row["psnr"] = -10 * math.log10(max(row["mse"], 1e-10))
        indices = result.out.quantized.indices
        if indices is not None:
            if self.autoencoder.quantizer.num_quantizers > 1:
                indices = indices[..., 0]  # quantizer dropout never drops the first one
            counts = torch.bincount(indices.flatten(), minlength=self.autoencoder.quantizer.codebook_size)
            row["perplexity"] = perplexity(counts.cpu().numpy())
        return row

    def _reset_moments(self, overwritten: dict[str, Tensor]) -> None:
        for name, rows in overwritten.items():
            for moment in self.optimizer.state.get(self.autoencoder.quantizer.get_parameter(name), {}).values():
                if moment.ndim > 0:
                    moment[rows] = 0


def compile_nets(autoencoder: Autoencoder, backend: str = "inductor") -> None:
    """Compiles encoder and decoder at their first call. The quantizer stays out: its branches depend on data."""
    net = autoencoder.net
    net.encode = torch.compile(net.encode, backend=backend)  # type: ignore[method-assign]
    net.decode = torch.compile(net.decode, backend=backend)  # type: ignore[method-assign]


def build_gan_loss(recipe: Recipe, modality: Modality, device: torch.device) -> GanLoss | None:
    """None if recipe.discriminator is off. Raises ValueError if it does not support the modality or the segment."""
    settings = recipe.discriminator
    if not settings.weight:
        return None
    if modality.name != "image":
        raise ValueError(
            f"train.discriminator.weight is {settings.weight}; only modality image has a discriminator, "
            f"set it to 0 for {modality.name}"
        )
    if recipe.segment < settings.smallest_side:
        raise ValueError(
            f"train.crop_size is {recipe.segment}; a discriminator of {settings.layers} layers needs "
            f"{settings.smallest_side} pixels or more: lower train.discriminator.layers, or raise train.crop_size"
        )
    return GanLoss(settings, device, recipe.seed, autocast=recipe.precision == "bf16")


def _check_finite(what: str, loss: Tensor, norm: Tensor, step: int, advice: str) -> None:
    loss = mean_across_ranks(loss)  # each rank has its own loss, but all have the same gradient
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

    The weights of the quantizer's `per_token_losses` are multiplied by T / D_x, tokens per value of the input.
    """
    quantizer, values_per_token = autoencoder.quantizer, autoencoder.net.values_per_token
    weights = {
        name: weight / values_per_token if name in quantizer.per_token_losses else weight
        for name, weight in quantizer.default_loss_weights.items()
    }
    return {**modality.default_loss_weights, **weights}


def parameter_groups(autoencoder: Autoencoder) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: trainable parameters by their `lr_scale`, 1 unless the quantizer sets it."""
    scales = {f"quantizer.{name}": scale for name, scale in autoencoder.quantizer.lr_scales().items()}
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in autoencoder.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]
