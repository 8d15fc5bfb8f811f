"""The audio modality: batches and masks, exact lengths, and padding, which never changes a token."""

import functools
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipeline.corpus.samples import read_samples
from tokenizer.autoencoder import Autoencoder
from tokenizer.errors import BadSample
from tokenizer.modalities.audio.modality import Audio, AudioConfig
from tokenizer.modalities.base import PaddedBatch, build_modality
from tokenizer.tokenizer import Tokenizer

SPEECH = Path(__file__).parents[2] / "samples/speech/heldout/speech-000.tar"
NET = {"name": "seanet", "width": 4, "decoder_width": 4, "strides": [6, 4, 4], "dilations": [1, 3], "channels": 8}


@functools.cache
def clips() -> list[np.ndarray]:
    """Real speech of several lengths: float32 [T, 1] at 16 kHz."""
    audio = Audio(AudioConfig())
    return [audio.read(sample.members["g722"], "g722").array for sample in read_samples(str(SPEECH))]


@functools.cache
def tokenizer(causal: bool = False, name: str = "fsp") -> Tokenizer:
    torch.manual_seed(0)
    net = {**NET, "causal": causal, "window_frames": 64}
    made = Autoencoder({"modality": "audio", "net": net, "quantizer": {"name": name, "codebook_size": 64}})
    return Tokenizer(made.eval(), {})


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV")
    return out.getvalue()


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# -- padding never changes a token ----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_clip_has_the_same_tokens_alone_and_in_any_batch(causal):
    some = sorted(clips(), key=len)[:12]
    alone = [tokenizer(causal).encode_batch([clip])[0] for clip in some]
    assert same(tokenizer(causal).encode_batch(some), alone)
    assert same(tokenizer(causal).encode_batch(some[::-1])[::-1], alone)


