"""The one contract of all quantizers, so that train, codebook and tokenize never ask which method runs.

Legend: latents z [..., in_dim] channel-last, z_q [..., dim], indices [...] int64, K codebook_size, Q num_quantizers.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizer.clustering.latents import Latents, as_latents
from tokenizer.registry import Registry

QUANTIZERS: Registry["Quantizer"] = Registry("quantizer", "tokenizer.quantizers")


@dataclass
class QuantizerOutput:
    """What a quantizer hands on. `indices` is None where training makes none; losses are named and unweighted."""

    z_q: Tensor
    indices: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Maps latents to one of `codebook_size` codes and back.

    A subclass has a dataclass `Config`, and implements the `_` verbs on flat float32 latents. The public
    verbs flatten, leave autocast and restore the shape, so that no method can compute an index in half precision.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    default_loss_weights: ClassVar[dict[str, float]] = {}
    # Losses that the source sums over the T tokens of a picture, beside a squared error summed over its D_x values.
    # Ours are means of both, so their default weights are multiplied by T / D_x: see `known_losses`.
    per_token_losses: ClassVar[tuple[str, ...]] = ()
    training_state: ClassVar[tuple[str, ...]] = ()  # prefixes in state_dict that a frozen tokenizer leaves out
    fit_settings: ClassVar[tuple[str, ...]] = ()  # of Config, that `fit` alone reads: free to change after training

    config: Any
    codebook_size: int
    in_dim: int
    dim: int
    num_quantizers: int = 1  # above 1, indices are [..., num_quantizers], each below codebook_size
    index_levels: tuple[int, ...] = ()  # where an index is a number of several digits: how many values each has

    @property
    def target_size(self) -> int:
        """The number of codes that was asked for, which a scalar quantizer can only come near."""
        return self.codebook_size

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantizes z, as training wants it in train(), deterministically and without any state change in eval().

        z [..., in_dim] any float -> QuantizerOutput with z_q [..., dim] float32 and indices [...] int64 or None.
        """
        with torch.autocast(z.device.type, enabled=False):
            flat = self._flatten(z)
            out = self._train_forward(flat) if self.training else self._eval_forward(flat)
        out.z_q = out.z_q.reshape(*z.shape[:-1], self.dim)
        if out.indices is not None:
            out.indices = out.indices.reshape(*z.shape[:-1], *out.indices.shape[1:])
        return out

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Indices of the codes: [..., in_dim] -> [...] int64. Raises CodebookMissing before the codebook is made."""
        with torch.autocast(z.device.type, enabled=False):
            indices = self._encode(self._flatten(z))
        return indices.reshape(*z.shape[:-1], *indices.shape[1:])

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """What the decoder sees for these indices: [...] int -> [..., dim] float32."""
        many = self.num_quantizers > 1
        flat = indices.long().reshape(-1, self.num_quantizers) if many else indices.long().reshape(-1)
        with torch.autocast(indices.device.type, enabled=False):
            return self._decode(flat).reshape(*(indices.shape[:-1] if many else indices.shape), self.dim)

    @property
    def codebook(self) -> Tensor:
        """All codes, as the decoder sees them: [K, dim] float32. Raises CodebookMissing before it is made."""
        return self.decode(torch.arange(self.codebook_size, device=self._device()))

    @torch.no_grad()
    def code_shares(self, z: Tensor) -> Tensor:
        """How often each code is chosen, as a share of the batch: [..., in_dim] -> [K] float32.

        GM-VQ alone overrides it with the mean of q(c|z), from which its paper computes the perplexity.
        """
        indices = self.encode(z).flatten()
        return torch.bincount(indices, minlength=self.codebook_size) / max(1, len(indices))

    def lr_scales(self) -> dict[str, float]:
        """Parameters that train faster or slower than the rest: name -> factor of the learning rate."""
        return {}

    def overwritten_rows(self) -> dict[str, Tensor]:
        """Rows of parameters that the last training forward set by hand: name -> [rows] int64.

        An optimizer's moments of these rows speak of values that are gone: the training loop sets them to 0.
        """
        return {}

    @torch.no_grad()
    def fit(self, latents: Tensor | Latents, codebook_size: int | None = None, seed: int = 0) -> list[float]:
        """Makes the codebook after training, where a method needs it made.

        latents [N, in_dim] float32. Returns the mean squared error after each iteration; [] where the codes were
        learned or are fixed. Where an earlier fit made as many codes or fewer, those are what it starts from. Raises
        ValueError where another codebook_size than the trained one is asked for.
        """
        return self._fit(as_latents(latents), codebook_size, seed)

    @torch.no_grad()
    def perturbation_ratio(self, latents: Tensor) -> float | None:
        """Energy of what training did to latents in place of quantizing, over the squared error of the codes.

        latents [N, in_dim]. 1 says that the decoder was trained against what it will meet; below, against less. None
        where training quantizes, the latents are too few to tell, or (residual, product, token_bridge) it is not known.
        """
        return None

    def check_size(self, codebook_size: int | None) -> None:
        """Raises ValueError where `fit` cannot make so many codes."""
        if codebook_size not in (None, self.codebook_size):
            raise ValueError(
                f"{self.name} has {self.codebook_size} codes since training, not codebook.size={codebook_size}; "
                "leave codebook.size out, or train with the size you want"
            )

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        self.check_size(codebook_size)
        return []

    def _flatten(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.in_dim:
            raise ValueError(f"{self.name} takes latents of {self.in_dim} channels, got shape {tuple(z.shape)}")
        return z.reshape(-1, self.in_dim).float()

    def _device(self) -> torch.device:
        state: Any = next(self.parameters(), None)
        if state is None:
            state = next(self.buffers(), None)
        return torch.device("cpu") if state is None else state.device

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        raise AssertionError(f"{type(self).__name__} lacks _train_forward")

    def _eval_forward(self, z: Tensor) -> QuantizerOutput:
        indices = self._encode(z)
        return QuantizerOutput(self._decode(indices), indices)

    def _encode(self, z: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} lacks _encode")

    def _decode(self, indices: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} lacks _decode")


def mean_squared(x: Tensor) -> Tensor:
    """Mean of the squares over all elements; 0 for an empty batch."""
    return x.square().sum() / max(1, x.numel())


def build_quantizer(settings: dict[str, Any]) -> Quantizer:
    """A quantizer from {"name": ..., and the fields of its Config}. Raises ValueError or TypeError on others."""
    settings = dict(settings)
    cls = QUANTIZERS.get(settings.pop("name"))
    return cls(cls.Config(**settings))  # type: ignore[call-arg]
