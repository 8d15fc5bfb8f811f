"""Residual quantization (SoundStream, arXiv 2107.03312): each layer quantizes the residual of the layers before it.

Legend: z [N, d] latents, Q num_quantizers, K codes of each layer, r_q = z - sum of the codes before layer q.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenizer.clustering.latents import LatentBatch, Latents
from tokenizer.distributed import mean_across_ranks
from tokenizer.quantizers.base.compound import CompoundQuantizer, base_settings, check_base, means
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput, build_quantizer
from tokenizer.quantizers.base.straight_through import straight_through

SCALE_DECAY = 0.99  # per step, of the moving average of each layer's scale
SMALLEST_SCALE = 1e-6  # relative to z; a smaller residual is only rounding error
FAR_CODES = ("gumbel", "ibq", "bsq")  # bases that choose codes by a logit or a direction instead of a distance
DROPPED = -1  # index of an unused layer; it decodes to zeros


@dataclass
class ResidualConfig:
    """base: name and settings of the quantizer of every layer. codebook_size and dim: if not 0, they are passed to the
    base, unless the base sets them itself or has no such field. dropout: train with only the first n layers, where n is
    random in each step.
    """

    base: dict[str, Any] = field(default_factory=lambda: {"name": "vq_vae"})
    num_quantizers: int = 4
    codebook_size: int = 0
    dim: int = 0
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.num_quantizers < 2:
            raise ValueError(
                f"quantizer.num_quantizers is {self.num_quantizers}; it must be 2 or more (for 1, use the base itself)"
            )
        check_base(self.base)
        if self.base["name"] == "residual":
            raise ValueError("quantizer.base is residual itself; raise quantizer.num_quantizers instead")
        if self.base["name"] == "product":
            raise ValueError("quantizer.base is product; use quantizer.name=product with base residual instead")
        if self.base["name"] in FAR_CODES:
            raise ValueError(
                f"quantizer.base is {self.base['name']}; its codes are not close to the latent, so there is no useful "
                "residual: choose a base that takes the nearest code"
            )

    def base_settings(self) -> dict[str, Any]:
        return base_settings(self.base, self.codebook_size, self.dim)


@QUANTIZERS.register("residual")
class Residual(CompoundQuantizer):
    """Q layers of one method; indices [..., Q]. Any prefix decodes: -1 stands for a code of zeros.

    Differs: each layer quantizes its residual divided by `scales`, so that it has the standard deviation of z. Methods
    that expect latents of standard deviation 1 (fsq, fsp, vp_vae, lfq) would not resolve a small residual.

    Gradients: the output has only the gradient of the first layer's output, which is the identity if the base is
    straight-through (the sum over layers would be Q times that). The losses of a later layer reach z through r_q, with
    the codes before it as constants, in units of z. Losses are means over the layers in use.
    """

    scales: Tensor
    measured: Tensor
    Config = ResidualConfig

    def __init__(self, config: ResidualConfig):
        layers = [build_quantizer(config.base_settings()) for _ in range(config.num_quantizers)]
        super().__init__(layers)
        self.config = config
        first = layers[0]
        if first.in_dim != first.dim:
            raise ValueError(
                f"quantizer.base is {first.name}, which reads {first.in_dim} channels but outputs {first.dim}: "
                "a residual needs equal numbers; choose another base"
            )
        self.dim = self.in_dim = first.dim
        self.training_state = ("measured", *self.training_state)  # type: ignore[misc]
        self.register_buffer("scales", torch.ones(config.num_quantizers))
        self.register_buffer("measured", torch.arange(config.num_quantizers) < 1)

    # -- training ---------------------------------------------------------------------------------------------------

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        """Computes every layer and keeps its losses in the graph even if `dropout` leaves it out, because distributed
        training waits for the gradient of every parameter.
        """
        outs: list[QuantizerOutput] = []
        codes: list[Tensor] = []
        coded = torch.zeros_like(z)
        for q, layer in enumerate(self.layers):
            residual = z - coded
            self._measure(q, residual.detach(), z.detach())
            if outs and outs[-1].indices is None and not self.measured[q]:
                break  # VP-VAE returns z itself while its queue fills; the next queue must not fill with zeros
            scale = self.scales[q].clone()  # the buffer changes in place before backward reads it
            # backward multiplies by the scale: with 1 / scale the last layer's losses would dominate at z
            outs.append(layer._train_forward(straight_through(scale * residual, residual / scale)))
            codes.append(scale * outs[-1].z_q)
            coded = coded + codes[-1].detach()
        used = min(len(outs), self._draw_num_layers())
        z_q = sum((code.detach() for code in codes[1:used]), codes[0])
        metrics = means([out.metrics for out in outs])
        return QuantizerOutput(z_q, self._train_indices(outs, used), _losses(outs, used), metrics)

    def _draw_num_layers(self) -> int:
        """How many layers this step uses, the same for all tokens. Drawn on the CPU, so that no GPU waits."""
        return int(torch.randint(1, self.num_quantizers + 1, ())) if self.config.dropout else self.num_quantizers

    @torch.no_grad()
    def _measure(self, q: int, residual: Tensor, z: Tensor) -> None:
        """Updates the scale of layer q: the RMS of its residual relative to that of z, over all ranks; 1 for the first.

        The scale is at most 1: if codes are longer than the latents, a coarser layer would only add error.
        """
        if q == 0:
            return
        left, whole = mean_across_ranks(torch.stack([residual.square().sum(), z.square().sum()]))
        share = (left / whole.clamp(min=torch.finfo(left.dtype).tiny)).sqrt().clamp(max=1)
        valid = (share > SMALLEST_SCALE) & (whole > 0)
        average = torch.where(self.measured[q], torch.lerp(share, self.scales[q], SCALE_DECAY), share)
        self.scales[q] = torch.where(valid, average, self.scales[q])
        self.measured[q] |= valid

    def _train_indices(self, outs: list[QuantizerOutput], used: int) -> Tensor | None:
        indices = [out.indices for out in outs if out.indices is not None]
        if len(indices) < len(outs):
            return None
        dropped = [torch.full_like(indices[0], DROPPED)] * (self.num_quantizers - used)
        return torch.stack([*indices[:used], *dropped], dim=1)

    # -- after training ---------------------------------------------------------------------------------------------

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        """Fits each layer on the residual of the layers before it. Returns the errors per iteration, layer by layer."""
        curve: list[float] = []
        for q, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            errors = layer._fit(latents.mapped(_ResidualOf(self.layers[:q], self.scales[: q + 1])), codebook_size, seed)
            curve += [error * float(scale) ** 2 for error in errors]
        return curve

    def _eval_forward(self, z: Tensor) -> QuantizerOutput:
        coded, indices = torch.zeros_like(z), []
        for layer, scale in zip(self.layers, self.scales, strict=True):
            out = layer._eval_forward((z - coded) / scale)
            coded = coded + scale * out.z_q
            if out.indices is not None:
                indices.append(out.indices)
        return QuantizerOutput(coded, torch.stack(indices, dim=1) if len(indices) == len(self.layers) else None)

    def _encode(self, z: Tensor) -> Tensor:
        return torch.stack([index for _, index in self._encode_layers(z)], dim=1)

    def _encode_layers(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The input [N, d] and the index [N] of each layer."""
        coded, results = torch.zeros_like(z), []
        for layer, scale in zip(self.layers, self.scales, strict=True):
            residual = (z - coded) / scale
            index = layer._encode(residual)
            coded = coded + scale * layer._decode(index)  # adds in the order of _decode, so the bits are the same
            results.append((residual, index))
        return results

    def _decode(self, indices: Tensor) -> Tensor:
        coded = torch.zeros(len(indices), self.dim, device=indices.device)
        for layer, scale, index in zip(self.layers, self.scales, indices.unbind(dim=1), strict=True):
            code = scale * layer._decode(index.clamp(min=0))
            coded = coded + torch.where((index == DROPPED)[:, None], 0.0, code)
        return coded

    @property
    def codebook(self) -> Tensor:
        """The scaled codes of each layer, which add up to a latent: [Q, K, dim]."""
        return torch.stack([scale * layer.codebook for layer, scale in zip(self.layers, self.scales, strict=True)])

    @torch.no_grad()
    def code_shares(self, z: Tensor) -> Tensor:
        """The shares of each layer: [..., dim] -> [Q, K] float32."""
        with torch.autocast(z.device.type, enabled=False):
            inputs = [residual for residual, _ in self._encode_layers(self._flatten(z))]
        return torch.stack([layer.code_shares(x) for layer, x in zip(self.layers, inputs, strict=True)])


@dataclass
class _ResidualOf:
    """Computes the input of the layer after `layers`. scales [len(layers) + 1]."""

    layers: Sequence[Quantizer]
    scales: Tensor

    def __call__(self, batch: LatentBatch) -> LatentBatch:
        residual = batch.latents.float()
        scales = self.scales.to(residual)
        for layer, scale in zip(self.layers, scales[:-1], strict=True):
            layer = layer.to(residual.device)
            residual = residual - scale * layer.decode(layer.encode(residual / scale))
        return replace(batch, latents=residual / scales[-1])


def _losses(outs: list[QuantizerOutput], used: int) -> dict[str, Tensor]:
    """Means over the layers in use. The losses of the other layers stay in the graph with weight 0."""
    shares = [1 / used if q < used else 0.0 for q in range(len(outs))]
    return {
        name: torch.stack([share * out.losses[name] for share, out in zip(shares, outs, strict=True)]).sum()
        for name in outs[0].losses
    }
