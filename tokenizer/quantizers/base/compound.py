"""Shared code of residual and product, which contain several quantizers of one method, their base."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer


class CompoundQuantizer(Quantizer):
    """The quantizers are in `layers`. A subclass sets `in_dim` and `dim`, and decides what each layer quantizes."""

    layers: Sequence[Quantizer]

    def __init__(self, layers: list[Quantizer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.num_quantizers = sum(layer.num_quantizers for layer in layers)
        self.index_levels = layers[0].index_levels
        self.fits_any_size = layers[0].fits_any_size  # type: ignore[misc]
        self.per_token_losses = layers[0].per_token_losses  # type: ignore[misc]
        # losses are means over the layers, but a sum over tokens in a paper would be over the tokens of all layers
        sums = {name: len(layers) for name in self.per_token_losses}
        weights = {name: sums.get(name, 1) * weight for name, weight in layers[0].default_loss_weights.items()}
        self.default_loss_weights = weights  # type: ignore[misc]
        states = (f"layers.{q}.{prefix}" for q, layer in enumerate(layers) for prefix in layer.training_state)
        self.training_state = tuple(states)  # type: ignore[misc]

    @property
    def codebook_size(self) -> int:  # type: ignore[override]
        return self.layers[0].codebook_size  # `fit` or loading a codebook can change it

    @property
    def target_size(self) -> int:
        return self.layers[0].target_size

    def check_size(self, codebook_size: int | None) -> None:
        self.layers[0].check_size(codebook_size)

    def lr_scales(self) -> dict[str, float]:
        layers = enumerate(self.layers)
        return {f"layers.{q}.{name}": scale for q, layer in layers for name, scale in layer.lr_scales().items()}

    def overwritten_rows(self) -> dict[str, Tensor]:
        layers = enumerate(self.layers)
        return {f"layers.{q}.{name}": rows for q, layer in layers for name, rows in layer.overwritten_rows().items()}


def check_base(base: dict[str, Any]) -> None:
    """Raises ValueError if it names no quantizer."""
    if "name" not in base:
        raise ValueError(f"quantizer.base is {dict(base)}; it must name a quantizer, for example {{name: vq_vae}}")


def base_settings(base: dict[str, Any], codebook_size: int, dim: int) -> dict[str, Any]:
    """base plus codebook_size and dim: each one that is not 0, that base's Config has, and that base does not set."""
    known = {field.name for field in fields(QUANTIZERS.get(base["name"]).Config)}
    sizes = {"codebook_size": codebook_size, "dim": dim}
    return {**{key: size for key, size in sizes.items() if size and key in known}, **base}


def means(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each name over the dicts that contain it."""
    names = dict.fromkeys(name for values in dicts for name in values)
    return {name: torch.stack([values[name] for values in dicts if name in values]).mean() for name in names}
