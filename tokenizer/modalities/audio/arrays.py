"""Waveforms in memory as lossless wav files. What could mean several things is refused."""

import io
from typing import Any

import numpy as np

from tokenizer.modalities.audio.decoders import package
from tokenizer.modalities.base import described

SUBTYPES = {"int16": "PCM_16", "float16": "FLOAT", "float32": "FLOAT", "float64": "DOUBLE"}


def waveform_file(
    value: Any, *, sample_rate: int | None = None, value_range: tuple[float, float] | None = None, layout: str = ""
) -> bytes:
    """A wav file of an array [T], [T, 1] or [C, T] of int16, or of floats in -1..1. sample_rate: in Hz.

    Raises ValueError if the value is ambiguous or not a waveform.
    """
    if (value_range is not None and tuple(value_range) != (-1, 1)) or layout:
        raise ValueError(
            "value_range and layout are for images; floats of audio are in -1..1, and arrays [T] or [C, T]"
        )
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{type(value).__name__} is not audio; give bytes, a path, or an array with its sample_rate")
    about = described(value)
    if str(value.dtype) not in SUBTYPES:
        raise ValueError(f"an array of audio must be int16 or float; this one has {about}")
    if sample_rate is None or isinstance(sample_rate, str) or sample_rate != int(sample_rate) or sample_rate < 1:
        raise ValueError(f"an array of audio needs sample_rate in whole Hz, not {sample_rate!r}; it has {about}")
    if value.ndim not in (1, 2) or value.size == 0:
        raise ValueError(f"audio is [T] or [C, T], and not empty; this array has {about}")
    value = value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value  # [T, 1], as decode returns it
    if value.ndim == 2 and 1 < value.shape[0] >= value.shape[1]:
        raise ValueError(f"audio is [C, T]; this array has {about}, so transpose it if it is [T, C]")
    if not np.isfinite(value).all():
        raise ValueError(f"the array with {about} contains NaN or infinity")
    out = io.BytesIO()
    samples = value.astype(np.float32) if value.dtype == np.float16 else value
    package("soundfile").write(out, samples.T, int(sample_rate), format="WAV", subtype=SUBTYPES[str(value.dtype)])
    return out.getvalue()


def check_preprocessed(array: np.ndarray) -> None:
    """Raises ValueError unless the array is [T, 1] of float32, not empty, in -1..1."""
    if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != 1 or array.size == 0:
        raise ValueError(f"a preprocessed waveform is float32 [T, 1]; this array has {described(array)}")
    if not np.abs(array).max() <= 1:
        raise ValueError(f"a preprocessed waveform is in -1..1; this one reaches {np.abs(array).max():g}")
