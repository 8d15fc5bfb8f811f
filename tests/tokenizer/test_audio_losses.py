"""Audio losses: compared to cases solved by hand, and finite for every finite input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.config import load_config
from tokenizer.modalities.audio.losses import (
    FLOOR,
    MEL_BANDS,
    QUIET,
    AudioLosses,
    Magnitudes,
    _fitting,
    _spectra,
    hz_to_mel,
    mel_filterbank,
    mel_to_hz,
)

RATE = 16_000
ROOT = Path(__file__).parents[2]


def noise(*shape: int, rms: float = 0.1, seed: int = 0) -> Tensor:
    return rms * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def losses() -> AudioLosses:
    return AudioLosses(RATE)


# -- the parts ----------------------------------------------------------------------------------------------------


def test_the_mel_scale_is_slaneys():
    """Reference: the first 16 of mel_frequencies(40), in the documentation of librosa 0.11."""
    expected = [0, 85.317, 170.635, 255.952, 341.269, 426.586, 511.904, 597.221, 682.538, 767.855]
    expected += [853.173, 938.49, 1024.856, 1119.114, 1222.042, 1334.436]
    assert mel_to_hz(np.linspace(0, hz_to_mel(11_025), 40))[:16] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("place", [0, 9, 40, 79])
def test_a_mel_band_is_a_triangle_between_its_neighbours(place: int):
    corners = mel_to_hz(np.linspace(0, hz_to_mel(8000), 82))[place : place + 3]
    triangle = np.interp(np.arange(257) * RATE / 512, corners, [0, 1, 0])
    assert mel_filterbank(RATE, 512, 80)[place].numpy() == pytest.approx(triangle, abs=1e-6)


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 24_000, 44_100, 48_000, 96_000])
def test_no_mel_band_without_a_bin_is_left_in(sample_rate: int):
    mel = AudioLosses(sample_rate).mel
    assert all((mel.get_buffer(f"filters_{length}").sum(dim=1) > 0).all() for length in MEL_BANDS)


def test_at_16_khz_every_mel_band_has_a_bin(losses):
    assert {n: len(losses.mel.get_buffer(f"filters_{n}")) for n in MEL_BANDS} == MEL_BANDS


def test_magnitudes_are_those_of_windows_cut_out_by_hand():
    x = noise(1, 400)
    window = np.sin(np.pi * np.arange(160) / 160) ** 2  # Hann
    padded = np.pad(x[0].double().numpy(), 128, mode="reflect")
    frames = [padded[start + 48 : start + 208] * window for start in range(0, 401, 32)]  # 48: (256 - 160) / 2
    expected = np.abs(np.fft.rfft(np.array(frames), 256)).T / np.sqrt(np.square(window).sum())
    assert Magnitudes(160, 32, 256)(x)[0].numpy() == pytest.approx(np.hypot(expected, FLOOR), abs=1e-5)


@pytest.mark.parametrize("length", [160, 1024])
def test_white_noise_has_magnitudes_of_its_own_rms(length: int):
    magnitudes = Magnitudes(length, length // 4, 1024)(noise(1, RATE))
    assert magnitudes.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.03)


def test_windows_at_16_khz_are_yamamotos_in_seconds(losses):
    sizes = [(scale.window_length, scale.hop, scale.n_fft) for scale in losses.stft.scales]
    assert sizes == [(160, 32, 256), (400, 80, 512), (800, 160, 1024)]


@pytest.mark.parametrize(("length", "stft", "mel"), [(320, 1, 4), (2048, 3, 7), (2047, 3, 6), (32, 1, 1), (5, 1, 1)])
def test_windows_longer_than_the_clip_are_left_out_but_for_the_shortest(losses, length: int, stft: int, mel: int):
    assert [len(_fitting(loss.scales, length)) for loss in (losses.stft, losses.mel)] == [stft, mel]


# -- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [320, RATE])
def test_half_the_amplitude_has_the_loss_computed_by_hand(losses, length: int):
    x = noise(2, 1, length)
    found = losses(x, x / 2)
    assert found["l1"].item() == pytest.approx(x.abs().mean().item() / 2)
    assert found["mse"].item() == pytest.approx(x.square().mean().item() / 4)
    assert found["stft"].item() == pytest.approx(0.5 + math.log(2), abs=1e-3)
    assert found["mel"].item() == pytest.approx(math.log10(2), abs=1e-3)


def test_more_noise_costs_more(losses):
    x = noise(2, 1, RATE)
    costs = [losses(x, x + noise(2, 1, RATE, rms=rms, seed=1)) for rms in (0.0, 0.01, 0.1)]
    for name in ("l1", "mse", "stft", "mel"):
        assert 0 == costs[0][name] < costs[1][name] < costs[2][name]


def test_a_clip_has_the_same_mel_distance_alone_and_in_a_batch(losses):
    x, x_hat = noise(3, 1, 4000), noise(3, 1, 4000, seed=1)
    torch.testing.assert_close(losses.mel(x, x_hat)[1:2], losses.mel(x[1:2], x_hat[1:2]))


def test_noise_in_silence_counts_from_60_db_below_full_scale(losses):
    """Convergence 1 at -60 dB, and at most ln(1e-3 / 1e-4) of log magnitude."""
    found = losses(torch.zeros(1, 1, RATE), noise(1, 1, RATE, rms=QUIET))["stft"]
    assert 0.9 < found < 1 + math.log(10)


def test_the_rounding_of_16_bits_costs_next_to_nothing(losses):
    silence, rounding = torch.zeros(1, 1, RATE), noise(1, 1, RATE, rms=2**-16)
    assert losses(silence, rounding)["mel"] < 0.01
    assert losses(noise(1, 1, RATE), noise(1, 1, RATE) + rounding)["mel"] < 0.001


# -- robustness ---------------------------------------------------------------------------------------------------

SILENCE, DC, LOUD = torch.zeros(2, 1, RATE), torch.full((2, 1, RATE), 0.5), noise(2, 1, RATE, rms=1.0)
PAIRS = {
    "silence, silence": (SILENCE, SILENCE), "silence, loud": (SILENCE, LOUD), "loud, silence": (LOUD, SILENCE),
    "DC, DC": (DC, DC), "DC, silence": (DC, SILENCE), "equal": (LOUD, LOUD), "tiny": (SILENCE, LOUD * 1e-20),
    "half silent": (torch.cat([SILENCE[:1], LOUD[:1]]), LOUD),
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 31, 33, 320, RATE])
@pytest.mark.parametrize("pair", PAIRS)
def test_value_and_gradient_are_finite(losses, pair: str, length: int):
    x, x_hat = (wave[..., :length].clone() for wave in PAIRS[pair])
    found = losses(x, x_hat.requires_grad_())
    for name, loss in found.items():
        (gradient,) = torch.autograd.grad(loss, x_hat, retain_graph=True)
        assert loss.isfinite(), name
        assert loss.shape == (), name
        assert gradient.isfinite().all(), name


def test_under_autocast_the_losses_are_those_of_float32(losses):
    x, x_hat = noise(2, 1, 4000), noise(2, 1, 4000, seed=1).bfloat16()
    expected = losses(x, x_hat.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(x, x_hat)
    assert found == expected
    assert {loss.dtype for loss in found.values()} == {torch.float32}


def test_the_losses_have_no_state_to_save(losses):
    assert losses.state_dict() == {}
    assert list(losses.parameters()) == []


def test_the_44_khz_codec_weighs_mel_against_its_quantizers_as_dac_does(losses):
    """DAC: 15 times the sum over seven windows, and the sums over nine layers of 1 codebook + .25 commitment."""
    weights = load_config([str(ROOT / "configs/sound_44khz.yaml")]).train.loss_weights
    x, x_hat = noise(1, 1, 8000), noise(1, 1, 8000, seed=1)
    windows = [losses.mel._term(scale, *_spectra(scale, x, x_hat)) for scale in losses.mel.scales]
    assert weights["mel"] * losses(x, x_hat)["mel"].item() == pytest.approx(15 * sum(map(float, windows)), rel=1e-5)
    assert (weights["l1"], weights["stft"]) == (0.0, 0.0)
    assert (weights["codebook"], weights["commitment"]) == (9 * 1.0, 9 * 0.25)
