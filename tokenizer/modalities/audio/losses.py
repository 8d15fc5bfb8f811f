"""Reconstruction losses of sound: waveform, multi-resolution STFT, multi-scale log-mel. Always in float32.

x and x_hat are [B, 1, T], samples in -1..1. Legend: W window, N FFT length, both in samples; F frames; M mel bands.
A window longer than the clip is left out. The shortest one stays: a clip below it is padded with zeros to its length.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STFT_WINDOWS_S = (0.010, 0.025, 0.050)  # Yamamoto 2020: 240, 600, 1200 samples at 24 kHz; 160, 400, 800 at 16 kHz
MEL_BANDS = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}  # by W; DAC's, at every sample rate
# -80 dB of full scale: what lies below is silence to the logarithms, whose gradient grows as 1 / magnitude. In 10 % of
# the bins of studio speech, its pauses, lies less than that, nearly nowhere less than the rounding of 16 bits, -100 dB
FLOOR = 1e-4
QUIET = 1e-3  # -60 dB: the spectral convergence of a quieter batch counts from here, else silence would outweigh all


class AudioLosses(nn.Module):
    """(x, x_hat) -> {"l1", "mse" of the waveform, "stft", "mel"}, each a mean over the batch, unweighted.

    Values and gradients are finite for any finite input: silence, DC, clips of one sample.
    """

    def __init__(self, sample_rate: int):
        super().__init__()
        self.stft = MultiResolutionSTFT(sample_rate)
        self.mel = MultiScaleMel(sample_rate)

    def forward(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # bf16 would lose what is 50 dB below the loudest
            x, x_hat = x.float(), x_hat.float()
            return {
                "l1": (x - x_hat).abs().mean(),
                "mse": (x - x_hat).square().mean(),
                "stft": self.stft(x, x_hat),
                "mel": self.mel(x, x_hat).mean(),
            }


class Magnitudes(nn.Module):
    """[B, T] float32 -> |STFT| [B, N/2+1, F] >= FLOOR; Hann window, reflected borders. T must be at least W.

    The window has unit energy, so that white noise of RMS r gives magnitudes of RMS r whatever W is.
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
        # the sum, not the larger: no magnitude has a gradient above 1, and none is cut off
        return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt()


class MultiResolutionSTFT(nn.Module):
    """Mean over the windows of |S - S_hat|_F / |S|_F + mean |ln S - ln S_hat|: spectral convergence, log magnitude.

    S are magnitudes of Hann windows of 10, 25 and 50 ms, hop W/5, N the power of two at or above W. Norms and means
    are over the batch. Source: Yamamoto 2020, arXiv 1910.11480, the auxiliary loss. Differs: windows follow the
    sample rate; N of the shortest is not doubled; |S|_F is at least that of white noise at -60 dB.
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
    """Mean over the windows of the L1 distance of log10 mel magnitudes, [B]; 0.05 is a distance of 1 dB. Lower: better.

    W = N = 32, 64 ... 2048 samples with 5, 10 ... 320 mel bands, hop W/4, as in DAC (arXiv 2306.06546; its 16khz.yml).
    Differs: the mean over windows and not the sum, so that short clips compare; DAC's floor lies lower. DAC weighs the
    sum over seven windows by 15, which is 105 for this mean. The default weight is 1, so that l1, stft and mel weigh
    about alike and train.grad_clip of 1 suits; losses of the quantizer then weigh 105 times more beside it than in DAC.
    A VQ-VAE gained nothing from more weight on mel (results/e4). configs/sound_44khz.yaml has DAC's weights.
    """

    def __init__(self, sample_rate: int):
        super().__init__()
        self.scales = nn.ModuleList(Magnitudes(length, length // 4, n_fft=length) for length in MEL_BANDS)
        for length, num_mels in MEL_BANDS.items():
            filters = mel_filterbank(sample_rate, length, num_mels)
            filters = filters[filters.sum(dim=1) > 0]  # at high rates a band of a short window may hold no bin
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

    float32 [M, N/2+1]; a band narrower than the bins may be all zero. As librosa's, with its default (Slaney's) mel
    scale and norm=None: how high a filter is cancels in a distance of logarithms.
    """
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    corners = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2), num_mels + 2))[:, None]
    lower, center, upper = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (bins - lower) / (center - lower), (upper - bins) / (upper - center)
    return torch.from_numpy(np.minimum(rising, falling).clip(min=0)).float()


def hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear below 1 kHz, which is 15 mel; above it 27 mel are a factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * float(np.log(hz / 1000) / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _fitting(scales: Sequence[Magnitudes], length: int) -> list[Magnitudes]:
    """Those with windows no longer than the clip, and the shortest in any case. Windows ascend."""
    return [scale for place, scale in enumerate(scales) if place == 0 or scale.window_length <= length]


def _spectra(scale: Magnitudes, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    missing = max(0, scale.window_length - x.shape[-1])
    s, s_hat = (scale(F.pad(wave[:, 0], (0, missing))) for wave in (x, x_hat))
    return s, s_hat
