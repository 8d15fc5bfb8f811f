"""The interface of all modalities. Jobs and pipeline use only this interface and never check which modality runs."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.errors import BadSample
from tokenizer.registry import Registry

MODALITIES: Registry["Modality"] = Registry("modality", "tokenizer.modalities")


@dataclass
class PaddedBatch:
    """x: the model's input. mask [B, 1, F]: which frames are not padding; None if there is no padding."""

    x: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "PaddedBatch":
        return PaddedBatch(self.x.to(device), None if self.mask is None else self.mask.to(device))


@dataclass
class Decoded:
    """array: the preprocessed sample, channel-last. size: its size before preprocessing. notes: what was not used of
    the file, such as further frames; `tokenize` counts equal notes.
    """

    array: np.ndarray
    size: dict[str, int]
    notes: list[str] = field(default_factory=list)


class Metrics(nn.Module):
    """Compares two batches, x and x_hat: metric name -> [B], NaN for samples for which it is not defined."""

    def features(self, x: PaddedBatch, x_hat: PaddedBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """For Frechet distances between all x and all x_hat: name -> features of x and of x_hat, [B, D] each."""
        return {}


class Modality:
    """Converts bytes to arrays and back; has losses and quality metrics. `Config`: the preprocessing settings."""

    name: ClassVar[str]
    Config: ClassVar[type]
    # fields of Config that were added later, with the values that tokenizers have that do not state them
    unstated: ClassVar[dict[str, Any]] = {}
    extensions: ClassVar[tuple[str, ...]]  # of the members of a WebDataset sample that it can read, without the dot
    written_as: ClassVar[str]  # file extension of the output of `to_bytes`
    mime: ClassVar[str]  # media type of the output of `to_bytes`
    num_dims: ClassVar[int]  # an array with more dimensions holds several samples
    size_columns: ClassVar[tuple[str, ...]]  # columns of a token shard with the original's size
    default_budget: ClassVar[float]  # size of a batch, in the unit of `elements`
    default_loss_weights: ClassVar[dict[str, float]]  # every loss that `losses` can return
    config: Any  # an instance of Config

    def read(self, data: bytes, extension: str = "") -> Decoded:
        """Decodes and preprocesses a sample. Raises BadSample with the reason for any error.

        extension: of the member, without the dot, for formats that cannot be recognised by their first bytes.
        """
        try:
            return self.from_bytes(data, extension)
        except BadSample:
            raise
        except MemoryError as error:
            raise BadSample(
                f"not enough memory to decode it: {' '.join(str(error).split()) or 'MemoryError'}"
            ) from error
        except Exception as error:  # decoders raise many kinds of exceptions for damaged files
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadSample(f"the file is damaged, or of a kind that cannot be read ({what})") from error

    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        """Like `read`, but raises any exception."""
        raise AssertionError

    def with_limits(self, limits: dict[str, float]) -> "Modality":
        """This modality with other limits on the size of a sample, such as max_pixels. Nothing else changes.

        Raises ValueError if this modality has no such limit.
        """
        if not limits:
            return self
        known = [f.name for f in dataclasses.fields(self.config)]
        for name in limits:
            if name not in known:
                raise ValueError(f"{name} is no limit of {self.name} samples")
        return type(self)(dataclasses.replace(self.config, **limits))  # type: ignore[call-arg]

    def file_of(self, value: Any, **stated: Any) -> bytes:
        """The bytes of a lossless file of a sample in memory. stated: what the caller says about an array.

        Raises ValueError if the value could mean several things, or is no sample of this modality.
        """
        raise AssertionError

    def check_preprocessed(self, array: np.ndarray) -> None:
        """Raises ValueError unless the array has the shape, dtype and range of a preprocessed sample."""
        raise AssertionError

    def to_bytes(self, array: np.ndarray) -> bytes:
        raise AssertionError

    def view(self, array: np.ndarray) -> bytes:
        """A picture of the sample for reports: PNG bytes."""
        raise AssertionError

    def segment(self, array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random crop of fixed size, for training."""
        raise AssertionError

    def check_views(self, crop: float, flip: bool) -> None:
        """Raises ValueError if this modality has no views of that size, or none that are mirrored."""
        raise AssertionError

    def view_length(self, crop: float) -> int:
        """The side or length of a view in array elements. crop: in pixels or seconds."""
        raise AssertionError

    def enlarged(self, array: np.ndarray, length: int) -> tuple[np.ndarray, str]:
        """The array, made large enough for views of this length, and a note on how; an empty one if it was already.

        Raises BadSample if it would exceed the limits on the size of a sample.
        """
        raise AssertionError

    def crop(self, array: np.ndarray, length: int, place: tuple[float, float, bool]) -> np.ndarray:
        """A view of this length. place: top and left as shares in [0, 1) of the free space, and whether it is mirrored.

        The same place in an array of another size is the same relative crop.
        """
        raise AssertionError

    def elements(self, budget: float) -> int:
        """Converts a budget in the user's unit (megapixels, seconds) to array elements."""
        raise AssertionError

    def bucket(self, array: np.ndarray) -> tuple[int, ...]:
        """Arrays with the same bucket can be in one batch."""
        raise AssertionError

    def batch(self, arrays: list[np.ndarray], factor: int) -> PaddedBatch:
        """The model's input from arrays of one bucket, padded to multiples of factor."""
        raise AssertionError

    def unbatch(self, x: Tensor, sizes: list[dict[str, int]]) -> list[np.ndarray]:
        """Arrays from the model's output, without the padding."""
        raise AssertionError

    def size_of(self, array: np.ndarray) -> dict[str, int]:
        """Size of a preprocessed array."""
        raise AssertionError

    def processed_size(self, size: dict[str, int]) -> dict[str, int]:
        """Size after preprocessing, from the original size."""
        raise AssertionError

    def size_of_grid(self, grid: tuple[int, ...], factor: int) -> dict[str, int]:
        """Size of what is decoded from a grid of tokens, with the padding that the encoder added."""
        raise AssertionError

    def losses(self, settings: dict[str, Any]) -> nn.Module:
        """A module that maps (x, x_hat) to unweighted reconstruction losses by name."""
        raise AssertionError

    def metrics(self, settings: dict[str, Any]) -> Metrics:
        raise AssertionError

    def rate(self, num_bits: float, sizes: list[dict[str, int]]) -> dict[str, float]:
        """Bit rate in the field's usual unit. num_bits: of all samples; sizes: their sizes after preprocessing."""
        raise AssertionError


def refuse_stated(what: str, stated: dict[str, Any]) -> None:
    """Raises ValueError if the caller states something about a value that says it itself."""
    for name, value in stated.items():
        if value not in (None, ""):
            raise ValueError(f"{name} is for arrays; {what} says it itself, so leave it out")


def described(array: np.ndarray) -> str:
    """Shape and dtype, for messages."""
    return f"shape {tuple(array.shape)} and dtype {array.dtype}"


def build_modality(name: str, settings: dict[str, Any]) -> Modality:
    """A modality from its name and the fields of its Config. Raises ValueError for an unknown name.

    A field that was added after the first version and is not among the settings has its value of that version.
    """
    cls = MODALITIES.get(name)
    return cls(cls.Config(**{**cls.unstated, **settings}))  # type: ignore[call-arg]


def identity_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a modality as they are hashed into ids: without those that change nothing if left out."""
    unstated = MODALITIES.get(name).unstated
    return {key: value for key, value in settings.items() if key not in unstated or value != unstated[key]}
