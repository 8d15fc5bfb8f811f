"""Shared code of quantizers that contain several quantizers of one method, their base: residual and product."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer


class CompoundQuantizer(Quantizer):
    """Holds them in `layers`. A subclass sets `in_dim` and `dim`, and says what each of them gets."""

    layers: Sequence[Quantizer]

    def __init__(self, layers: list[Quantizer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.num_quantizers = sum(layer.num_quantizers for layer in layers)
        self.index_levels = layers[0].index_levels
        self.per_token_losses = layers[0].per_token_losses  # type: ignore[misc]
        # losses are means over the layers; what a paper sums over tokens, it would sum over the tokens of all layers
        sums = {name: len(layers) for name in self.per_token_losses}
        weights = {name: sums.get(name, 1) * weight for name, weight in layers[0].default_loss_weights.items()}
        self.default_loss_weights = weights  # type: ignore[misc]
        states = (f"layers.{q}.{prefix}" for q, layer in enumerate(layers) for prefix in layer.training_state)
        self.training_state = tuple(states)  # type: ignore[misc]

    @property
    def codebook_size(self) -> int:  # type: ignore[override]
        return self.layers[0].codebook_size  # which `fit` or a loaded table may change

    @property
    def target_size(self) -> int:
        return self.layers[0].target_size

    def check_size(self, codebook_size: int | None) -> None:
        self.layers[0].check_size(codebook_size)

    def lr_scales(self) -> dict[str, float]:
        scales = [(f"layers.{q}", layer.lr_scales()) for q, layer in enumerate(self.layers)]
        return {f"{prefix}.{name}": scale for prefix, found in scales for name, scale in found.items()}

    def overwritten_rows(self) -> dict[str, Tensor]:
        rows = [(f"layers.{q}", layer.overwritten_rows()) for q, layer in enumerate(self.layers)]
        return {f"{prefix}.{name}": which for prefix, found in rows for name, which in found.items()}


def check_base(base: dict[str, Any]) -> None:
    """Raises ValueError where it names no quantizer."""
    if "name" not in base:
        raise ValueError(f"quantizer.base is {dict(base)}; it must name a quantizer, as {{name: vq_vae}}")


def base_settings(base: dict[str, Any], codebook_size: int, dim: int) -> dict[str, Any]:
    """base, with each size that is not 0, that its Config has, and that base does not set itself."""
    known = {field.name for field in fields(QUANTIZERS.get(base["name"]).Config)}
    sizes = {"codebook_size": codebook_size, "dim": dim}
    return {**{key: size for key, size in sizes.items() if size and key in known}, **base}


def means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each name over the dicts that contain it."""
    names = dict.fromkeys(name for values in found for name in values)
    return {name: torch.stack([values[name] for values in found if name in values]).mean() for name in names}
