"""Pictures in memory as lossless files. What could mean several things is refused."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image as PIL
from PIL import ImageOps

from tokenizer.errors import BadSample
from tokenizer.modalities.base import described, refuse_stated

CHANNELS = (1, 3, 4)
LAYOUTS = ("HWC", "CHW")
TOLERANCE = 1e-3  # of the range: rounding of float16 and resizing may leave the range by that much
AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def picture_file(
    value: Any, *, value_range: tuple[float, float] | None = None, layout: str = "", sample_rate: int | None = None
) -> bytes:
    """A PNG or TIFF file of a PIL image or of an array [H, W], [H, W, C] or [C, H, W] of uint8 or floats.

    value_range: what black and white are in a float array, such as (0, 1). layout: HWC or CHW, where the shape does not
    show it. Raises ValueError if the value is ambiguous or not a picture.
    """
    if sample_rate is not None:
        raise ValueError("sample_rate is for audio; this tokenizer is for images")
    if isinstance(value, PIL.Image):
        refuse_stated("a PIL image", {"value_range": value_range, "layout": layout})
        return _file(value)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{type(value).__name__} is not a picture; give bytes, a path, a PIL image, or an array")
    pixels = _channel_last(_to_uint8(value, value_range), layout)
    return _file(PIL.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)))


def check_preprocessed(array: np.ndarray) -> None:
    """Raises ValueError unless the array is [H, W, 3] of uint8, not empty."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"a preprocessed picture is uint8 [H, W, 3]; this array has {described(array)}")


def _file(picture: PIL.Image) -> bytes:
    if picture.size[0] == 0 or picture.size[1] == 0:
        raise ValueError(f"the picture is empty: {picture.width}x{picture.height} pixels")
    out, profile = io.BytesIO(), picture.info.get("icc_profile")
    try:
        upright = ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError) as error:  # of an image that is decoded only now
        raise BadSample(f"the PIL image cannot be decoded: {error}") from error
    kind: dict[str, Any] = {"format": "PNG", "compress_level": 0} if upright.mode in AS_PNG else {"format": "TIFF"}
    try:
        upright.save(out, **kind, **({"icc_profile": profile} if profile else {}))
    except OSError as error:
        raise ValueError(f"a PIL image of mode {upright.mode} cannot be stored; convert it to RGB") from error
    return out.getvalue()


def _to_uint8(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    limits = None if value_range is None else _limits(value_range)
    if array.dtype == np.uint8:
        if limits not in (None, (0, 255)):
            raise ValueError(f"value_range is {value_range}, but the array has {described(array)}, which is 0..255")
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of a picture must be uint8 or float; this one has {described(array)}")
    if limits is None:
        raise ValueError(
            f"a float array needs value_range, such as (0, 1) or (-1, 1); this one has {described(array)} and values "
            f"in {_values(array)}"
        )
    low, high = limits
    scaled = (array.astype(np.float64) - low) / (high - low)
    if not (
        np.isfinite(scaled).all() and -TOLERANCE <= scaled.min(initial=0) <= scaled.max(initial=0) <= 1 + TOLERANCE
    ):
        raise ValueError(
            f"value_range is {value_range}, but the array with {described(array)} has values in {_values(array)}"
        )
    return np.round(scaled.clip(0, 1) * 255).astype(np.uint8)


def _limits(value_range: Any) -> tuple[float, float]:
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError) as error:
        raise ValueError(f"value_range is {value_range!r}; it must be two numbers, such as (0, 1)") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range is {value_range}; it must be finite, and the first below the second")
    return low, high


def _channel_last(array: np.ndarray, layout: str) -> np.ndarray:
    if layout not in ("", *LAYOUTS):
        raise ValueError(f"layout is {layout!r}; choose one of: {', '.join(LAYOUTS)}")
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"a picture is [H, W], [H, W, C] or [C, H, W]; this array has {described(array)}")
    fits = [name for name, channels in (("HWC", array.shape[2]), ("CHW", array.shape[0])) if channels in CHANNELS]
    fits = [name for name in fits if name == layout] if layout else fits
    if len(fits) != 1:
        why = "both HWC and CHW fit; state layout" if fits else "the number of channels must be 1, 3 or 4"
        raise ValueError(f"an array has {described(array)}: {why}")
    return array if fits == ["HWC"] else array.transpose(1, 2, 0)


def _values(array: np.ndarray) -> str:
    if array.size == 0:
        return "nothing"
    if not np.isfinite(array).all():
        return "NaN or infinity"
    return f"{array.min():g}..{array.max():g}"
