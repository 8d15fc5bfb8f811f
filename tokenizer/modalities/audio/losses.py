"""Reconstruction losses for audio: waveform, multi-resolution STFT, multi-scale log-mel. Always in float32.

x and x_hat are [B, 1, T], samples in -1..1. Legend: W window, N FFT length, both in samples; F frames; M mel bands.
Windows longer than the clip are left out, except the shortest one: shorter clips are padded to its length with zeros.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STFT_WINDOWS_S = (0.010, 0.025, 0.050)  # Yamamoto 2020: 240, 600, 1200 samples at 24 kHz; 160, 400, 800 at 16 kHz
MEL_BANDS = {
    32: 5,
    64: 10,
    128: 20,
    256: 40,
    512: 80,
    1024: 160,
    2048: 320,
}  # by W; those of DAC, for every sample rate
# -80 dB of full scale: the logarithms treat everything below as silence, since their gradient grows as 1 / magnitude.
# 10 % of the bins of studio speech (pauses) are below it; almost none are below the rounding of 16 bits, -100 dB
FLOOR = 1e-4
QUIET = 1e-3  # -60 dB: lower limit of the norm in spectral convergence, so that silent batches do not dominate


class AudioLosses(nn.Module):
    """(x, x_hat) -> {"l1", "mse" (of the waveform), "stft", "mel"}: unweighted means over the batch.

    Values and gradients are finite for every finite input, including silence, DC and clips of one sample.
    """

    def __init__(self, sample_rate: int):
        super().__init__()
        self.stft = MultiResolutionSTFT(sample_rate)
        self.mel = MultiScaleMel(sample_rate)

    def forward(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # bf16 would lose everything 50 dB below the peak
            x, x_hat = x.float(), x_hat.float()
            return {
                "l1": (x - x_hat).abs().mean(),
                "mse": (x - x_hat).square().mean(),
                "stft": self.stft(x, x_hat),
                "mel": self.mel(x, x_hat).mean(),
            }


class Magnitudes(nn.Module):
    """[B, T] float32 -> |STFT| [B, N/2+1, F] >= FLOOR; Hann window, reflected borders. T must be at least W.

    The window has unit energy, so white noise of RMS r has magnitudes of RMS r for every W.
    """

    window: Tensor

    def __init__(self, window_length: int, hop: int, n_fft: int):
        super().__init__()
        self.window_length, self.hop, self.n_fft = window_length, hop, n_fft
        window = torch.hann_window(window_length)
        self.register_buffer("window", window / window.norm(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(
            x, self.n_fft, self.hop, self.window_length, self.window, pad_mode="reflect", return_complex=True
        )
        # added, not clamped: no gradient exceeds 1 and none is cut off
        return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt()


class MultiResolutionSTFT(nn.Module):
    """Mean over the windows of |S - S_hat|_F / |S|_F + mean |ln S - ln S_hat|: spectral convergence, log magnitude.

    S: magnitudes for Hann windows of 10, 25 and 50 ms, hop W/5, N the next power of two from W. Norms and means are
    over the batch. Source: Yamamoto 2020, arXiv 1910.11480, auxiliary loss. Differs: windows scale with the sample
    rate; N of the shortest window is not doubled; |S|_F is at least that of white noise at -60 dB.
    """

    def __init__(self, sample_rate: int):
        super().__init__()
        self.scales = nn.ModuleList()
        for seconds in STFT_WINDOWS_S:
            window_length = round(seconds * sample_rate)
            n_fft = 1 << (window_length - 1).bit_length()
            self.scales.append(Magnitudes(window_length, window_length // 5, n_fft))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """[B, 1, T] each -> scalar."""
        scales = _fitting(cast(Sequence[Magnitudes], self.scales), x.shape[-1])
        terms = [self._term(*_spectra(scale, x, x_hat)) for scale in scales]
        return torch.stack(terms).mean()

    def _term(self, s: Tensor, s_hat: Tensor) -> Tensor:
        convergence = (s - s_hat).norm() / s.norm().clamp(min=QUIET * s.numel() ** 0.5)
        return convergence + (s.log() - s_hat.log()).abs().mean()


class MultiScaleMel(nn.Module):
    """L1 distance of log10 mel magnitudes, mean over the windows: [B]. 0.05 is a distance of 1 dB.

    W = N = 32, 64 ... 2048 samples with 5, 10 ... 320 mel bands, hop W/4, as in DAC (arXiv 2306.06546; its 16khz.yml).
    Differs: the mean over windows instead of the sum, so that short clips are comparable; DAC's floor is lower. DAC
    weights the sum over seven windows by 15, which is 105 for this mean. The default weight is 1, which makes l1, stft
    and mel about equally strong and suits train.grad_clip=1; relative to mel, the quantizer's losses then have 105
    times DAC's weight. A VQ-VAE did not improve with more weight on mel (results/e4). configs/sound_44khz.yaml has
    DAC's weights.
    """

    def __init__(self, sample_rate: int):
        super().__init__()
        self.scales = nn.ModuleList(Magnitudes(length, length // 4, n_fft=length) for length in MEL_BANDS)
        for length, num_mels in MEL_BANDS.items():
            filters = mel_filterbank(sample_rate, length, num_mels)
            filters = filters[
                filters.sum(dim=1) > 0
            ]  # at high sample rates a band of a short window can contain no bin
            self.register_buffer(f"filters_{length}", filters, persistent=False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """[B, 1, T] each -> [B]."""
        scales = _fitting(cast(Sequence[Magnitudes], self.scales), x.shape[-1])
        terms = [self._term(scale, *_spectra(scale, x, x_hat)) for scale in scales]
        return torch.stack(terms).mean(dim=0)

    def _term(self, scale: Magnitudes, s: Tensor, s_hat: Tensor) -> Tensor:
        filters = self.get_buffer(f"filters_{scale.window_length}")
        return ((filters @ s).log10() - (filters @ s_hat).log10()).abs().mean(dim=(1, 2))


def mel_filterbank(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Triangles of height 1 over the bins of an FFT, evenly spaced in mel from 0 to sample_rate / 2.

    float32 [M, N/2+1]; a band narrower than the bins can be all zero. The same as librosa's with its default (Slaney)
    mel scale and norm=None: the height of a filter cancels in a distance of logarithms.
    """
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    corners = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2), num_mels + 2))[:, None]
    lower, center, upper = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (bins - lower) / (center - lower), (upper - bins) / (upper - center)
    return torch.from_numpy(np.minimum(rising, falling).clip(min=0)).float()


def hz_to_mel(hz: float) -> float:
    """Slaney's mel scale: linear up to 1 kHz = 15 mel; above, 27 mel are a factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * float(np.log(hz / 1000) / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _fitting(scales: Sequence[Magnitudes], length: int) -> list[Magnitudes]:
    """The scales with windows up to the clip's length, and always the shortest. scales must be in ascending order."""
    return [scale for i, scale in enumerate(scales) if i == 0 or scale.window_length <= length]


def _spectra(scale: Magnitudes, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    missing = max(0, scale.window_length - x.shape[-1])
    s, s_hat = (scale(F.pad(wave[:, 0], (0, missing))) for wave in (x, x_hat))
    return s, s_hat
