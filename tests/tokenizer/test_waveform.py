"""Audio files of every format to waveforms of exact length, and back; bad files give a reason."""

import contextlib
import io
import math
import struct
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from scipy.signal import resample_poly

from pipeline.corpus.samples import read_samples
from tests.corpus import encoded, picture
from tests.sounds import by_av, by_soundfile, delay, read, sine, size, snr, sweep, wav
from tokenizer.errors import BadSample
from tokenizer.modalities.audio.waveform import AudioConfig, Resampler, read_waveform, resampled_length, to_wav

ROOT = Path(__file__).parents[2]
LOSSLESS = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("RF64", "PCM_16")]
LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


# -- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.02, 1.37])
@pytest.mark.parametrize(("kind", "subtype"), LOSSLESS)
def test_lossless_files_give_their_exact_samples(kind: str, subtype: str, seconds: float, sample_rate: int):
    x = sweep(sample_rate, seconds)
    data = by_soundfile(x, sample_rate, kind, subtype)
    assert np.abs(read(data, sample_rate) - x).max() <= 2**-15
    assert size(data) == {"sample_rate": sample_rate, "num_samples": len(x)}


# Opus has no 44.1 kHz
LOSSY_AT = [
    (*lossy, r) for lossy in LOSSY for r in (8000, 16000, 24000, 44100, 48000) if (lossy[1], r) != ("OPUS", 44100)
]


@pytest.mark.parametrize("seconds", [0.02, 1.37])
@pytest.mark.parametrize(("kind", "subtype", "sample_rate"), LOSSY_AT)
def test_lossy_files_give_as_many_samples_and_about_their_values(kind, subtype, seconds: float, sample_rate: int):
    x = sweep(sample_rate, seconds)
    data = by_soundfile(x, sample_rate, kind, subtype)
    found = read(data, sample_rate)
    assert found.shape == x.shape
    assert size(data) == {"sample_rate": sample_rate, "num_samples": len(x)}
    assert seconds < 1 or abs(delay(x, found)) <= 2


@pytest.mark.parametrize("seconds", [0.02, 1.0, 1.37])
@pytest.mark.parametrize("sample_rate", [16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("codec", "options"), [("aac", {}), ("aac", {"movflags": "faststart"}), ("alac", {})])
def test_m4a_has_no_padding_left(tmp_path, codec, options, channels: int, sample_rate: int, seconds: float):
    x = sweep(sample_rate, seconds)
    data = by_av(tmp_path, np.repeat(x, channels, axis=1), sample_rate, codec, "ipod", **options)
    found = read(data, sample_rate, extension="m4a")
    assert found.shape == x.shape
    assert size(data) == {"sample_rate": sample_rate, "num_samples": len(x)}
    assert seconds < 1 or snr(x, found) > 20


def test_raw_aac_keeps_the_encoders_padding_since_it_has_no_header_for_it(tmp_path):
    x = sweep()
    found = read(by_av(tmp_path, x, 16000, "aac", "adts"))
    assert len(found) == 1024 + math.ceil(len(x) / 1024) * 1024
    assert snr(x, found[1024 : 1024 + len(x)]) > 20


def test_g722_is_two_samples_a_byte(tmp_path):
    x = sweep()
    data = by_av(tmp_path, x, 16000, "g722", "g722")
    assert size(data, extension="g722") == {"sample_rate": 16000, "num_samples": 2 * len(data)}
    found = read(data, extension="G722")
    late = delay(x, found)  # the delay of its two-band filters
    assert 0 < late < 40
    assert snr(x[:-late], found[late:]) > 15


@pytest.mark.parametrize("split", ["train", "heldout", "ood"])
def test_every_sample_of_speech_is_read(split: str):
    clips = [clip for tar in (ROOT / "samples/speech" / split).glob("*.tar") for clip in read_samples(str(tar))]
    assert len(clips) == {"train": 133, "heldout": 31, "ood": 21}[split]
    for clip in clips:
        found = read(clip.members["g722"], extension="g722")
        assert len(found) == 2 * len(clip.members["g722"])
        assert 0.3 <= len(found) / 16000 <= 15
        assert np.square(found).mean() > 1e-3  # -30 dB; none is silent


@pytest.mark.parametrize("start", [b"\xff\xfb\x90\x64", b"\xff\xf1\x50\x80"])
def test_g722_may_begin_as_mp3_or_aac_would(start: bytes):
    assert read(start + b"\xfa" * 156, extension="g722").shape == (320, 1)


@pytest.mark.parametrize(("codec", "kind"), [("libmp3lame", "mp3"), ("libopus", "ogg"), ("flac", "flac")])
def test_files_of_another_encoder_have_their_length_too(tmp_path, codec: str, kind: str):
    x = sweep()
    found = read(by_av(tmp_path, x, 16000, codec, kind) if codec != "flac" else unsized_flac(x))
    assert found.shape == x.shape
    assert snr(x, found) > 10


def unsized_flac(x: np.ndarray) -> bytes:
    return with_flac_total(by_soundfile(x, 16000, "FLAC", "PCM_16"), 0)


def with_flac_total(data: bytes, total: int) -> bytes:
    """Changes the number of samples in STREAMINFO, 36 bits (RFC 9639, 8.2)."""
    word = int.from_bytes(data[18:26], "big") >> 36 << 36
    return data[:18] + (word | total).to_bytes(8, "big") + data[26:]


def test_an_mp3_after_an_id3_tag_is_read():
    data = by_soundfile(sweep(), 16000, "MP3", "MPEG_LAYER_III")
    tagged = b"ID3\x04\0\0\0\0\x02\x00" + bytes(256) + data  # 2 * 128 bytes
    assert np.array_equal(read(tagged), read(data))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_32", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM"])
