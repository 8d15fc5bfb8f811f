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
MOST_FRAMES = 1000  # of a long clip only so many windows are shown, spread over it
SHOWN_DB = 80.0
LOWEST_DB = -120.0


@dataclass
class Spectrogram:
    """level_db [frequencies, frames]: 0 is a sine of full scale. frequencies in Hz, times (of middles) and hop in s."""

    level_db: np.ndarray
    frequencies: np.ndarray
    times: np.ndarray
    hop_s: float


def spectrogram(waveform: np.ndarray, sample_rate: int) -> Spectrogram:
    """Levels of Hann windows of 32 ms, a quarter apart or more; waveform float [T] in -1..1, zeros after its end."""
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
    """waveform float [T] in -1..1."""
    return _panels_png({"": waveform}, sample_rate)


def spectrogram_pair_png(original: np.ndarray, reconstruction: np.ndarray, sample_rate: int) -> bytes:
    """Original left, reconstruction right, in the colours of the original's levels. Each float [T] in -1..1."""
    return _panels_png({"original": original, "reconstruction": reconstruction}, sample_rate)


def _panels_png(waveforms: dict[str, np.ndarray], sample_rate: int) -> bytes:
    """Panels side by side; the loudest level of the first is the brightest colour of all."""
    figure = Figure(figsize=(0.8 + 4.2 * len(waveforms), 2.8), layout="constrained")
    axes = np.ravel(figure.subplots(1, len(waveforms), sharex=True, sharey=True))
    spectra = [spectrogram(waveform, sample_rate) for waveform in waveforms.values()]
    top = max(float(spectra[0].level_db.max()), LOWEST_DB + SHOWN_DB)
    for axis, title, spectrum in zip(axes, waveforms, spectra, strict=True):
        image = _draw(axis, spectrum, top)
        axis.set(title=title, xlabel="time (s)")
    axes[0].set_ylabel("frequency (kHz)")
    figure.colorbar(image, ax=list(axes), label="dB of full scale")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _draw(axis: Axes, spectrum: Spectrogram, top: float) -> AxesImage:
    half_frame = spectrum.hop_s / 2
    half_bin = float(spectrum.frequencies[1]) / 2
    extent = (
        float(spectrum.times[0]) - half_frame,
        float(spectrum.times[-1]) + half_frame,
        -half_bin / 1000,
        (float(spectrum.frequencies[-1]) + half_bin) / 1000,
    )
    return axis.imshow(
        spectrum.level_db, origin="lower", aspect="auto", extent=extent, vmin=top - SHOWN_DB, vmax=top, cmap="magma"
    )
