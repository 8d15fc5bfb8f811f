"""Spectrograms as PNG bytes, for the report of `evaluate`."""

import io
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

WINDOW_S = 0.032
MOST_FRAMES = 1000  # a longer clip is shown with this many windows, evenly spaced
TOP_DB = -15.0  # levels from here on have the brightest colour
SHOWN_DB = 80.0
LOWEST_DB = -120.0


@dataclass
class Spectrogram:
    """level_db [frequencies, frames]: 0 is a full-scale sine.

    frequencies in Hz; times (frame centres) and hop_s in s.
    """

    level_db: np.ndarray
    frequencies: np.ndarray
    times: np.ndarray
    hop_s: float


def spectrogram(waveform: np.ndarray, sample_rate: int) -> Spectrogram:
    """Levels of Hann windows of 32 ms, at least a quarter window apart. waveform float [T] in -1..1."""
    width = round(WINDOW_S * sample_rate)
    rest = max(0, len(waveform) - width)
    hop = max(width // 4, -(-rest // (MOST_FRAMES - 1)))
    starts = np.arange(-(-rest // hop) + 1) * hop
    padded = np.pad(waveform, (0, int(starts[-1]) + width - len(waveform)))
    window = np.hanning(width + 1)[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[starts] * window
    amplitude = np.abs(np.fft.rfft(frames)).T * 2 / window.sum()
    level_db = 20 * np.log10(amplitude.clip(min=10 ** (LOWEST_DB / 20)))
    times = (starts + width / 2) / sample_rate
    return Spectrogram(level_db, np.fft.rfftfreq(width, 1 / sample_rate), times, hop / sample_rate)


def spectrogram_png(waveform: np.ndarray, sample_rate: int) -> bytes:
    """PNG bytes.

    waveform float [T] in -1..1. Colours have the same levels in all spectrograms, so they can be compared.
    """
    figure = Figure(figsize=(5.0, 2.8), layout="constrained")
    axis = figure.subplots()
    image = _draw(axis, spectrogram(waveform, sample_rate))
    axis.set(xlabel="time (s)", ylabel="frequency (kHz)")
    figure.colorbar(image, ax=axis, label="dB of full scale")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _draw(axis: Axes, spectrum: Spectrogram) -> AxesImage:
    half_frame = spectrum.hop_s / 2
    half_bin = float(spectrum.frequencies[1]) / 2
    extent = (
        float(spectrum.times[0]) - half_frame,
        float(spectrum.times[-1]) + half_frame,
        -half_bin / 1000,
        (float(spectrum.frequencies[-1]) + half_bin) / 1000,
    )
    return axis.imshow(
        spectrum.level_db,
        origin="lower",
        aspect="auto",
        extent=extent,
        vmin=TOP_DB - SHOWN_DB,
        vmax=TOP_DB,
        cmap="magma",
    )