def test_every_kind_of_wav_is_read(subtype: str):
    x = sweep()
    found = read(wav(x, subtype=subtype))
    assert len(found) - len(x) in range(1100)  # ADPCM fills its last block
    assert snr(x, found[: len(x)]) > 20


def test_the_content_decides_and_not_the_name():
    data = by_soundfile(sweep(), 16000, "FLAC", "PCM_16")
    assert np.array_equal(read(data, extension="g722"), read(data, extension="wav"))


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 64])
def test_channels_are_averaged(channels: int):
    x = sweep(channels=channels)
    assert np.abs(read(wav(x)) - x.mean(axis=1, keepdims=True)).max() <= 2**-15


def test_reading_works_from_many_threads():
    data = [by_soundfile(sine(44100, 44100, 100 * i), 44100, "FLAC", "PCM_16") for i in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, data * 3))
    assert all(np.array_equal(a, read(d)) for a, d in zip(found, data * 3, strict=True))


# -- resampling ---------------------------------------------------------------------------------------------------

RATES = [8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000]


@pytest.mark.parametrize("rate_from", RATES)
@pytest.mark.parametrize("rate_to", [16000, 24000, 44100])
def test_a_resampled_sine_is_the_sine_at_the_other_rate(rate_from: int, rate_to: int):
    found = read(wav(sine(rate_from, rate_from), rate_from, "FLOAT"), rate_to)
    middle = slice(rate_to // 10, -rate_to // 10)  # the filter rings at the ends
    assert snr(sine(rate_to, rate_to)[middle], found[middle]) > 90


@pytest.mark.parametrize(("rate_from", "rate_to", "up", "down"), [(44100, 16000, 160, 441), (8000, 16000, 2, 1)])
def test_resampling_agrees_with_scipy(rate_from: int, rate_to: int, up: int, down: int):
    x = sweep(rate_from)
    expected = resample_poly(x.astype(np.float64), up, down, window=("kaiser", 12.0))
    assert snr(expected, read(wav(x, rate_from, "FLOAT"), rate_to)) > 50


def test_frequencies_above_the_lower_rates_limit_are_removed():
    found = read(wav(sine(44100, 44100, hertz=9000), 44100, "FLOAT"), 16000)
    assert np.abs(found[1600:-1600]).max() < 1e-4  # 0.5 before


def test_the_length_is_the_ceiling():
    assert [resampled_length(n, 48000, 16000) for n in (0, 1, 3, 4)] == [0, 1, 1, 2]
    assert resampled_length(10**15 + 1, 44100, 16000) == math.ceil(Fraction((10**15 + 1) * 16000, 44100))


def test_lengths_are_exact_for_any_clip():
    rng = np.random.default_rng(0)
    for rate_from in (1000, 8000, 11025, 44056, 44100, 48000, 768000):
        for num_samples in [1, 2, 3, *rng.integers(1, 20000, 12).tolist()]:
            data = wav(sine(rate_from, num_samples), rate_from)
            for rate_to in (16000, 24000, 44100):
                found, original = read_waveform(data, AudioConfig(rate_to))
                assert original == {"sample_rate": rate_from, "num_samples": num_samples}
                assert found.shape == (resampled_length(num_samples, rate_from, rate_to), 1)


@pytest.mark.parametrize("rate_from", [44100, 48000, 8000])
def test_blocks_give_what_the_whole_clip_gives(rate_from: int):
    x = np.random.default_rng(0).normal(0, 0.1, 100_001).astype(np.float32)
    whole = soxr.resample(x, rate_from, 16000, "HQ")
    for block in (777, 2**16):
        resampler = Resampler(rate_from, 16000)
        for start in range(0, len(x), block):
            resampler.add(x[start : start + block])
        found = resampler.finish()
        assert np.array_equal(found[: len(whole)], whole)
        assert len(found) - len(whole) in (0, 1)  # soxr rounds


# -- unusual but valid files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.25, -1.0])
@pytest.mark.parametrize("rate_from", [16000, 44100])
def test_silence_and_dc_are_read(value: float, rate_from: int):
    found = read(wav(np.full((rate_from, 1), value), rate_from))
    assert found.shape == (16000, 1)
    assert np.abs(found[1000:-1000] - value).max() < 1e-3


@pytest.mark.parametrize("rate_from", [16000, 44100])
def test_values_outside_the_range_are_clipped(rate_from: int):
    found = read(wav(4 * sine(rate_from, rate_from), rate_from, "FLOAT"))
    assert (found.min(), found.max()) == (-1, 1)
    inside = np.abs(2 * 2 * sine(16000, 16000))[1000:-1000] < 0.9
    assert np.abs(found - 4 * sine(16000, 16000))[1000:-1000][inside].max() < 1e-3


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000, 2_000_000_000])
def test_a_wav_from_a_pipe_does_not_know_its_size(claimed: int):
    assert np.array_equal(read(with_data_size(WAV, claimed)), read(WAV))


