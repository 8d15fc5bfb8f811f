"""Residual quantization (SoundStream, arXiv 2107.03312): each layer quantizes what those before it left over.

Legend: z [N, d] latents, Q num_quantizers, K codes of each layer, r_q = z - sum of the codes before layer q.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenizer.clustering.latents import Latents, Part
from tokenizer.distributed import mean_across_ranks
from tokenizer.quantizers.base.compound import CompoundQuantizer, base_settings, check_base, means
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput, build_quantizer
from tokenizer.quantizers.base.straight_through import straight_through

SCALE_DECAY = 0.99  # per step, of the average that a layer's scale is
SMALLEST_SCALE = 1e-6  # relative to z: below, what is left is rounding
FAR_CODES = ("gumbel", "ibq", "bsq")  # bases that choose by a logit or a direction, not by a distance
DROPPED = -1  # index of a quantizer that is not used: decodes to zero


@dataclass
class ResidualConfig:
    """base: name and settings of the quantizer that every layer is. codebook_size and dim, where not 0, are handed
    to it unless it sets or lacks them. dropout: train with the first n layers alone, n drawn anew each step.
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
            raise ValueError("quantizer.base is product; use product with residual as its base instead")
        if self.base["name"] in FAR_CODES:
            raise ValueError(
                f"quantizer.base is {self.base['name']}, whose codes do not lie near the latent: they leave no residual"
            )

    def base_settings(self) -> dict[str, Any]:
        return base_settings(self.base, self.codebook_size, self.dim)


