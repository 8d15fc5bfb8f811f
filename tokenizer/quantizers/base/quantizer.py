"""The interface of all quantizers. Jobs use only this interface and never check which method runs.

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
    """losses are unweighted. indices is None if the method chooses no codes during training."""

    z_q: Tensor
    indices: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Maps each latent to one of `codebook_size` codes and back.

    A subclass has a dataclass `Config` and implements the `_` methods on flat float32 latents. The public methods
    flatten, disable autocast and restore the shape, so that no index is computed in half precision.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    default_loss_weights: ClassVar[dict[str, float]] = {}
    # Losses that the paper sums over the T tokens of a picture, while it sums the squared error over the D_x values.
    # Ours are means over both, so the default weights are multiplied by T / D_x: see `known_losses`.
    per_token_losses: ClassVar[tuple[str, ...]] = ()
    training_state: ClassVar[tuple[str, ...]] = ()  # state_dict prefixes that a frozen tokenizer omits
    fit_settings: ClassVar[tuple[str, ...]] = ()  # Config fields that only `fit` reads; they can change after training
    fits_any_size: ClassVar[bool] = False  # whether `fit` can make another number of codes than codebook_size

    config: Any
    codebook_size: int
    in_dim: int
    dim: int
    num_quantizers: int = 1  # above 1, indices are [..., num_quantizers], each below codebook_size
    index_levels: tuple[int, ...] = ()  # if an index is a mixed-radix number: the number of values of each digit

    @property
    def target_size(self) -> int:
        """The configured number of codes. A scalar quantizer can only approximate it."""
        return self.codebook_size

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantizes z. In train() as the method trains; in eval() deterministic and without any change of state.

        z [..., in_dim], any float dtype -> QuantizerOutput with z_q [..., dim] float32, indices [...] int64 or None.
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
        """Indices of the codes: [..., in_dim] -> [...] int64. Raises CodebookMissing if there is no codebook yet."""
        with torch.autocast(z.device.type, enabled=False):
            indices = self._encode(self._flatten(z))
        return indices.reshape(*z.shape[:-1], *indices.shape[1:])

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """The codes of these indices, as the decoder sees them: [...] int -> [..., dim] float32."""
        many = self.num_quantizers > 1
        flat = indices.long().reshape(-1, self.num_quantizers) if many else indices.long().reshape(-1)
        with torch.autocast(indices.device.type, enabled=False):
            return self._decode(flat).reshape(*(indices.shape[:-1] if many else indices.shape), self.dim)

    @property
    def codebook(self) -> Tensor:
        """All codes, as the decoder sees them: [K, dim] float32. Raises CodebookMissing if there is no codebook yet."""
        return self.decode(torch.arange(self.codebook_size, device=self._device()))

    @torch.no_grad()
    def code_shares(self, z: Tensor) -> Tensor:
        """How often each code is chosen, as a share of the batch: [..., in_dim] -> [K] float32.

        GM-VQ overrides it with the mean of q(c|z), from which its paper computes the perplexity.
        """
        indices = self.encode(z).flatten()
        return torch.bincount(indices, minlength=self.codebook_size) / max(1, len(indices))

    def lr_scales(self) -> dict[str, float]:
        """Factors of the learning rate for single parameters: name -> factor. All others have 1."""
        return {}

    def overwritten_rows(self) -> dict[str, Tensor]:
        """Rows of parameters that the last training forward overwrote: name -> [rows] int64.

        The optimizer's moments of these rows belong to the old values, so the trainer resets them to 0.
        """
        return {}

    @torch.no_grad()
    def fit(self, latents: Tensor | Latents, codebook_size: int | None = None, seed: int = 0) -> list[float]:
        """Makes the codebook after training, for methods that do not learn it during training.

        latents [N, in_dim] float32. Returns the mean squared error of each iteration; [] if the codes were learned or
        are fixed. Starts from the codes of an earlier fit, if it made no more codes than now requested. Raises
        ValueError for a codebook_size other than the trained one, unless `fits_any_size`.
        """
        return self._fit(as_latents(latents), codebook_size, seed)

    @torch.no_grad()
    def perturbation_ratio(self, latents: Tensor) -> float | None:
        """Energy of the perturbation that replaces quantization during training, over the squared error of the codes.

        latents [N, in_dim]. At 1 the decoder was trained with errors as large as those it will see; below 1, with
        smaller ones. None if training quantizes, for too few latents, and for residual, product and token_bridge.
        """
        return None

    def check_size(self, codebook_size: int | None) -> None:
        """Raises ValueError if `fit` cannot make this number of codes."""
        if not self.fits_any_size and codebook_size not in (None, self.codebook_size):
            raise ValueError(
                f"codebook.size is {codebook_size}, but {self.name} was trained with {self.codebook_size} codes, which "
                f"cannot change; leave codebook.size out, or train with quantizer.codebook_size={codebook_size}"
            )

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        self.check_size(codebook_size)
        return []

    def _flatten(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.in_dim:
            raise ValueError(
                f"{self.name} needs latents of {self.in_dim} channels in the last axis, not shape {tuple(z.shape)}"
            )
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
    """A quantizer from {"name": ..., and fields of its Config}. Raises ValueError or TypeError for anything else."""
    settings = dict(settings)
    cls = QUANTIZERS.get(settings.pop("name"))
    return cls(cls.Config(**settings))