@pytest.mark.parametrize(("num_bytes", "num_samples"), [(2000, 1000), (2001, 1000)])
def test_a_wav_ends_where_its_header_says(num_bytes: int, num_samples: int):
    assert np.array_equal(read(with_data_size(WAV, num_bytes)), read(WAV)[:num_samples])


def test_a_flac_ends_where_its_header_says():
    data = by_soundfile(sweep(), 16000, "FLAC", "PCM_16")
    assert np.array_equal(read(with_flac_total(data, 1000)), read(data)[:1000])


# -- bad input ----------------------------------------------------------------------------------------------------

WAV = wav(sweep())


def with_data_size(data: bytes, num_bytes: int) -> bytes:
    at = data.index(b"data") + 4
    return data[:at] + struct.pack("<I", num_bytes) + data[at + 4 :]


def bare_wav(channels: int = 1, sample_rate: int = 16000, samples: bytes = bytes(3200)) -> bytes:
    """A 16-bit wav written by hand, because libraries do not write invalid ones."""
    form = struct.pack(
        "<HHIIHH", 1, channels, sample_rate, sample_rate * channels * 2 % 2**32, channels * 2 % 2**16, 16
    )
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def with_value(value: float) -> bytes:
    x = sweep()
    x[123] = value
    return wav(x, subtype="FLOAT")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"hello " * 99, "not an audio file that we can read"),
        (bytes(1000), "not an audio file that we can read"),
        (encoded(picture(64, 64)), r"not an audio file that we can read \(wav, .*PNG"),
        (encoded(picture(64, 64), "jpeg"), "not an audio file that we can read"),
        (b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n", "not an audio file that we can read"),
        (wav(np.zeros((0, 1))), "the wav header claims no samples$"),
        (with_data_size(WAV, 0), "claims no samples, but 32000 bytes follow"),
        (
            with_data_size(WAV, 10**9),
            "truncated: the wav header claims 1000000000 bytes of audio, the file has 32000",
        ),
        (WAV[:30], "no data chunk; it was probably truncated"),
        (with_value(np.nan), "sample 123 is NaN or infinite"),
        (with_value(-np.inf), "sample 123 is NaN or infinite"),
        (with_value(20000), "the peak is 20000, but full scale is 1"),
        (bare_wav(sample_rate=999), "sample rate 999 Hz is outside 1000..768000"),
        (bare_wav(sample_rate=768001), "sample rate 768001 Hz is outside 1000..768000"),
        (bare_wav(channels=65, samples=bytes(13000)), r"65 channels; allowed are 1\.\.64"),
        (b"ID3\x04\0\0\0\x01\0\0" + bytes(20), "its ID3 tag claims 16394 bytes, the file has 30"),
    ],
)
def test_bad_input_is_refused_by_its_value(data: bytes, said: str):
    with pytest.raises(BadSample, match=said):
        read(data)


