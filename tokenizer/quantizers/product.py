"""Product quantization (Jegou et al., TPAMI 2011): splits the channels into groups, each with its own quantizer.

With residual as the base this is grouped residual quantization, as in HiFi-Codec (arXiv 2305.02765).

Legend: z [N, in_dim] latents, G groups, Q quantizers of a group (1 unless its base is residual), K codes of each.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenizer.clustering.latents import LatentBatch, Latents
from tokenizer.quantizers.base.compound import CompoundQuantizer, base_settings, check_base, means
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, build_quantizer


@dataclass
class ProductConfig:
    """base: name and settings of the quantizer of every group. codebook_size: of each group. dim: of all groups
    together. If not 0, these two are passed to the base, unless the base sets them itself or has no such field.
    """

    base: dict[str, Any] = field(default_factory=lambda: {"name": "vq_vae"})
    groups: int = 2
    codebook_size: int = 0
    dim: int = 0

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError(f"quantizer.groups is {self.groups}; it must be 2 or more (for 1, use the base itself)")
        check_base(self.base)
        if self.base["name"] == "product":
            raise ValueError("quantizer.base is product itself; raise quantizer.groups instead")
        if self.dim % self.groups:
            raise ValueError(
                f"quantizer.dim is {self.dim}; it must be a multiple of quantizer.groups, which is {self.groups}"
            )

    def base_settings(self) -> dict[str, Any]:
        return base_settings(self.base, self.codebook_size, self.dim // self.groups)


@QUANTIZERS.register("product")
class Product(CompoundQuantizer):
    """G independent quantizers; indices [..., G * Q], the first group first.

    The codes of a group are 0 outside its channels, so a latent is the sum of its codes. Losses and metrics are means
    over the groups.
    """

    Config = ProductConfig

    def __init__(self, config: ProductConfig):
        super().__init__([build_quantizer(config.base_settings()) for _ in range(config.groups)])
        self.config = config
        self.in_dim, self.dim = (config.groups * size for size in (self.layers[0].in_dim, self.layers[0].dim))

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        return _joined([layer._train_forward(part) for layer, part in zip(self.layers, self._split(z), strict=True)])

    def _eval_forward(self, z: Tensor) -> QuantizerOutput:
        return _joined([layer._eval_forward(part) for layer, part in zip(self.layers, self._split(z), strict=True)])

    def _encode(self, z: Tensor) -> Tensor:
        indices = [layer._encode(part) for layer, part in zip(self.layers, self._split(z), strict=True)]
        return torch.cat([_as_columns(index) for index in indices], dim=1)

    def _decode(self, indices: Tensor) -> Tensor:
        many = self.layers[0].num_quantizers > 1
        parts = indices.chunk(len(self.layers), dim=1) if many else indices.unbind(dim=1)
        return torch.cat([layer._decode(part) for layer, part in zip(self.layers, parts, strict=True)], dim=1)

    def _split(self, z: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in z.chunk(len(self.layers), dim=1)]

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        """Fits each group on its channels.

        Returns the errors per iteration of all groups, one group after the other.
        """
        curve: list[float] = []
        for group, layer in enumerate(self.layers):
            curve += layer._fit(latents.mapped(_Channels(group, len(self.layers))), codebook_size, seed)
        return curve

    @property
    def codebook(self) -> Tensor:
        """The codes of each group with zeros outside its channels: [G * Q, K, dim]."""
        codes = [layer.codebook.reshape(-1, self.codebook_size, layer.dim) for layer in self.layers]
        ends = [group * layer.dim for group, layer in enumerate(self.layers)]
        return torch.cat([pad(c, (end, self.dim - end - c.shape[-1])) for c, end in zip(codes, ends, strict=True)])

    @torch.no_grad()
    def code_shares(self, z: Tensor) -> Tensor:
        """The shares of each group: [..., in_dim] -> [G * Q, K] float32."""
        parts = self._split(self._flatten(z))
        shares = [layer.code_shares(part) for layer, part in zip(self.layers, parts, strict=True)]
        return torch.cat([share.reshape(-1, self.codebook_size) for share in shares])


@dataclass
class _Channels:
    """Selects the channels of one group from a batch of latents."""

    group: int
    groups: int

    def __call__(self, batch: LatentBatch) -> LatentBatch:
        return replace(batch, latents=batch.latents.chunk(self.groups, dim=1)[self.group].contiguous())


def _joined(outs: list[QuantizerOutput]) -> QuantizerOutput:
    indices = [_as_columns(out.indices) for out in outs if out.indices is not None]
    return QuantizerOutput(
        torch.cat([out.z_q for out in outs], dim=1),
        torch.cat(indices, dim=1) if len(indices) == len(outs) else None,
        means([out.losses for out in outs]),
        means([out.metrics for out in outs]),
    )


def _as_columns(indices: Tensor) -> Tensor:
    """[N] -> [N, 1]; [N, Q] stays."""
    return indices if indices.ndim == 2 else indices[:, None]
