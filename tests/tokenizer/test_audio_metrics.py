"""Audio metrics, compared to direct calls of the packages and to results by hand; NaN where not defined."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from pesq import pesq
from pystoi import stoi
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from tokenizer.modalities.audio.losses import AudioLosses
from tokenizer.modalities.audio.metrics import AudioMetrics, classic_stoi, si_sdr, wideband_pesq

ROOT = Path(__file__).parents[2]
RATE = 16_000
NAMES = {"mse", "si_sdr", "mel_distance", "pesq", "stoi"}


def speech(seconds: float, sample_rate: int = RATE) -> np.ndarray:
    """Four syllables per second of a voice that glides from 100 to 160 Hz, with a pause after every fourth one."""
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    phase = 2 * np.pi * np.cumsum(130 + 30 * np.sin(2 * np.pi * 0.7 * t)) / sample_rate
    formant = 900 + 500 * np.sin(2 * np.pi * 1.3 * t)
    voice = sum(np.sin(k * phase) * np.exp(-(((k * 130 - formant) / 600) ** 2)) for k in range(1, 30))
    syllables = np.sin(4 * np.pi * t) ** 2 * (t % 1.25 < 1)
    return (0.15 * voice * syllables).astype(np.float32)


def noisy(x: np.ndarray, snr_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(x)).astype(np.float32)
    return x + noise * x.std() * 10 ** (-snr_db / 20)


def measured(x: np.ndarray, x_hat: np.ndarray, **settings) -> dict[str, float]:
    found = AudioMetrics(RATE, **settings)(torch.tensor(x)[None, None], torch.tensor(x_hat)[None, None])
    assert all(values.shape == (1,) and values.dtype == torch.float32 for values in found.values())
    return {name: values.item() for name, values in found.items()}


CLEAN = speech(3)


# -- known properties ---------------------------------------------------------------------------------------------


def test_a_perfect_reconstruction_has_the_best_values():
    best = {"mse": 0, "si_sdr": 100, "mel_distance": 0, "pesq": 4.6439, "stoi": 1}
    assert measured(CLEAN, CLEAN) == pytest.approx(best, abs=1e-4)


def test_more_noise_is_worse_by_every_metric():
    good, fair, poor = (measured(CLEAN, noisy(CLEAN, snr)) for snr in (40, 20, 5))
    assert set(good) == NAMES
    for name in ("mse", "mel_distance"):
        assert good[name] < fair[name] < poor[name]
    for name in ("si_sdr", "pesq", "stoi"):
        assert good[name] > fair[name] > poor[name]


def test_loudness_changes_mse_but_not_si_sdr():
    x_hat = noisy(CLEAN, 10)
    loud, quiet = measured(CLEAN, x_hat, slow=False), measured(CLEAN, x_hat / 4, slow=False)
    assert quiet["si_sdr"] == pytest.approx(loud["si_sdr"], abs=1e-3)
    assert quiet["mse"] > 2 * loud["mse"]


# -- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_hat", "expected"), [([1, 1], 0), ([3, 1], 9.5424), ([-2, 0], 100), ([0, 5], -100)])
def test_si_sdr_of_x_1_0_by_hand(x_hat: list[float], expected: float):
    """The ratio of the part along x to the part across it: 20 log10 of 1 / 1, 3 / 1, 2 / 0, 0 / 5."""
    assert si_sdr(np.array([1.0, 0.0]), np.array(x_hat, dtype=float)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("snr", [-10, 0, 30])
def test_si_sdr_is_that_of_torchmetrics(snr: float):
    x_hat = noisy(CLEAN, snr)
    expected = scale_invariant_signal_distortion_ratio(torch.tensor(x_hat).double(), torch.tensor(CLEAN).double())
    assert si_sdr(CLEAN, x_hat) == pytest.approx(expected.item(), abs=1e-4)


def test_pesq_and_stoi_are_those_of_their_packages():
    x_hat = noisy(CLEAN, 15)
    found = measured(CLEAN, x_hat)
    assert found["pesq"] == pytest.approx(pesq(RATE, CLEAN, x_hat, "wb"), abs=1e-6)
    assert found["stoi"] == pytest.approx(stoi(CLEAN, x_hat, RATE, extended=False), abs=1e-6)


def test_mel_distance_is_the_loss():
    x, x_hat = (torch.tensor(wave)[None, None] for wave in (CLEAN, noisy(CLEAN, 15)))
    found = AudioMetrics(RATE, slow=False)(x, x_hat)["mel_distance"].item()
    assert found == pytest.approx(AudioLosses(RATE)(x, x_hat)["mel"].item())


def test_pesq_at_44_khz_is_that_of_the_clip_at_16_khz():
    x = speech(3, 44_100)
    x_hat = noisy(x, 15)
    expected = pesq(RATE, soxr.resample(x, 44_100, RATE), soxr.resample(x_hat, 44_100, RATE), "wb")
    assert wideband_pesq(x, x_hat, 44_100) == pytest.approx(expected, abs=1e-6)


def test_there_is_no_wide_band_at_8_khz():
    assert math.isnan(wideband_pesq(speech(2, 8000), speech(2, 8000), 8000))
    assert classic_stoi(speech(2, 8000), speech(2, 8000), 8000) == pytest.approx(1, abs=1e-4)


# -- batches and lengths ------------------------------------------------------------------------------------------


def test_padding_enters_no_metric():
    shorter = CLEAN[:20_000]
    x, x_hat = (torch.full((2, 1, len(CLEAN)), filler) for filler in (0.0, 0.7))
    for row, clip in enumerate((CLEAN, shorter)):
        x[row, 0, : len(clip)] = torch.tensor(clip)
        x_hat[row, 0, : len(clip)] = torch.tensor(noisy(clip, 15))
    found = AudioMetrics(RATE)(x, x_hat, lengths=[len(CLEAN), len(shorter)])
    alone = [measured(clip, noisy(clip, 15)) for clip in (CLEAN, shorter)]
    assert {name: values.tolist() for name, values in found.items()} == {
        name: [row[name] for row in alone] for name in NAMES
    }


def test_a_length_for_every_clip_is_asked_for():
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        AudioMetrics(RATE, slow=False)(torch.zeros(2, 1, 400), torch.zeros(2, 1, 400), lengths=[400])


def test_only_the_first_20_seconds_are_judged_by_pesq_and_stoi():
    """30 s of these bursts contain more utterances than PESQ's C code has room for, so it would crash the process."""
    t = np.arange(30 * RATE) / RATE
    x = (0.1 * np.random.default_rng(0).standard_normal(len(t)) * (t % 0.5 < 0.25)).astype(np.float32)
    x_hat = noisy(x, 15)
    first = slice(20 * RATE)
    assert wideband_pesq(x, x_hat, RATE) == wideband_pesq(x[first], x_hat[first], RATE)
    assert classic_stoi(x, x_hat, RATE) == classic_stoi(x[first], x_hat[first], RATE)