def test_a_token_count_is_the_clip_over_the_hop_rounded_up():
    tokens = tokenizer().encode_batch(clips()[:8])
    assert [len(t) for t in tokens] == [-(-len(clip) // 96) for clip in clips()[:8]]


def test_a_clip_is_decoded_alike_alone_and_in_any_batch():
    some, audio = clips()[:6], tokenizer().modality
    tokens, sizes = tokenizer().encode_batch(some), [audio.size_of(clip) for clip in some]
    alone = [tokenizer().decode([t], [size])[0] for t, size in zip(tokens, sizes, strict=True)]
    assert same(tokenizer().decode(tokens, sizes), alone)


@pytest.mark.parametrize("count", [320, 321, 95, 96, 97, 1, 6144, 6145, 20_000])
def test_decode_gives_back_exactly_as_many_samples(count):
    clip = 0.1 * np.random.default_rng(0).standard_normal((count, 1)).astype(np.float32)
    tokens = tokenizer().encode_batch([clip])
    [reconstruction] = tokenizer().decode(tokens, [{"sample_rate": 16_000, "num_samples": count}])
    assert reconstruction.shape == (count, 1)
    assert np.abs(reconstruction).max() <= 1


def test_a_long_clip_in_windows_has_the_latents_of_the_whole():
    """A minute of speech: windows of 64 frames, compared to one pass over the whole clip."""
    whole = np.concatenate(clips())[: 16_000 * 60]
    frozen = tokenizer()
    [windowed] = frozen.latents([whole])
    x = frozen.modality.batch([whole], 96).x
    with torch.inference_mode():
        at_once = frozen.autoencoder.project_in(frozen.autoencoder.net.encode(x).movedim(1, -1))[0]
    torch.testing.assert_close(windowed, at_once, rtol=1e-4, atol=1e-5)


def test_silence_is_tokenized():
    silence = np.zeros((5000, 1), dtype=np.float32)
    [tokens] = tokenizer().encode_batch([silence])
    assert tokens.shape == (53,)


# -- preprocessing in ids -------------------------------------------------------------------------------------------


def with_preprocessing(settings: dict[str, object]) -> Tokenizer:
    return Tokenizer(tokenizer().autoencoder, settings)


def test_a_new_tokenizer_states_its_downmix_and_an_old_one_keeps_its_id(tmp_path):
    old, new = with_preprocessing({"sample_rate": 16_000}), with_preprocessing(asdict(AudioConfig()))
    assert new.preprocessing.items() >= {"downmix": "bs775", "gapless": True}.items()
    assert (old.preprocessing, old.modality.config.downmix) == ({"sample_rate": 16_000}, "mean")
    assert new.id != old.id != with_preprocessing({"sample_rate": 16_000, "downmix": "bs775"}).id
    for made in (old, new):
        made.save_pretrained(tmp_path / made.id)
        loaded = Tokenizer.from_pretrained(tmp_path / made.id)
        assert (loaded.id, loaded.modality.config) == (made.id, made.modality.config)


def test_the_rules_of_an_old_tokenizer_can_be_stated_and_give_its_ids():
    """So the latents that an earlier version cached are of use to a new codebook."""
    old = with_preprocessing({"sample_rate": 16_000})
    stated = with_preprocessing({"sample_rate": 16_000, "downmix": "mean", "gapless": False, "allow_truncated": False})
    assert (stated.id, stated.encoder_id, stated.preprocessing) == (old.id, old.encoder_id, old.preprocessing)


# -- files, segments, batches ---------------------------------------------------------------------------------------


def test_another_rate_and_stereo_become_mono_at_16_khz_and_the_original_size_is_kept():
    stereo = np.stack([np.sin(np.arange(44_100) / 20), np.zeros(44_100)], axis=1)
    found = Audio(AudioConfig()).read(wav(stereo, 44_100))
    assert found.array.shape == (16_000, 1)
    assert found.size == {"sample_rate": 44_100, "num_samples": 44_100}
    assert Audio(AudioConfig()).processed_size(found.size) == {"sample_rate": 16_000, "num_samples": 16_000}


@pytest.mark.parametrize("data", [b"", b"not audio", b"\x89PNG\r\n\x1a\n" + bytes(50), wav(np.zeros((0, 1)))])
def test_data_that_is_not_audio_is_a_bad_sample(data):
    with pytest.raises(BadSample):
        Audio(AudioConfig()).read(data, "wav")


def test_a_clip_longer_than_allowed_is_a_bad_sample():
    with pytest.raises(BadSample, match=r"max_seconds=0\.5"):
        Audio(AudioConfig(max_seconds=0.5)).read(wav(np.zeros((16_000, 1))))


def test_a_segment_is_a_piece_of_the_clip_or_the_clip_in_silence():
    audio, rng = Audio(AudioConfig()), np.random.default_rng(0)
    clip = np.arange(1, 101, dtype=np.float32)[:, None]
    piece = audio.segment(clip, 30, rng)
    assert np.array_equal(np.diff(piece[:, 0]), np.ones(29))
    padded = audio.segment(clip, 130, rng)
    assert padded.shape == (130, 1)
    assert np.array_equal(padded[padded != 0], clip[:, 0])


def test_a_batch_has_zeros_behind_each_clip_and_a_mask_of_its_frames():
    clips = [np.ones((n, 1), dtype=np.float32) for n in (5, 8, 1)]
    batch = Audio(AudioConfig()).batch(clips, factor=4)
    assert batch.x.shape == (3, 1, 8)
    assert batch.x.sum(dim=(1, 2)).tolist() == [5, 8, 1]
    assert batch.mask[:, 0].tolist() == [[True, True], [True, True], [True, False]]


def test_padding_enters_no_metric():
    audio = Audio(AudioConfig())
    quality = audio.metrics({"slow": False})
    x, x_hat = clips()[:2], [0.5 * clip for clip in clips()[:2]]
    together = quality(audio.batch(x, 1), audio.batch(x_hat, 1))
    for i in range(2):
        alone = quality(audio.batch(x[i : i + 1], 1), audio.batch(x_hat[i : i + 1], 1))
        for name in alone:
            assert float(together[name][i]) == pytest.approx(float(alone[name][0]), rel=1e-5)


def test_the_rate_is_in_kbit_per_second():
    """166.67 tokens of 10 bits per second are 1.67 kbit/s, as in the paper."""
    size = {"sample_rate": 16_000, "num_samples": 96 * 500}
    assert Audio(AudioConfig()).rate(500 * 10.0, [size]) == {"kbps": pytest.approx(1.6667, abs=1e-4)}


def test_every_loss_has_a_default_weight():
    x = torch.randn(2, 1, 4096)
    losses = Audio(AudioConfig()).losses({})(x, 0.5 * x)
    assert set(losses) == set(Audio.default_loss_weights)
    assert all(value.isfinite() for value in losses.values())


def test_the_view_of_a_clip_is_a_picture():
    assert Audio(AudioConfig()).view(clips()[0]).startswith(b"\x89PNG")


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match=r"data.preprocess.sample_rate is 10"):
        build_modality("audio", {"sample_rate": 10})
    assert isinstance(PaddedBatch(torch.zeros(1)).to(torch.device("cpu")), PaddedBatch)


def test_a_batch_budget_is_in_seconds_of_audio_and_in_megapixels_of_pictures():
    assert build_modality("audio", {"sample_rate": 24_000}).elements(1.5) == 36_000
    assert build_modality("image", {}).elements(0.5) == 3 * 500_000
