"""Sounds and sound files for tests, written by libsndfile and FFmpeg."""

import io
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

from tokenizer.modalities.audio.waveform import AudioConfig, read_waveform


def read(
    data: bytes, sample_rate: int = 16000, max_seconds: float = 60, extension: str = "", **settings: object
) -> np.ndarray:
    """float32 [T, 1]. settings: of AudioConfig."""
    return read_waveform(data, AudioConfig(sample_rate, max_seconds, **settings), extension)[0]


def size(data: bytes, sample_rate: int = 16000, extension: str = "", **settings: object) -> dict[str, int]:
    return read_waveform(data, AudioConfig(sample_rate, 60, **settings), extension)[1]


def sine(sample_rate: int, num_samples: int, hertz: float = 440, channels: int = 1) -> np.ndarray:
    """float32 [T, C]; the same in every channel."""
    wave_ = 0.5 * np.sin(2 * np.pi * hertz * np.arange(num_samples) / sample_rate)
    return np.repeat(wave_[:, None], channels, axis=1).astype(np.float32)


def sweep(sample_rate: int = 16000, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    """float32 [T, C], 100 Hz to 3 kHz; each channel half as loud as the one before."""
    t = np.arange(round(sample_rate * seconds)) / sample_rate
    wave_ = 0.5 * np.sin(2 * np.pi * (100 * t + 2900 / (2 * seconds) * t**2))
    return np.stack([wave_ / 2**c for c in range(channels)], axis=1).astype(np.float32)


def by_soundfile(x: np.ndarray, sample_rate: int, kind: str, subtype: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, x, sample_rate, format=kind, subtype=subtype)
    return out.getvalue()


def wav(x: np.ndarray, sample_rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    return by_soundfile(x, sample_rate, "WAV", subtype)


def by_av(folder: Path, x: np.ndarray, sample_rate: int, codec: str, kind: str, **options: str) -> bytes:
    """FFmpeg writes to a real file, because m4a is completed at its start."""
    path = folder / "made"
    with av.open(str(path), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=sample_rate, layout={1: "mono", 2: "stereo", 8: "7.1"}[x.shape[1]])
        frame = _frame(x, codec, stream.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path.read_bytes()


def _frame(x: np.ndarray, codec: str, layout: str) -> av.AudioFrame:
    """Planar, but for g722, and for 8 channels, of which PyAV 18.1 cannot make planar frames."""
    if codec == "g722":
        return av.AudioFrame.from_ndarray(np.round(x.T * 32767).astype(np.int16), format="s16", layout=layout)
    if x.shape[1] == 8:
        return av.AudioFrame.from_ndarray(np.ascontiguousarray(x.reshape(1, -1)), format="flt", layout=layout)
    return av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T), format="fltp", layout=layout)


def snr(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal over error in dB."""
    error = float(np.mean((expected.astype(np.float64) - found) ** 2))
    return 10 * math.log10(float(np.mean(expected**2.0)) / error) if error else math.inf


def delay(expected: np.ndarray, found: np.ndarray) -> int:
    """The delay of found against expected, in samples, at most 2000 either way."""
    lags = range(-2000, 2001)
    x, y = expected[4000:8000, 0], found[2000:10000, 0]
    return lags[int(np.argmax([x @ y[2000 + lag :][:4000] for lag in lags]))]