# -- where a metric is not defined --------------------------------------------------------------------------------

SILENCE, BROKEN = np.zeros_like(CLEAN), np.full_like(CLEAN, np.nan)
NOT_DEFINED = {
    "silence": (SILENCE, SILENCE, {"pesq", "stoi", "si_sdr"}),
    "noise made of silence": (SILENCE, CLEAN, {"pesq", "stoi", "si_sdr"}),
    "silence made of speech": (CLEAN, SILENCE, {"pesq", "stoi"}),
    "a model that diverged": (CLEAN, BROKEN, NAMES),
    "20 ms": (CLEAN[2000:2320], noisy(CLEAN[2000:2320], 20), {"pesq", "stoi"}),
    "one sample": (CLEAN[2000:2001], CLEAN[2001:2002], {"pesq", "stoi"}),
    "0.3 s": (CLEAN[2000:6800], noisy(CLEAN[2000:6800], 20), {"stoi"}),
    "a syllable in silence": (np.r_[SILENCE, CLEAN[:4000]], np.r_[SILENCE, noisy(CLEAN[:4000], 20)], {"stoi"}),
}


@pytest.mark.parametrize("case", NOT_DEFINED)
def test_a_metric_without_a_value_is_nan_and_nothing_else_is(case: str):
    x, x_hat, expected = NOT_DEFINED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(x, x_hat)
    assert {name for name, value in found.items() if math.isnan(value)} == expected


def test_silence_made_of_speech_has_the_worst_si_sdr():
    assert measured(CLEAN, SILENCE, slow=False)["si_sdr"] == -100


# -- without the extra --------------------------------------------------------------------------------------------


def test_the_slow_metrics_can_be_left_out_and_need_no_package_then(monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    assert set(measured(CLEAN, CLEAN, slow=False)) == NAMES - {"pesq", "stoi"}


@pytest.mark.parametrize("package", ["pesq", "pystoi", "soxr"])
def test_a_missing_package_is_named_with_what_to_do(package: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'tokenmill\[audio\]'.*slow=False"):
        AudioMetrics(RATE)


def test_importing_the_module_imports_no_package_of_the_extra():
    check = (
        "import sys, tokenizer.modalities.audio.metrics; sys.exit(bool({'pesq', 'pystoi', 'soxr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
