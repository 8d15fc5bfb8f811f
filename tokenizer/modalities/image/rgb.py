"""Pixels of any kind to 8-bit sRGB: colour profiles, transparency, 16-bit and float numbers.

The rules have versions, because a tokenizer must always see the same pixels. A tokenizer states its version.
1: colour profiles are ignored. Integers above 16 bits are scaled from 0..65535 and floats from 0..1, or from their own
   range if it exceeds that. The transparent value of a 16-bit grey PNG is ignored.
2: colour profiles are converted to sRGB. Only numbers with a defined white are accepted: floats in 0..1, and unsigned
   integers of up to 16 bits, 12-bit ones too. The transparent value of a 16-bit grey PNG is transparent.
"""

import functools
import io
import math

import numpy as np
from PIL import Image as PIL
from PIL import ImageCms

from tokenizer.errors import BadSample
from tokenizer.modalities.image.files import TGA_ALPHA_BITS

NEWEST_RULES = 2
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
GREY = ("L", "LA", "La", "1")
FITTING_MODE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0
KEPT_TRANSFORMS = 32


def to_rgb(picture: PIL.Image, file: PIL.Image | None = None, rules: int = NEWEST_RULES) -> tuple[np.ndarray, str]:
    """uint8 [H, W, 3], with transparency on white, and a note if the colour profile could not be used, else "".

    file: the picture as it was opened, if `picture` was turned since: only that one has the tags of a TIFF. Raises
    BadSample for numbers without a defined white, or that are NaN.
    """
    if picture.info.get(TGA_ALPHA_BITS) == 0 and picture.mode == "RGBA":
        picture = picture.convert("RGB")  # its header says that the fourth byte is no alpha
    if picture.mode.startswith("I") or picture.mode == "F":
        with np.errstate(invalid="ignore"):  # NaN is refused by name; numpy would also warn
            picture = _by_range(picture) if rules == 1 else _by_depth(picture, file or picture)
    converted, note = (None, "") if rules == 1 else _through_profile(picture)
    if _has_alpha(picture):
        shown = picture.convert("RGBA")
        if converted is not None:
            converted.putalpha(shown.getchannel("A"))
            shown = converted
        return np.asarray(PIL.alpha_composite(PIL.new("RGBA", shown.size, "white"), shown).convert("RGB")), note
    return np.asarray((converted or picture).convert("RGB")), note


def _has_alpha(picture: PIL.Image) -> bool:
    return picture.mode in WITH_ALPHA or "transparency" in picture.info


# -- colour profiles --------------------------------------------------------------------------------------------------


def _through_profile(picture: PIL.Image) -> tuple[PIL.Image | None, str]:
    """The picture without alpha in sRGB, or None if it has no usable profile; then a note says why."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode == "LAB":
        return None, ""
    try:
        mode, transform = _transform_to_srgb(profile)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None, "unreadable colour profile, ignored"
    if not mode or (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and picture.mode not in GREY):
        return None, "colour profile of another kind of picture, ignored"
    if transform is None:
        return None, ""
    opaque = picture.convert("RGBA") if _has_alpha(picture) and mode == "RGB" else picture
    return ImageCms.applyTransform(opaque.convert(mode), transform), ""


@functools.lru_cache(KEPT_TRANSFORMS)
def _transform_to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Pillow's mode for the profile's colour space, or "" for other spaces, and a transform; None if it is sRGB.

    Relative colorimetric with black point compensation, as in most image editors. Raises OSError or PyCMSError if the
    profile is damaged.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = FITTING_MODE.get(source.profile.xcolor_space.strip())
    if mode is None:
        return "", None
    srgb = ImageCms.createProfile("sRGB")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB", renderingIntent=intent, flags=flags)
    return mode, None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a grid of all colours stays within rounding: most profiles are sRGB, and converting takes 18 ms/MP."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    converted = np.asarray(ImageCms.applyTransform(PIL.fromarray(colours), transform))
    return int(np.abs(converted.astype(int) - colours).max()) <= 1


# -- numbers of more than 8 bits --------------------------------------------------------------------------------------


def _by_depth(picture: PIL.Image, file: PIL.Image) -> PIL.Image:
    """Scaled by what the format says is black and white: mode L, or LA if one value is transparent."""
    numbers = np.asarray(picture)
    black, white = _black_and_white(picture.mode, file)
    low, high = float(numbers.min()), float(numbers.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadSample("pixels are NaN or infinite")
    if low < min(black, white) or high > max(black, white):
        raise BadSample(
            f"pixels from {low:g} to {high:g}, but only {min(black, white):g} to {max(black, white):g} has a defined "
            "brightness; convert the picture to 8 or 16 bits"
        )
    grey = PIL.fromarray(np.round((numbers.astype(np.float64) - black) / (white - black) * 255).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(PIL.fromarray(np.where(numbers == transparent, 0, 255).astype(np.uint8)))
    grey.info["icc_profile"] = picture.info.get("icc_profile")
    return grey


def _black_and_white(mode: str, file: PIL.Image) -> tuple[float, float]:
    """The numbers that mean black and white. Raises BadSample if the format defines none."""
    tags = getattr(file, "tag_v2", {})
    if tags and mode == "I":
        raise BadSample(
            "32-bit or signed integers have no defined white in TIFF; convert the picture to 8 or 16 bits, unsigned"
        )
    white = 1.0 if mode == "F" else 65535.0
    if tags and mode != "F":
        white = 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    return (white, 0.0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0.0, white)


def _by_range(picture: PIL.Image) -> PIL.Image:
    """Rules 1: scales integers from 16 bits and floats from 0..1, or by their own range if it is larger."""
    values = np.asarray(picture)
    full = 1.0 if values.dtype.kind == "f" else 65535.0
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadSample("pixels are NaN or infinite")
    if low == high > full:
        return PIL.fromarray(np.full(values.shape, 255, dtype=np.uint8))
    if (low >= 0 and high <= full) or low == high:
        low, high = 0.0, full
    values = values.clip(low, high)
    return PIL.fromarray(np.round((values - low) / (high - low) * 255).astype(np.uint8))
