"""Pictures: any common file to RGB and back, reconstruction losses, PSNR and SSIM.

Arrays are uint8 [H, W, 3]; the model's x is float32 [B, 3, H, W] in 0..1. Sides are padded to multiples of the factor
at the right and bottom by repeating the last pixel; the padding is removed from reconstructions.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as PIL
from PIL import ImageOps
from torch import Tensor, nn

from tokenizer.errors import BadSample
from tokenizer.modalities.base import MODALITIES, Decoded, Metrics, Modality, PaddedBatch
from tokenizer.modalities.image.arrays import check_preprocessed, picture_file
from tokenizer.modalities.image.files import EXTENSIONS, open_picture, silence_decoders
from tokenizer.modalities.image.frechet import FrechetFeatures
from tokenizer.modalities.image.perceptual import load_perceptual
from tokenizer.modalities.image.rgb import NEWEST_RULES, to_rgb

PILLOWS_LIMIT = 89_478_485  # PIL.Image.MAX_IMAGE_PIXELS, above which Pillow warns; it refuses twice as many
SSIM_WINDOW = 11  # Wang 2004: Gaussian of sigma 1.5
SMALLEST_MSE = 1e-10  # limits PSNR to 100 dB, so that means are finite


@dataclass
class ImageConfig:
    """short_side: resize the shorter side to this many pixels; 0 keeps the size. center_crop: crop to a square. Larger
    pictures than max_pixels or max_side are quarantined, to limit memory. color_rules: how pixels become RGB: 2
    converts colour profiles to sRGB and accepts only numbers with a defined white; 1 is for tokenizers made before it
    existed.
    """

    short_side: int = 0
    center_crop: bool = False
    max_pixels: int = 64_000_000
    max_side: int = 16_384
    color_rules: int = NEWEST_RULES

    def __post_init__(self) -> None:
        if not 1 <= self.color_rules <= NEWEST_RULES:
            raise ValueError(f"data.preprocess.color_rules is {self.color_rules}; choose 1 or 2")


@MODALITIES.register("image")
class Image(Modality):
    Config = ImageConfig
    extensions = EXTENSIONS
    unstated = {"color_rules": 1}
    written_as = "png"
    mime = "image/png"
    num_dims = 3
    size_columns = ("height", "width")
    default_budget = 0.5
    default_loss_weights = {"l1": 1.0, "mse": 0.0, "log_mse": 0.0, "perceptual": 1.0}

    def __init__(self, config: ImageConfig):
        self.config = config
        silence_decoders()
        if config.max_pixels > PILLOWS_LIMIT:  # then Pillow's decoders must accept more too, in the whole process
            PIL.MAX_IMAGE_PIXELS = max(config.max_pixels, PIL.MAX_IMAGE_PIXELS or 0)

    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        file = self._open(data, extension)
        picture = ImageOps.exif_transpose(file)
        size = {"height": picture.height, "width": picture.width}
        array, note = to_rgb(picture, file, self.config.color_rules)
        notes = [note] if note else []
        if _is_animated(file):
            notes.append("several frames or pages, only the first used")
        return Decoded(self._preprocess(array), size, notes)

    def _open(self, data: bytes, extension: str) -> PIL.Image:
        """Checks the size in the header before decoding any pixel."""
        picture = open_picture(data, extension)
        width, height = picture.size
        if width == 0 or height == 0:
            raise BadSample(f"the picture is empty: {width}x{height} pixels")
        self._check_limits(height, width, f"{width}x{height}")
        if self.config.short_side:
            self._check_limits(
                *self._resized(height, width), f"{width}x{height} with short_side={self.config.short_side}"
            )
        picture.load()
        return picture

    def _check_limits(self, height: int, width: int, what: str) -> None:
        if width * height > self.config.max_pixels:
            raise BadSample(f"{what}: more pixels than max_pixels={self.config.max_pixels}")
        if max(width, height) > self.config.max_side:
            raise BadSample(f"{what}: a side exceeds max_side={self.config.max_side}")

    def _preprocess(self, array: np.ndarray) -> np.ndarray:
        height, width = array.shape[:2]
        if self.config.short_side:
            height, width = self._resized(height, width)
            array = np.asarray(PIL.fromarray(array).resize((width, height), PIL.Resampling.BICUBIC))
        if self.config.center_crop:
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            array = array[top : top + side, left : left + side]
        return array

    def file_of(self, value: Any, **stated: Any) -> bytes:
        return picture_file(value, **stated)

    def check_preprocessed(self, array: np.ndarray) -> None:
        check_preprocessed(array)

    def size_of_grid(self, grid: tuple[int, ...], factor: int) -> dict[str, int]:
        height, width = grid
        return {"height": height * factor, "width": width * factor}

    def size_of(self, array: np.ndarray) -> dict[str, int]:
        return {"height": array.shape[0], "width": array.shape[1]}

    def processed_size(self, size: dict[str, int]) -> dict[str, int]:
        height, width = size["height"], size["width"]
        if self.config.short_side:
            height, width = self._resized(height, width)
        if self.config.center_crop:
            height = width = min(height, width)
        return {"height": height, "width": width}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        scale = self.config.short_side / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def to_bytes(self, array: np.ndarray) -> bytes:
        out = io.BytesIO()
        PIL.fromarray(array).save(out, format="PNG")
        return out.getvalue()

    def view(self, array: np.ndarray) -> bytes:
        return self.to_bytes(array)

    def segment(self, array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random size x size crop, mirrored with probability 1/2. Smaller pictures are enlarged first."""
        array = _resized_to(array, _at_least(size, *array.shape[:2]))
        height, width = array.shape[:2]
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        crop = array[top : top + size, left : left + size]
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def check_views(self, crop: float, flip: bool) -> None:
        limit = min(self.config.max_side, math.isqrt(self.config.max_pixels))
        if int(crop) != crop or not 1 <= crop <= limit:
            raise ValueError(f"tokens.views.crop is {crop}; it must be a whole number of pixels from 1 to {limit}")

    def view_length(self, crop: float) -> int:
        """crop: side of the square, in pixels."""
        return int(crop)

    def enlarged(self, array: np.ndarray, length: int) -> tuple[np.ndarray, str]:
        height, width = array.shape[:2]
        if min(height, width) >= length:
            return array, ""
        height, width = _at_least(length, height, width)
        self._check_limits(height, width, f"{width}x{height}, enlarged for tokens.views.crop={length}")
        return _resized_to(array, (height, width)), "smaller than tokens.views.crop, enlarged first"

    def crop(self, array: np.ndarray, length: int, place: tuple[float, float, bool]) -> np.ndarray:
        height, width = array.shape[:2]
        top, left = (int(share * (side - length + 1)) for share, side in zip(place[:2], (height, width), strict=True))
        crop = array[top : top + length, left : left + length]
        return crop[:, ::-1] if place[2] else crop

    def elements(self, budget: float) -> int:
        """budget: in megapixels."""
        return math.ceil(budget * 1e6) * 3

    def bucket(self, array: np.ndarray) -> tuple[int, ...]:
        return array.shape

    def batch(self, arrays: list[np.ndarray], factor: int) -> PaddedBatch:
        stacked = np.stack(arrays)
        right, bottom = -stacked.shape[2] % factor, -stacked.shape[1] % factor
        if right or bottom:
            stacked = np.pad(stacked, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
        x = torch.from_numpy(np.ascontiguousarray(stacked)).permute(0, 3, 1, 2)  # channels_last in memory
        return PaddedBatch(x.float() / 255)

    def unbatch(self, x: Tensor, sizes: list[dict[str, int]]) -> list[np.ndarray]:
        pixels = (x.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [p[: size["height"], : size["width"]] for p, size in zip(pixels, sizes, strict=True)]

    def losses(self, settings: dict[str, Any]) -> nn.Module:
        return ImageLosses(**settings)

    def metrics(self, settings: dict[str, Any]) -> Metrics:
        return ImageMetrics(self._preprocessed(), **settings)

    def _preprocessed(self) -> str:
        """The preprocessing as part of a metric's name: full, short256, crop or crop256."""
        kind = "crop" if self.config.center_crop else "short" if self.config.short_side else "full"
        return f"{kind}{self.config.short_side or ''}"

    def rate(self, num_bits: float, sizes: list[dict[str, int]]) -> dict[str, float]:
        return {"bits_per_pixel": num_bits / max(1, sum(size["height"] * size["width"] for size in sizes))}


def _at_least(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a picture whose smaller side is enlarged to size; unchanged if it is not smaller."""
    if min(height, width) >= size:
        return height, width
    scale = size / min(height, width)
    return max(size, round(height * scale)), max(size, round(width * scale))


def _resized_to(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if array.shape[:2] == shape:
        return array
    return np.asarray(PIL.fromarray(array).resize(shape[::-1], PIL.Resampling.BICUBIC))


class ImageLosses(nn.Module):
    """(x, x_hat) -> {"l1", "mse", "log_mse", and "perceptual" if a kind is set}, each a mean over the batch.

    log_mse is SQ-VAE's (arXiv 2205.07547): the likelihood with a decoder variance equal to the mse.
    """

    def __init__(self, perceptual: str = "", perceptual_weights: str = ""):
        super().__init__()
        self.perceptual = load_perceptual(perceptual, perceptual_weights or None) if perceptual else None

    def forward(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        mse = (x - x_hat).square().mean()
        losses = {"l1": (x - x_hat).abs().mean(), "mse": mse, "log_mse": mse.clamp(min=SMALLEST_MSE).log()}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(x, x_hat).mean()
        return losses


class ImageMetrics(Metrics):
    """{"mse", "psnr", "ssim", and a perceptual distance under its name}, each [B]; features for a Frechet distance.

    pictures: the preprocessing, for the name of the Frechet distance.
    """

    def __init__(
        self,
        pictures: str,
        *,
        perceptual: str = "",
        perceptual_weights: str = "",
        frechet: str = "",
        frechet_weights: str = "",
    ):
        super().__init__()
        self.perceptual = load_perceptual(perceptual, perceptual_weights or None) if perceptual else None
        self.frechet = FrechetFeatures(frechet, frechet_weights, pictures) if frechet else None

    @torch.no_grad()
    def forward(self, original: PaddedBatch, reconstruction: PaddedBatch) -> dict[str, Tensor]:
        x, x_hat = original.x, reconstruction.x
        mse = (x - x_hat).square().mean(dim=(1, 2, 3))
        values = {"mse": mse, "psnr": -10 * mse.clamp(min=SMALLEST_MSE).log10(), "ssim": _ssim(x, x_hat)}
        if self.perceptual is not None:
            values[self.perceptual.name] = self.perceptual(x, x_hat)
        return values

    def features(self, x: PaddedBatch, x_hat: PaddedBatch) -> dict[str, tuple[Tensor, Tensor]]:
        return {} if self.frechet is None else {self.frechet.name: (self.frechet(x.x), self.frechet(x_hat.x))}


def _is_animated(file: PIL.Image) -> bool:
    """Whether more frames or pages follow the first one. A damaged one counts."""
    try:
        return bool(getattr(file, "is_animated", False))
    except (OSError, EOFError, ValueError, SyntaxError, LookupError, TypeError, struct.error):
        return True


def _ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """SSIM of Wang 2004 for pictures in 0..1: [B]. NaN for pictures smaller than the window.

    Differs: torchmetrics pads the borders by reflection, and Wang leaves them out: up to 0.1 for pictures of 11..40 px.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim  # 2 s, which few workers need

    if min(x.shape[2:]) < SSIM_WINDOW:
        return x.new_full((len(x),), math.nan)
    return torch.atleast_1d(ssim(x_hat, x, data_range=1.0, reduction="none"))
