"""What a modality must offer, so that jobs and pipeline never ask which one runs."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.errors import BadSample
from tokenizer.registry import Registry

MODALITIES: Registry["Modality"] = Registry("modality", "tokenizer.modalities")


@dataclass
class Batch:
    """x as the model takes it, and which of its frames are real, [B, 1, F]: None where all are."""

    x: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.x.to(device), None if self.mask is None else self.mask.to(device))


@dataclass
class Decoded:
    """A sample as an array, channel-last, and the size it had before any preprocessing."""

    array: np.ndarray
    size: dict[str, int]


class Metrics(nn.Module):
    """Maps two Batches, x and x_hat, to the quality of each sample: name -> [B]; NaN where not defined."""

    def features(self, x: Batch, x_hat: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """For Frechet distances between all x and all x_hat: name -> features of both, [B, D] each."""
        return {}


class Modality:
    """Bytes to arrays and back, losses, quality metrics. `Config` holds the preprocessing, part of a tokenizer's id."""

    name: ClassVar[str]
    Config: ClassVar[type]
    extensions: ClassVar[tuple[str, ...]]  # members of a WebDataset sample that it can read, without the dot
    written_as: ClassVar[str]  # extension of what `to_bytes` makes
    mime: ClassVar[str]  # its media type
    size_columns: ClassVar[tuple[str, ...]]  # of the token shard: the original's size
    default_budget: ClassVar[float]  # of a batch, in the unit of `elements`
    default_loss_weights: ClassVar[dict[str, float]]  # names every loss that `losses` can give

    def read(self, data: bytes, extension: str = "") -> Decoded:
        """A sample's bytes to an array, preprocessed. Raises BadSample with the reason, whatever was wrong.

        extension: of the member, without the dot, for formats that have no mark of their own.
        """
        try:
            return self.from_bytes(data, extension)
        except BadSample:
            raise
        except Exception as error:  # decoders raise nearly anything on broken bytes
            raise BadSample(f"{type(error).__name__}: {error}") from error

    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        """What `read` does, with errors of any kind."""
        raise AssertionError

    def to_bytes(self, array: np.ndarray) -> bytes:
        raise AssertionError

    def view(self, array: np.ndarray) -> bytes:
        """What a sample looks like: a PNG."""
        raise AssertionError

    def segment(self, array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random piece of fixed size, for training."""
        raise AssertionError

    def elements(self, budget: float) -> int:
        """Array elements of a budget in the unit that users of this modality count in: megapixels, seconds."""
        raise AssertionError

    def bucket(self, array: np.ndarray) -> tuple[int, ...]:
        """Arrays of one bucket may be in one batch."""
        raise AssertionError

    def batch(self, arrays: list[np.ndarray], factor: int) -> Batch:
        """Arrays of one bucket to the model's input, padded to multiples of factor."""
        raise AssertionError

    def unbatch(self, x: Tensor, sizes: list[dict[str, int]]) -> list[np.ndarray]:
        """The model's output to arrays, without the padding."""
        raise AssertionError

    def size_of(self, array: np.ndarray) -> dict[str, int]:
        """Size of an array that `read` gave."""
        raise AssertionError

    def processed_size(self, size: dict[str, int]) -> dict[str, int]:
        """Size after preprocessing, from the original's."""
        raise AssertionError

    def losses(self, settings: dict[str, Any]) -> nn.Module:
        """A module that maps (x, x_hat) to named, unweighted reconstruction losses."""
        raise AssertionError

    def metrics(self, settings: dict[str, Any]) -> Metrics:
        raise AssertionError

    def rate(self, num_bits: float, sizes: list[dict[str, int]]) -> dict[str, float]:
        """Bits per unit that the field counts in, from those of all samples and their processed sizes."""
        raise AssertionError


def build_modality(name: str, settings: dict[str, Any]) -> Modality:
    """A modality from its name and the fields of its Config."""
    cls = MODALITIES.get(name)
    return cls(cls.Config(**settings))  # type: ignore[call-arg]
