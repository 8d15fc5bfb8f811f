"""Spectrograms of the report: levels at the right place, and pictures of them."""

import io

import matplotlib.image
import numpy as np
import pytest

from tokenizer.modalities.audio.spectrogram import LOWEST_DB, MOST_FRAMES, spectrogram, spectrogram_png


def sine(hertz: float, seconds: float, sample_rate: int = 16_000, amplitude: float = 1.0) -> np.ndarray:
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    return (amplitude * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def picture(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png))


@pytest.mark.parametrize(("sample_rate", "hertz"), [(16_000, 1000), (16_000, 7000), (44_100, 1000)])
def test_a_sine_peaks_at_its_frequency_and_level(sample_rate: int, hertz: float):
    found = spectrogram(sine(hertz, 1.0, sample_rate, amplitude=0.1), sample_rate)
    middle = found.level_db[:, len(found.times) // 2]
    assert abs(found.frequencies[middle.argmax()] - hertz) <= found.frequencies[1] / 2
    assert middle.max() == pytest.approx(-20, abs=1.5)  # a Hann window loses up to 1.4 dB between two bins


def test_a_click_shows_at_its_time():
    clip = np.zeros(16_000, dtype=np.float32)
    clip[12_000] = 1
    found = spectrogram(clip, 16_000)
    assert found.times[found.level_db.sum(axis=0).argmax()] == pytest.approx(0.75, abs=found.hop_s)


def test_the_last_sample_is_seen():
    clip = np.zeros(16_001, dtype=np.float32)
    clip[-2] = 1
    assert spectrogram(clip, 16_000).level_db[:, -1].max() > LOWEST_DB


@pytest.mark.parametrize("length", [1, 320, 512, 513, 640, 100_000, 16_000 * 600])
def test_any_length_has_at_least_one_frame_and_not_too_many(length: int):
    found = spectrogram(np.zeros(length, dtype=np.float32), 16_000)
    assert found.level_db.shape == (257, len(found.times))
    assert 1 <= len(found.times) <= MOST_FRAMES
    assert (found.level_db == LOWEST_DB).all()


@pytest.mark.parametrize("length", [320, 16_000])
def test_silence_has_a_picture(length: int):
    assert picture(spectrogram_png(np.zeros(length, dtype=np.float32), 16_000)).ndim == 3


def test_a_level_has_the_same_colour_in_every_picture():
    loud, faint = (picture(spectrogram_png(sine(1000, 1, amplitude=a), 16_000)) for a in (0.5, 1e-4))
    assert loud.shape == faint.shape
    inside = (slice(60, -80), slice(120, -200))
    assert faint[inside][..., :3].mean() < loud[inside][..., :3].mean()