@pytest.mark.parametrize("data", [bare_wav(0), bare_wav(60000), bare_wav(sample_rate=0)])
def test_absurd_headers_are_refused(data: bytes):
    with pytest.raises(BadSample):
        read(data)


def test_a_picture_named_g722_is_refused():
    with pytest.raises(BadSample, match="not an audio file"):
        read(encoded(picture(64, 64)), extension="g722")


CUT = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY]


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "subtype"), CUT)
def test_a_cut_file_is_refused(kind: str, subtype: str, kept: float):
    data = by_soundfile(sweep(seconds=3), 16000, kind, subtype)
    with pytest.raises(BadSample):
        read(data[: int(kept * len(data))])


@pytest.mark.parametrize(("kind", "subtype"), [c for c in CUT if c[0] != "MP3"])
def test_one_lost_byte_is_enough(kind: str, subtype: str):
    with pytest.raises(BadSample, match="truncated"):
        read(by_soundfile(sweep(), 16000, kind, subtype)[:-1])


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("codec", ["aac", "alac"])
@pytest.mark.parametrize("flags", ["use_metadata_tags", "faststart", "frag_keyframe+empty_moov"])
def test_a_cut_m4a_is_refused(tmp_path, codec: str, flags: str, kept: float):
    data = by_av(tmp_path, sweep(seconds=3), 16000, codec, "ipod", movflags=flags)
    with pytest.raises(BadSample):
        read(data[: int(kept * len(data))])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_two_recordings_in_one_ogg_are_refused_since_one_would_be_lost(subtype: str):
    with pytest.raises(BadSample, match="several recordings"):
        read(2 * by_soundfile(sweep(), 16000, "OGG", subtype))


@pytest.mark.parametrize("total", [16001, 200_000, 2**36 - 1])
def test_a_flac_that_claims_more_samples_than_it_has_is_refused(total: int):
    with pytest.raises(BadSample, match=r"truncated|longer than max_seconds"):
        read(with_flac_total(by_soundfile(sweep(), 16000, "FLAC", "PCM_16"), total))


def test_an_mp3_that_claims_more_samples_than_it_has_is_refused():
    data = bytearray(by_soundfile(sweep(), 16000, "MP3", "MPEG_LAYER_III"))
    at = data.index(b"Xing") + 8
    data[at : at + 4] = struct.pack(">I", 200)
    with pytest.raises(BadSample, match=r"truncated: the header claims \d+ samples, the file has \d+"):
        read(bytes(data))


