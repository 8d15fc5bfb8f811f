"""Cards of pictures: an original, its reconstruction, where they differ, and their tokens."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from jobs.reports.pages.document import data_url

ERROR_SCALE = 64  # the absolute error, of 255, with the brightest colour
LARGEST_SIDE = 512  # of an embedded picture; a larger one is shrunk
TINY_SIDE = 48  # pictures up to this side are enlarged with sharp pixels
LOSSLESS_BUDGET = 3_000_000  # bytes of all pictures of a page; if they need more, they are compressed with losses


def as_array(png: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def shrunk(array: np.ndarray, side: int = LARGEST_SIDE) -> np.ndarray:
    """The picture with no side above this; unchanged if it is smaller."""
    height, width = array.shape[:2]
    if max(height, width) <= side:
        return array
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))


def as_url(array: np.ndarray, *, lossless: bool = True, quality: int = 90) -> str:
    """A data URL of a WebP file."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="WEBP", lossless=lossless, quality=quality, method=4)
    return data_url(out.getvalue(), "image/webp")


def error_map(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """The mean absolute error of the three channels as a colour: uint8 [H, W, 3]."""
    error = np.abs(original.astype(np.float32) - reconstruction).mean(axis=-1) / ERROR_SCALE
    return (colormaps["inferno"](error.clip(0, 1))[..., :3] * 255).astype(np.uint8)


def error_scale() -> str:
    """The colours of error maps, for CSS."""
    stops = [colormaps["inferno"](i / 8)[:3] for i in range(9)]
    return (
        "linear-gradient(90deg,"
        + ",".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in s)) for s in stops)
        + ")"
    )


def flat_patches(array: np.ndarray, factor: int) -> np.ndarray:
    """The picture with each factor x factor patch replaced by its mean colour."""
    height, width = array.shape[:2]
    padded = np.pad(array, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="edge").astype(np.float64)
    blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, 3)
    means = blocks.mean(axis=(1, 3)).round()
    return means.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width].astype(np.uint8)


def psnr(original: np.ndarray, other: np.ndarray) -> float:
    """In dB, of 8-bit pixels, 100 at most."""
    mse = float(np.mean((original.astype(np.float64) - other) ** 2)) / 255**2
    return float(-10 * np.log10(max(mse, 1e-10)))


def picture_cards(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[dict[str, Any]], bool]:
    """The pictures of each card, and whether they are lossless: they are if they fit into LOSSLESS_BUDGET."""
    originals, others = ([shrunk(array) for array in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
    lossless = _lossless_size([*originals, *others]) <= LOSSLESS_BUDGET
    cards = []
    for original, other in zip(originals, others, strict=True):
        height, width = original.shape[:2]
        sides = {
            "original": as_url(original, lossless=lossless),
            "reconstruction": as_url(other, lossless=lossless),
            "error": as_url(error_map(original, other), lossless=False, quality=75),
        }
        cards.append({**sides, "width": width, "height": height, "tiny": max(height, width) <= TINY_SIDE})
    return cards, lossless


def _lossless_size(arrays: Sequence[np.ndarray]) -> int:
    """Bytes of the arrays as data URLs times 3/4, estimated from some of them."""
    some = arrays[:: max(1, len(arrays) // 12)]
    if not some:
        return 0
    sizes = [len(as_url(array)) * 3 / 4 for array in some]
    return round(sum(sizes) / sum(array.size for array in some) * sum(array.size for array in arrays))


def compact_urls(pngs: Sequence[bytes], budget: int = LOSSLESS_BUDGET, side: int = 256) -> list[str]:
    """Data URLs of pictures: as they are if they fit into the budget, else shrunk to WebP."""
    if sum(map(len, pngs)) <= budget:
        return [data_url(png, "image/png") for png in pngs]
    return [as_url(shrunk(as_array(png), side), lossless=False, quality=85) for png in pngs]


def pairs_url(pairs: Sequence[tuple[np.ndarray, np.ndarray]], count: int = 4, side: int = 96) -> str:
    """A small picture: the middle squares of the first originals, and below each one its reconstruction."""
    columns = [np.concatenate([_middle(one, side) for one in pair]) for pair in pairs[:count]]
    return as_url(np.concatenate(columns, axis=1), lossless=False, quality=80)


def _middle(array: np.ndarray, side: int) -> np.ndarray:
    """The largest square in the middle, with this side."""
    height, width = array.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = Image.fromarray(array[top : top + edge, left : left + edge])
    return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR))
