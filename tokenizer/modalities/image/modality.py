"""Pictures: any common file to RGB and back, reconstruction losses, PSNR and SSIM.

Arrays are uint8 [H, W, 3]; the model's x is float32 [B, 3, H, W] in 0..1. Sides are padded to multiples of the factor
at the right and bottom by repeating the last pixel; the padding is removed from reconstructions.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as PIL
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from tokenizer.errors import BadSample
from tokenizer.modalities.base import MODALITIES, Decoded, Metrics, Modality, PaddedBatch
from tokenizer.modalities.image.frechet import FrechetFeatures
from tokenizer.modalities.image.perceptual import load_perceptual

# without this list Pillow opens every format it knows, EPS by running Ghostscript; JPEG includes the MPO of phones
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SSIM_WINDOW = 11  # Wang 2004: Gaussian of sigma 1.5
SMALLEST_MSE = 1e-10  # limits PSNR to 100 dB, so that means are finite


@dataclass
class ImageConfig:
    """short_side: resize the shorter side to this many pixels; 0 keeps the size. center_crop: crop to a square. Larger
    pictures than max_pixels or max_side are quarantined, to limit memory.
    """

    short_side: int = 0
    center_crop: bool = False
    max_pixels: int = 64_000_000
    max_side: int = 16_384


@MODALITIES.register("image")
class Image(Modality):
    Config = ImageConfig
    extensions = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
    written_as = "png"
    mime = "image/png"
    size_columns = ("height", "width")
    default_budget = 0.5
    default_loss_weights = {"l1": 1.0, "mse": 0.0, "log_mse": 0.0, "perceptual": 1.0}

    def __init__(self, config: ImageConfig):
        self.config = config

    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        picture = ImageOps.exif_transpose(self._open(data))
        size = {"height": picture.height, "width": picture.width}
        return Decoded(self._preprocess(to_rgb(picture)), size)

    def _open(self, data: bytes) -> PIL.Image:
        """Checks the size in the header before decoding any pixel."""
        if not data:
            raise BadSample("the file is empty")
        try:
            picture = PIL.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:  # its own message contains a memory address
            raise BadSample(
                f"not a picture that we can read ({', '.join(FORMATS)}); it starts with {data[:8]!r}"
            ) from error
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
        height, width = array.shape[:2]
        if min(height, width) < size:
            scale = size / min(height, width)
            height, width = max(size, round(height * scale)), max(size, round(width * scale))
            array = np.asarray(PIL.fromarray(array).resize((width, height), PIL.Resampling.BICUBIC))
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        crop = array[top : top + size, left : left + size]
        return crop[:, ::-1] if rng.random() < 0.5 else crop

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


def to_rgb(picture: PIL.Image) -> np.ndarray:
    """uint8 [H, W, 3]: 16-bit pictures are scaled, transparency is put on white, palettes are looked up."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = PIL.fromarray(_to_8_bits(np.asarray(picture)))
    has_alpha = picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info
    if has_alpha:
        picture = picture.convert("RGBA")
        picture = PIL.alpha_composite(PIL.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales integers from 16 bits and floats from 0..1. Pictures with values outside are scaled by their own range."""
    full = 1.0 if values.dtype.kind == "f" else 65535.0
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadSample("pixels are NaN or infinite")
    if low == high > full:
        return np.full(values.shape, 255, dtype=np.uint8)
    if (low >= 0 and high <= full) or low == high:
        low, high = 0.0, full
    values = values.clip(low, high)
    return np.round((values - low) / (high - low) * 255).astype(np.uint8)


def _ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """SSIM of Wang 2004 for pictures in 0..1: [B]. NaN for pictures smaller than the window.

    Differs: torchmetrics pads the borders by reflection, and Wang leaves them out: up to 0.1 for pictures of 11..40 px.
    """
    if min(x.shape[2:]) < SSIM_WINDOW:
        return x.new_full((len(x),), math.nan)
    return torch.atleast_1d(ssim(x_hat, x, data_range=1.0, reduction="none"))  # type: ignore[arg-type]