def test_an_mp3_without_a_length_header_is_taken_as_it_is(tmp_path):
    data = by_av(tmp_path, sweep(seconds=3), 16000, "libmp3lame", "mp3", write_xing="0", id3v2_version="0")
    assert 48000 <= len(read(data)) < 48000 + 3 * 1152
    assert 20000 < len(read(data[: len(data) // 2])) < 28000


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3", "mp4", "aac", "wav"])
def test_a_file_that_turns_into_noise_is_refused(kind: str):
    noise = np.random.default_rng(0).bytes(5000)
    begin = {"flac": b"fLaC", "ogg": b"OggS", "mp3": b"\xff\xfb\x90\x64", "mp4": b"\0\0\0\x20ftypM4A "}
    begin |= {"aac": b"\xff\xf1\x50\x80", "wav": b"RIFF\0\0\0\0WAVE"}
    with pytest.raises(BadSample) as found:
        read(begin[kind] + noise)
    assert " at 0x" not in str(found.value)


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY])
def test_flipped_bytes_never_raise_anything_else(kind: str, subtype: str):
    rng = np.random.default_rng(0)
    original = by_soundfile(sweep(), 16000, kind, subtype)
    for _ in range(30):
        data = bytearray(original)
        for at in rng.integers(0, min(len(data), 2000), 8):
            data[at] = rng.integers(256)
        with contextlib.suppress(BadSample):
            assert np.abs(read(bytes(data))).max() <= 1


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY])
def test_max_seconds_is_inclusive(kind: str, subtype: str):
    assert len(read(by_soundfile(sweep(seconds=1.0), 16000, kind, subtype), max_seconds=1.0)) == 16000
    with pytest.raises(BadSample, match="longer than max_seconds=1:"):
        read(by_soundfile(sweep(seconds=1.01), 16000, kind, subtype), max_seconds=1.0)


def test_max_seconds_holds_for_files_without_a_length_header(tmp_path):
    with pytest.raises(BadSample, match="longer than max_seconds=10"):
        read(b"\xfa" * 800_000, max_seconds=10, extension="g722")
    with pytest.raises(BadSample, match="longer than max_seconds=2"):
        read(unsized_flac(sweep(seconds=3)), max_seconds=2)


# -- back to bytes ------------------------------------------------------------------------------------------------


def test_16_bits_survive_the_way_there_and_back_to_the_bit():
    pcm = np.arange(-32768, 32768, dtype=np.int16)[:, None]
    data = wav(pcm)
    again = to_wav(read(data), 16000)
    assert np.array_equal(soundfile.read(io.BytesIO(again), dtype="int16", always_2d=True)[0], pcm)


def test_a_written_wav_is_16_bit_mono_at_its_rate_and_clipped():
    with wave.open(io.BytesIO(to_wav(np.array([[-2.0], [0.0], [0.5], [2.0]], np.float32), 24000))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        assert struct.unpack("<4h", file.readframes(4)) == (-32768, 0, 16384, 32767)


@pytest.mark.parametrize("bad", [np.zeros(5), np.zeros((5, 2)), np.full((5, 1), np.nan)])
def test_an_invalid_waveform_cannot_be_written(bad: np.ndarray):
    with pytest.raises(ValueError, match=r"a waveform must have shape \[T, 1\]|NaN"):
        to_wav(bad, 16000)


# -- packages -----------------------------------------------------------------------------------------------------


def test_decoders_are_imported_only_when_needed():
    module = "tokenizer.modalities.audio.waveform"
    code = f"import sys, {module}; sys.exit(bool({{'av', 'soxr', 'soundfile'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_package_is_named_with_the_command_that_helps():
    code = (
        "import sys; sys.modules['soxr'] = None; import tokenizer.modalities.audio.waveform as w; w.require_packages()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingPackage: audio needs the package soxr; run pip install 'tokenmill[audio]'" in found.stderr
