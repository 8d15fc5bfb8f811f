"""What callers of `Tokenizer.encode` may give, as the bytes of a file that the modality reads.

A picture or waveform in memory becomes a lossless file first, so that its tokens are those that `tokenmill tokenize`
makes of that file.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tokenizer.modalities.base import Decoded, Modality, refuse_stated


def is_one(value: Any, num_dims: int) -> bool:
    """Whether the value is one sample. Lists, tuples, and arrays with more than num_dims dimensions are several."""
    if isinstance(value, list | tuple):
        return False
    return not isinstance(value, np.ndarray | torch.Tensor) or value.ndim <= num_dims


def read_input(value: Any, modality: Modality, open_file: Callable[[str], bytes], stated: dict[str, Any]) -> Decoded:
    """One sample, decoded and preprocessed.

    stated: what the caller says about arrays, such as value_range. Raises ValueError for an array that could mean
    several things, and BadSample for a file that cannot be read.
    """
    if isinstance(value, bytes | bytearray | memoryview | str | os.PathLike):
        refuse_stated("a file", stated)
    if isinstance(value, bytes | bytearray | memoryview):
        return modality.read(bytes(value))
    if isinstance(value, str | os.PathLike):
        place = os.fspath(value)
        return modality.read(open_file(place), place.rpartition(".")[2].lower() if "." in place else "")
    return modality.read(modality.file_of(as_array(value), **stated))


def as_array(value: Any) -> Any:
    """A tensor as an array; anything else unchanged. NumPy has no bfloat16, which becomes float32."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def check_preprocessed(value: Any, modality: Modality) -> np.ndarray:
    """The value as an array of the form that preprocessing gives. Raises ValueError for any other form."""
    array = as_array(value)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"preprocessed=True needs arrays, not {type(value).__name__}")
    modality.check_preprocessed(array)
    return array


def batches(arrays: list[np.ndarray], modality: Modality) -> Iterator[list[int]]:
    """Numbers of arrays that can be encoded together: those of one bucket, up to the modality's default budget."""
    limit = modality.elements(modality.default_budget)
    open_batches: dict[tuple[int, ...], list[int]] = {}
    for number, array in enumerate(arrays):
        batch = open_batches.setdefault(modality.bucket(array), [])
        if batch and (len(batch) + 1) * max(arrays[i].size for i in [*batch, number]) > limit:
            yield batch
            batch = open_batches[modality.bucket(array)] = []
        batch.append(number)
    yield from open_batches.values()
