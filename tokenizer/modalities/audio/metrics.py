"""Quality of reconstructed audio: PESQ, STOI, SI-SDR, mel distance, MSE. One number per clip."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.errors import MissingPackage
from tokenizer.modalities.audio.losses import MultiScaleMel

# PESQ's C code has room for 50 utterances and overwrites its stack with more; 30 s of short bursts crash the process.
# An utterance and the pause after it are at least 0.2 s each, so 20 s contain at most 50
MAX_JUDGED_S = 20.0
PESQ_RATE = 16_000
SHORTEST_STOI_S = (29 * 128 + 256) / 10_000  # 30 frames of 256 samples, hop 128, at 10 kHz
LARGEST_SI_SDR = 100.0  # dB, either way, so that a mean stays finite


class AudioMetrics(nn.Module):
    """(x, x_hat [B, 1, T] in -1..1, lengths) -> name -> [B] float32 on the CPU, NaN where a metric is not defined.

    lengths: number of samples of each clip if x is padded. Padding does not affect any metric.

    | name         | unit, range               | better | of                                        |
    | mse          | 0 up, full scale is 1     | lower  | the waveform; depends on loudness         |
    | si_sdr       | dB, -100..100             | higher | the waveform, independent of loudness     |
    | mel_distance | decades of magnitude      | lower  | the spectrum; equals the loss "mel"       |
    | pesq         | MOS-LQO, 1..4.64          | higher | perceived quality of the first 20 s       |
    | stoi         | about 0..1                | higher | intelligibility of the first 20 s         |

    slow: also computes PESQ and STOI, which takes up to 2 s per clip. Raises ImportError if slow is set and the extra
    "audio" is not installed.
    """

    def __init__(self, sample_rate: int, slow: bool = True):
        super().__init__()
        if slow:
            _require_slow()
        self.sample_rate, self.slow = sample_rate, slow
        self.mel = MultiScaleMel(sample_rate)

    @torch.no_grad()
    def forward(self, x: Tensor, x_hat: Tensor, lengths: list[int] | None = None) -> dict[str, Tensor]:
        lengths = [x.shape[-1]] * len(x) if lengths is None else lengths
        clips = zip(x.float(), x_hat.float(), lengths, strict=True)
        rows = [self._of_clip(one[:, :length], other[:, :length]) for one, other, length in clips]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in rows[0]}

    def _of_clip(self, x: Tensor, x_hat: Tensor) -> dict[str, float]:
        """x, x_hat [1, T] of one clip, without padding."""
        with torch.autocast(x.device.type, enabled=False):
            mel_distance = float(self.mel(x[None], x_hat[None]))
        original, reconstruction = x[0].cpu().numpy(), x_hat[0].cpu().numpy()
        values = {
            "mse": float((x - x_hat).square().mean()),
            "si_sdr": si_sdr(original, reconstruction),
            "mel_distance": mel_distance,
        }
        if self.slow:
            values["pesq"] = wideband_pesq(original, reconstruction, self.sample_rate)
            values["stoi"] = classic_stoi(original, reconstruction, self.sample_rate)
        return values


def si_sdr(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, x and x_hat [T]. Source: Le Roux 2019, arXiv 1811.02508.

    Clipped at +-100 dB: 100 for x_hat = x, -100 for an x_hat without any component of x, such as silence. NaN for
    silent x. Means are not subtracted: DC counts as signal.
    """
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    if not x.any():
        return math.nan
    target = (x_hat @ x) / (x @ x) * x
    signal, distortion = np.square(target).sum(), np.square(target - x_hat).sum()
    if signal == 0:
        return -LARGEST_SI_SDR
    if distortion == 0:
        return LARGEST_SI_SDR
    return float(np.clip(10 * np.log10(signal / distortion), -LARGEST_SI_SDR, LARGEST_SI_SDR))


def wideband_pesq(x: np.ndarray, x_hat: np.ndarray, sample_rate: int) -> float:
    """Listening quality (MOS-LQO) of the first 20 s by ITU-T P.862.2; 4.64 for identical clips. x, x_hat [T].

    Higher sample rates are resampled to 16 kHz. NaN for rates below 16 kHz (not wideband), for clips under 0.25 s, if x
    contains no speech, and if either clip is silent or not finite.
    """
    from pesq import PesqError, pesq

    x, x_hat = (wave[: int(MAX_JUDGED_S * sample_rate)] for wave in (x, x_hat))
    if sample_rate < PESQ_RATE or not _can_be_judged(x, x_hat):
        return math.nan
    if sample_rate != PESQ_RATE:
        import soxr

        x, x_hat = (soxr.resample(wave, sample_rate, PESQ_RATE) for wave in (x, x_hat))
    score = pesq(PESQ_RATE, x, x_hat, "wb", on_error=PesqError.RETURN_VALUES)
    if score in (PesqError.BUFFER_TOO_SHORT, PesqError.NO_UTTERANCES_DETECTED):
        return math.nan
    if score < 0:
        raise RuntimeError(f"PESQ failed with its code {score} on a clip of {len(x)} samples")
    return float(score)


def classic_stoi(x: np.ndarray, x_hat: np.ndarray, sample_rate: int) -> float:
    """Short-time objective intelligibility (not extended) of the first 20 s; 1 for identical clips. x, x_hat [T].

    Only frequencies below 4.3 kHz count, at every sample rate. NaN if x without frames 40 dB below its loudest one is
    shorter than 0.4 s, and if either clip is silent or not finite. Source: Taal 2010.
    """
    from pystoi import stoi

    x, x_hat = (wave[: int(MAX_JUDGED_S * sample_rate)] for wave in (x, x_hat))
    if len(x) < SHORTEST_STOI_S * sample_rate or not _can_be_judged(x, x_hat):
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)  # pystoi then returns 1e-5
        try:
            return float(stoi(x, x_hat, sample_rate, extended=False))
        except RuntimeWarning:
            return math.nan


def _can_be_judged(x: np.ndarray, x_hat: np.ndarray) -> bool:
    return all(bool(wave.any() and np.isfinite(wave).all()) for wave in (x, x_hat))


def _require_slow() -> None:
    try:
        import pesq  # noqa: F401
        import pystoi  # noqa: F401
        import soxr  # noqa: F401
    except ImportError as error:
        needs = f"PESQ and STOI need the packages pesq, pystoi and soxr ({error})"
        raise MissingPackage(
            f"{needs}; run pip install 'tokenmill[audio]', or turn both off with slow=False"
        ) from error