@QUANTIZERS.register("residual")
class Residual(CompoundQuantizer):
    """Q layers of one method; indices [..., Q], of which any prefix decodes: -1 stands for a code of zeros.

    Differs: a layer sees its residual divided by `scales`, so that it has the spread of z; methods that expect latents
    of spread about 1 (fsq, fsp, vp_vae, lfq) would see next to nothing of a residual otherwise.

    Gradients: the output has that of the first layer's own output and of no other, which is the identity where the
    base is straight-through (the sum of all would be Q times it). A loss of a later layer reaches z through r_q, the
    codes before it being constants, and counts in the unit of z. Losses are means over the layers in use.
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
                f"quantizer.base is {first.name}, which reads {first.in_dim} channels and gives {first.dim}: "
                "a residual needs as many; choose another base"
            )
        self.dim = self.in_dim = first.dim
        self.training_state = ("measured", *self.training_state)  # type: ignore[misc]
        self.register_buffer("scales", torch.ones(config.num_quantizers))
        self.register_buffer("measured", torch.arange(config.num_quantizers) < 1)

    # -- training ---------------------------------------------------------------------------------------------------

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        """Every layer is computed and its losses are in the graph, whatever `dropout` leaves out: distributed
        training waits for the gradient of every parameter.
        """
        outs: list[QuantizerOutput] = []
        codes: list[Tensor] = []
        coded = torch.zeros_like(z)
        for q, layer in enumerate(self.layers):
            residual = z - coded
            self._measure(q, residual.detach(), z.detach())
            if outs and outs[-1].indices is None and not self.measured[q]:
                break  # VP-VAE hands z through while its queue fills: the next must not fill its own with zeros
            scale = self.scales[q].clone()  # the buffer changes in place before backward reads it
            # backward times the scale, as by 1 / scale the last layer's losses would outweigh all others at z
            outs.append(layer._train_forward(straight_through(scale * residual, residual / scale)))
            codes.append(scale * outs[-1].z_q)
            coded = coded + codes[-1].detach()
        used = min(len(outs), self._draw())
        z_q = sum((code.detach() for code in codes[1:used]), codes[0])
        metrics = means([out.metrics for out in outs])
        return QuantizerOutput(z_q, self._train_indices(outs, used), _losses(outs, used), metrics)

    def _draw(self) -> int:
        """How many layers this step uses: the same for all its tokens. On the CPU, so that no GPU waits."""
        return int(torch.randint(1, self.num_quantizers + 1, ())) if self.config.dropout else self.num_quantizers

    @torch.no_grad()
    def _measure(self, q: int, residual: Tensor, z: Tensor) -> None:
        """Follows the RMS of layer q's residual relative to that of z, of all ranks; the first layer's is 1.

        At most 1: where codes are longer than the latents, a coarser layer would only err more.
        """
        if q == 0:
            return
        left, whole = mean_across_ranks(torch.stack([residual.square().sum(), z.square().sum()]))
        share = (left / whole.clamp(min=torch.finfo(left.dtype).tiny)).sqrt().clamp(max=1)
        seen = (share > SMALLEST_SCALE) & (whole > 0)
        followed = torch.where(self.measured[q], torch.lerp(share, self.scales[q], SCALE_DECAY), share)
        self.scales[q] = torch.where(seen, followed, self.scales[q])
        self.measured[q] |= seen

    def _train_indices(self, outs: list[QuantizerOutput], used: int) -> Tensor | None:
        found = [out.indices for out in outs if out.indices is not None]
        if len(found) < len(outs):
            return None
        dropped = [torch.full_like(found[0], DROPPED)] * (self.num_quantizers - used)
        return torch.stack([*found[:used], *dropped], dim=1)

    # -- afterwards -------------------------------------------------------------------------------------------------

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        """Layer by layer, each on what the fitted layers before it leave over; their curves, one after the other."""
        curve: list[float] = []
        for q, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            errors = layer._fit(latents.mapped(_Leftover(self.layers[:q], self.scales[: q + 1])), codebook_size, seed)
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
        """What each layer gets [N, d], and its index of that [N]."""
        coded, found = torch.zeros_like(z), []
        for layer, scale in zip(self.layers, self.scales, strict=True):
            seen = (z - coded) / scale
            index = layer._encode(seen)
            coded = coded + scale * layer._decode(index)  # in the order of _decode: the same bits
            found.append((seen, index))
        return found

    def _decode(self, indices: Tensor) -> Tensor:
        coded = torch.zeros(len(indices), self.dim, device=indices.device)
        for layer, scale, index in zip(self.layers, self.scales, indices.unbind(dim=1), strict=True):
            code = scale * layer._decode(index.clamp(min=0))
            coded = coded + torch.where((index == DROPPED)[:, None], 0.0, code)
        return coded

    @property
    def codebook(self) -> Tensor:
        """The codes of each layer, as they are added up: [Q, K, dim]."""
        return torch.stack([scale * layer.codebook for layer, scale in zip(self.layers, self.scales, strict=True)])

    @torch.no_grad()
    def code_shares(self, z: Tensor) -> Tensor:
        """Of each layer: [..., dim] -> [Q, K] float32."""
        with torch.autocast(z.device.type, enabled=False):
            seen = [part for part, _ in self._encode_layers(self._flatten(z))]
        return torch.stack([layer.code_shares(part) for layer, part in zip(self.layers, seen, strict=True)])


@dataclass
class _Leftover:
    """What the layer after `layers` gets of latents. scales [len(layers) + 1]."""

    layers: Sequence[Quantizer]
    scales: Tensor

    def __call__(self, part: Part) -> Part:
        residual = part.latents.float()
        scales = self.scales.to(residual)
        for layer, scale in zip(self.layers, scales[:-1], strict=True):
            layer = layer.to(residual.device)
            residual = residual - scale * layer.decode(layer.encode(residual / scale))
        return replace(part, latents=residual / scales[-1])


def _losses(outs: list[QuantizerOutput], used: int) -> dict[str, Tensor]:
    """Means over the layers in use; those of the others are in the graph with no weight."""
    shares = [1 / used if q < used else 0.0 for q in range(len(outs))]
    return {
        name: torch.stack([share * out.losses[name] for share, out in zip(shares, outs, strict=True)]).sum()
        for name in outs[0].losses
    }
