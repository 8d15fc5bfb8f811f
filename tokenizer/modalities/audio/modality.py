"""Audio: files to mono waveforms at the model's sample rate and back, losses, metrics. Arrays are float32 [T, 1]."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.modalities.audio.arrays import check_preprocessed, waveform_file
from tokenizer.modalities.audio.losses import AudioLosses
from tokenizer.modalities.audio.metrics import AudioMetrics
from tokenizer.modalities.audio.waveform import (
    AudioConfig,
    read_waveform,
    require_packages,
    resampled_length,
    to_wav,
)
from tokenizer.modalities.base import MODALITIES, Decoded, Metrics, Modality, PaddedBatch


@MODALITIES.register("audio")
class Audio(Modality):
    """Sizes are {"sample_rate", "num_samples"}: of the original file, or after preprocessing at the model's rate."""

    Config = AudioConfig
    unstated = {"downmix": "mean", "gapless": False, "allow_truncated": False}
    extensions = (
        *("wav", "flac", "ogg", "oga", "opus", "mp3", "m4a", "aac", "g722", "aif", "aiff", "aifc", "au", "snd", "caf"),
        *("w64", "rf64", "sph", "nist", "webm", "weba"),
    )
    written_as = "wav"
    mime = "audio/wav"
    num_dims = 2
    size_columns = ("sample_rate", "num_samples")
    default_budget = 100.0
    default_loss_weights = {"l1": 1.0, "mse": 0.0, "stft": 1.0, "mel": 1.0}

    def __init__(self, config: AudioConfig):
        require_packages()  # here, because an ImportError in `read` would quarantine every sample
        self.config = config

    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        return Decoded(*read_waveform(data, self.config, extension))

    def file_of(self, value: Any, **stated: Any) -> bytes:
        return waveform_file(value, **stated)

    def check_preprocessed(self, array: np.ndarray) -> None:
        check_preprocessed(array)

    def size_of_grid(self, grid: tuple[int, ...], factor: int) -> dict[str, int]:
        return {"sample_rate": self.config.sample_rate, "num_samples": grid[0] * factor}

    def to_bytes(self, array: np.ndarray) -> bytes:
        return to_wav(array, self.config.sample_rate)

    def view(self, array: np.ndarray) -> bytes:
        from tokenizer.modalities.audio.spectrogram import (
            spectrogram_png,
        )  # imports matplotlib, which workers do not need

        return spectrogram_png(array[:, 0], self.config.sample_rate)

    def segment(self, array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random crop of size samples; a shorter clip is placed at random within silence."""
        missing = size - len(array)
        if missing > 0:
            before = int(rng.integers(missing + 1))
            return np.pad(array, ((before, missing - before), (0, 0)))
        start = int(rng.integers(len(array) - size + 1))
        return array[start : start + size]

    def check_views(self, crop: float, flip: bool) -> None:
        if flip:
            raise ValueError("tokens.views.flip is for pictures; leave it out")
        if self.view_length(crop) < 1 or crop > self.config.max_seconds:
            raise ValueError(
                f"tokens.views.crop is {crop} seconds; it must be at least one sample of audio, and at most "
                f"max_seconds, {self.config.max_seconds}"
            )

    def view_length(self, crop: float) -> int:
        """crop: in seconds."""
        return round(crop * self.config.sample_rate)

    def enlarged(self, array: np.ndarray, length: int) -> tuple[np.ndarray, str]:
        if len(array) >= length:
            return array, ""
        return np.pad(array, ((0, length - len(array)), (0, 0))), "shorter than tokens.views.crop, followed by silence"

    def crop(self, array: np.ndarray, length: int, place: tuple[float, float, bool]) -> np.ndarray:
        """The first share of the place is that of time."""
        start = int(place[0] * (len(array) - length + 1))
        return array[start : start + length]

    def elements(self, budget: float) -> int:
        """budget: in seconds."""
        return math.ceil(budget * self.config.sample_rate)

    def bucket(self, array: np.ndarray) -> tuple[int, ...]:
        """Lengths in one bucket differ by less than a factor of two, so padding at most doubles a batch."""
        return (len(array).bit_length(),)

    def batch(self, arrays: list[np.ndarray], factor: int) -> PaddedBatch:
        """x [B, 1, T], T a multiple of factor, zeros after each clip; the mask marks frames that are not padding."""
        frames = torch.tensor([-(-len(array) // factor) for array in arrays])
        longest = int(frames.max())
        x = torch.zeros(len(arrays), 1, longest * factor)
        for row, array in zip(x, arrays, strict=True):
            row[0, : len(array)] = torch.from_numpy(np.ascontiguousarray(array[:, 0]))
        return PaddedBatch(x, (torch.arange(longest) < frames[:, None])[:, None])

    def unbatch(self, x: Tensor, sizes: list[dict[str, int]]) -> list[np.ndarray]:
        waveforms = x.float().clamp(-1, 1).movedim(1, 2).cpu().numpy()
        return [waveform[: size["num_samples"]] for waveform, size in zip(waveforms, sizes, strict=True)]

    def size_of(self, array: np.ndarray) -> dict[str, int]:
        return {"sample_rate": self.config.sample_rate, "num_samples": len(array)}

    def processed_size(self, size: dict[str, int]) -> dict[str, int]:
        num_samples = resampled_length(size["num_samples"], size["sample_rate"], self.config.sample_rate)
        return {"sample_rate": self.config.sample_rate, "num_samples": num_samples}

    def losses(self, settings: dict[str, Any]) -> nn.Module:
        return AudioLosses(self.config.sample_rate, **settings)

    def metrics(self, settings: dict[str, Any]) -> Metrics:
        return BatchMetrics(AudioMetrics(self.config.sample_rate, **settings))

    def rate(self, num_bits: float, sizes: list[dict[str, int]]) -> dict[str, float]:
        seconds = sum(size["num_samples"] / size["sample_rate"] for size in sizes)
        return {"kbps": num_bits / 1000 / seconds if seconds else math.nan}


class BatchMetrics(Metrics):
    """Metrics of two batches of factor 1, without the padding of each clip."""

    def __init__(self, metrics: AudioMetrics):
        super().__init__()
        self.of_clips = metrics

    def forward(self, x: PaddedBatch, x_hat: PaddedBatch) -> dict[str, Tensor]:
        assert x.mask is not None
        return self.of_clips(x.x, x_hat.x, x.mask.sum(dim=(1, 2)).tolist())
