"""Sound files as the field has them: rarer containers, tags, missing end marks, files that end early."""

import contextlib
import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from tests.sounds import by_av, by_soundfile, read, sine, size, snr, sweep, wav
from tokenizer.errors import BadSample
from tokenizer.modalities.audio.formats import identify
from tokenizer.modalities.audio.modality import Audio, AudioConfig
from tokenizer.modalities.audio.ogg import LAST, pages, with_end_mark

# -- containers that libsndfile reads -----------------------------------------------------------------------------

CONTAINERS = {"aiff": "AIFF", "au": "AU", "caf": "CAF", "w64": "W64", "sph": "NIST", "rf64": "RF64", "wav": "WAV"}


@pytest.mark.parametrize("kind", CONTAINERS.values())
@pytest.mark.parametrize("channels", [1, 2])
def test_a_container_gives_its_exact_samples(kind: str, channels: int):
    x = sweep(22050, 0.7, channels)
    data = by_soundfile(x, 22050, kind, "PCM_16")
    assert np.abs(read(data, 22050) - x.mean(axis=1, keepdims=True)).max() <= 2**-15
    assert size(data) == {"sample_rate": 22050, "num_samples": len(x)}


@pytest.mark.parametrize("extension", [*CONTAINERS, "aif", "aifc", "snd", "nist", "webm", "weba"])
def test_members_of_these_names_are_read(extension: str):
    assert extension in Audio.extensions


@pytest.mark.parametrize(
    ("kind", "subtype"), [("AIFF", "FLOAT"), ("AU", "ULAW"), ("CAF", "ALAC_16"), ("W64", "PCM_24")]
)
def test_other_codecs_of_a_container_are_read(kind: str, subtype: str):
    x = sweep()
    found = read(by_soundfile(x, 16000, kind, subtype))
    assert found.shape == x.shape
    assert snr(x, found) > 30


@pytest.mark.parametrize("lost", [1, 1000, 15_000])
@pytest.mark.parametrize("kind", CONTAINERS.values())
def test_a_container_that_lost_its_end_is_refused(kind: str, lost: int):
    data = by_soundfile(sweep(), 16000, kind, "PCM_16")
    with pytest.raises(BadSample, match=r"truncated: the \w+ header claims 32000 bytes of audio, the file has"):
        read(data[:-lost])


@pytest.mark.parametrize("kind", CONTAINERS.values())
def test_a_container_that_ends_within_its_header_is_refused(kind: str):
    data = by_soundfile(sweep(), 16000, kind, "PCM_16")
    for kept in (13, 20, 30):
        with pytest.raises(BadSample):
            read(data[:kept])


@pytest.mark.parametrize("kind", CONTAINERS.values())
def test_a_container_without_samples_is_refused(kind: str):
    with pytest.raises(BadSample, match=r"claims no samples$"):
        read(by_soundfile(np.zeros((0, 1)), 16000, kind, "PCM_16"))


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("kind", "mark", "shift", "unknown"),
    [
        ("CAF", b"data", 4, b"\xff" * 8),
        ("W64", b"data\xf3\xac", 16, b"\xff" * 8),
        ("AU", b".snd", 8, b"\xff" * 4),
        ("AIFF", b"SSND", 4, b"\xff" * 4),
        ("RF64", b"data", 4, b"\xff" * 4),
    ],
)
def test_a_container_from_a_pipe_does_not_know_its_size(kind: str, mark: bytes, shift: int, unknown: bytes):
    data = by_soundfile(sweep(), 16000, kind, "PCM_16")
    assert np.array_equal(read(patched(data, data.index(mark) + shift, unknown)), read(data))


def test_a_wav_of_more_than_2_gb_may_know_its_size():
    data = wav(sweep())
    with pytest.raises(BadSample, match=r"truncated: the wav header claims 3000000000 bytes of audio"):
        read(patched(data, data.index(b"data") + 4, struct.pack("<I", 3_000_000_000)))


def test_a_bw64_file_is_read_like_its_rf64_twin():
    data = by_soundfile(sweep(), 16000, "RF64", "PCM_16")
    assert np.array_equal(read(patched(data, 0, b"BW64")), read(data))


def test_mp3_in_a_wav_may_lack_the_encoders_delay(tmp_path):
    x = sweep(22050, 2)
    found = read(by_av(tmp_path, x, 22050, "libmp3lame", "wav"), 22050)
    assert 0 <= len(found) - len(x) < 3000


@pytest.mark.parametrize("kind", [*CONTAINERS.values(), "WEBM", "M4A", "OPUS"])
def test_damage_anywhere_is_either_read_or_named(tmp_path, kind: str):
    by_ffmpeg = {"WEBM": ("libopus", "webm"), "M4A": ("aac", "ipod"), "OPUS": ("libopus", "ogg")}
    if kind in by_ffmpeg:
        original = by_av(tmp_path, sweep(48000), 48000, *by_ffmpeg[kind])
    else:
        original = by_soundfile(sweep(), 16000, kind, "PCM_16")
    rng = np.random.default_rng(0)
    for settings in ({}, {"allow_truncated": True}):
        for _ in range(20):
            data = bytearray(original)
            for at in rng.integers(0, min(len(data), 300), 4):
                data[at] = rng.integers(256)
            with contextlib.suppress(BadSample):
                assert np.abs(read(bytes(data), **settings)).max() <= 1


# -- ogg without its end flag -------------------------------------------------------------------------------------

OGG = {"VORBIS": (44100, 44100 * 3), "OPUS": (48000, 48000 * 3)}


def ogg(subtype: str, noise: float = 0.0) -> bytes:
    sample_rate, num_samples = OGG[subtype]
    x = sine(sample_rate, num_samples) + noise * np.random.default_rng(0).normal(size=(num_samples, 1))
    return by_soundfile(x.astype(np.float32), sample_rate, "OGG", subtype)


def reference_checksum(page: bytes) -> int:
    """RFC 3533, section 6: CRC-32, polynomial 0x04c11db7, bit by bit."""
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = register << 1 ^ (0x104C11DB7 if register & 0x80000000 else 0)
    return register


def rewritten(data: bytes, number: int, **changes: bytes) -> bytes:
    """The ogg file up to a page, which has other bytes at the start (head) or fewer segments (lacing, granule)."""
    page = list(pages(data))[number]
    head = bytearray(data[page.start : page.start + 27])
    head[5:6] = changes.get("flags", head[5:6])
    head[6:14] = changes.get("granule", head[6:14])
    lacing = changes.get("lacing", page.lacing)
    head[22:27] = bytes(4) + bytes([len(lacing)])
    body_at = page.start + 27 + len(page.lacing)
    whole = bytes(head) + lacing + data[body_at : body_at + sum(lacing)]
    return data[: page.start] + patched(whole, 22, struct.pack("<I", reference_checksum(whole)))


def without_end_flag(data: bytes) -> bytes:
    return rewritten(data, -1, flags=bytes([data[list(pages(data))[-1].start + 5] & ~LAST]))


def granule(data: bytes, number: int) -> int:
    start = list(pages(data))[number].start
    return struct.unpack("<q", data[start + 6 : start + 14])[0]


@pytest.mark.parametrize("subtype", OGG)
def test_an_ogg_without_its_end_flag_has_all_its_samples(subtype: str):
    data = ogg(subtype)
    bare = without_end_flag(data)
    assert bare != data
    assert np.array_equal(read(bare), read(data))
    assert size(bare)["num_samples"] == OGG[subtype][1]


@pytest.mark.parametrize("subtype", OGG)
def test_the_end_flag_is_set_as_libogg_sets_it(subtype: str):
    data = ogg(subtype)
    assert with_end_mark(without_end_flag(data)) == data
    assert with_end_mark(data) is data


@pytest.mark.parametrize("subtype", OGG)
def test_an_ogg_without_its_last_page_is_read_to_the_granule_of_the_page_before(subtype: str):
    data = ogg(subtype)
    cut = data[: list(pages(data))[-1].start]
    skipped = 312 if subtype == "OPUS" else 0  # the encoder's delay, which the granule counts
    found = read(cut, OGG[subtype][0])
    assert len(found) == granule(data, -2) - skipped < OGG[subtype][1]
    assert snr(read(data, OGG[subtype][0])[: len(found) - 2000], found[:-2000]) > 60


def test_an_ogg_whose_last_packet_would_continue_is_read_to_the_last_packet_that_ends():
    """As 487 of 1,836 files of a real corpus are. Here 255 bytes of the packet are there, and the rest is missing."""
    x = np.random.default_rng(0).normal(0, 0.2, (132_300, 2)).astype(np.float32)
    data = by_soundfile(x, 44100, "OGG", "VORBIS")  # noise is encoded in packets of 2048 samples, half of them new
    page = list(pages(data))[-3]
    assert page.lacing[-2:-1] == b"\xff" != page.lacing[-1:]
    last = granule(data, -3) - 1024
    cut = rewritten(data, -3, lacing=page.lacing[:-1], granule=struct.pack("<q", last))
    assert list(pages(cut))[-1].continues
    found = read(cut, 44100)
    assert len(found) == last
    assert snr(read(data, 44100)[:last], found) > 100


@pytest.mark.parametrize("lost", [1, 100])
@pytest.mark.parametrize("subtype", OGG)
def test_an_ogg_that_ends_within_a_page_is_refused_by_default(subtype: str, lost: int):
    data = ogg(subtype)[:-lost]
    with pytest.raises(BadSample, match=r"truncated: the last page.*data\.preprocess\.allow_truncated=true reads what"):
        read(data)
    whole = [page for page in pages(data) if page.end <= len(data)]
    assert np.array_equal(read(data, allow_truncated=True), read(data[: whole[-1].end]))


def test_an_ogg_that_ends_in_other_bytes_is_refused():
    with pytest.raises(BadSample, match="no end flag, and no other page follows"):
        read(without_end_flag(ogg("VORBIS")) + b"not a page")


# -- mp3 behind tags and zeros ------------------------------------------------------------------------------------

MP3 = by_soundfile(sweep(), 16000, "MP3", "MPEG_LAYER_III")


def id3(payload: bytes, footer: bool = False) -> bytes:
    """ID3v2.4, section 3.1 and 3.4."""
    num_bytes = bytes(len(payload) >> shift & 0x7F for shift in (21, 14, 7, 0))
    tag = b"ID3\x04\0" + (b"\x10" if footer else b"\0") + num_bytes + payload
    return tag + (b"3DI\x04\0\x10" + num_bytes if footer else b"")


@pytest.mark.parametrize(
    "front",
    [
        id3(bytes(200)) + id3(bytes(100)),
        id3(bytes(50), footer=True),
        id3(bytes(50), footer=True) + id3(b"\xff\xfb" * 300),
        id3(bytes(200)) + bytes(1000),
        id3(bytes(200)) + bytes(7) + id3(bytes(200)) + bytes(1),
        bytes(417),
    ],
)
def test_an_mp3_behind_tags_and_zeros_has_its_samples(front: bytes):
    assert np.array_equal(read(front + MP3), read(MP3))
    assert size(front + MP3) == {"sample_rate": 16000, "num_samples": 16000}


@pytest.mark.parametrize("data", [bytes(4000), id3(bytes(100)) + bytes(4000), bytes(10) + b"hello" * 100])
def test_zeros_alone_are_no_mp3(data: bytes):
    with pytest.raises(BadSample, match="not an audio file"):
        read(data)


def test_zeros_before_the_name_of_an_mp4_box_are_its_size():
    data = b"\0\0\xff\xf1free" + bytes(20)  # without the zeros it would start with a sync word
    assert identify(data, "m4a") == ("mp4", data)


# -- m4a by iTunes ------------------------------------------------------------------------------------------------


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


def by_itunes(m4a: bytes, delay: int, length: int) -> bytes:
    """With the tag that iTunes writes, in place of FFmpeg's tags. FFmpeg writes moov last, so no offset changes."""
    text = f" 00000000 {delay:08X} 00000000 {length:016X}" + 8 * " 00000000"
    name = box(b"mean", b"\0\0\0\0com.apple.iTunes") + box(b"name", b"\0\0\0\0iTunSMPB")
    tag = box(b"----", name + box(b"data", b"\0\0\0\1\0\0\0\0" + text.encode()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", tag)))
    at = m4a.index(b"moov") - 4
    udta = m4a.index(b"udta", at) - 4
    return m4a[:at] + box(b"moov", m4a[at + 8 : udta] + tags)


@pytest.mark.parametrize("sample_rate", [16000, 44100])
def test_an_m4a_by_itunes_has_neither_delay_nor_padding(tmp_path, sample_rate: int):
    x = sweep(sample_rate)
    data = by_itunes(by_av(tmp_path, x, sample_rate, "aac", "mp4", use_editlist="0"), 1024, len(x))
    found = read(data, sample_rate)
    assert found.shape == x.shape
    assert snr(x, found) > 20


def test_an_m4a_by_itunes_starts_after_the_delay_that_it_states(tmp_path):
    x = sweep(44100)
    data = by_itunes(by_av(tmp_path, x, 44100, "aac", "mp4", use_editlist="0"), 2112, 30_000)
    found = read(data, 44100)
    late = 2112 - 1024  # FFmpeg's encoder has a delay of 1024
    assert len(found) == 30_000
    assert snr(x[late : late + 30_000], found) > 20


def test_an_edit_list_and_the_tag_of_itunes_agree(tmp_path):
    x = sweep(44100)
    data = by_itunes(by_av(tmp_path, x, 44100, "aac", "mp4"), 1024, len(x))
    assert b"elst" in data
    found = read(data, 44100)
    assert found.shape == x.shape
    assert snr(x, found) > 20


def test_without_gapless_the_padding_stays(tmp_path):
    x = sweep(44100)
    data = by_itunes(by_av(tmp_path, x, 44100, "aac", "mp4", use_editlist="0"), 1024, len(x) - 500)
    assert len(read(data, 44100)) == len(x) - 500
    assert len(read(data, 44100, gapless=False)) > len(x)


@pytest.mark.parametrize("length", [0, 2**40])
def test_a_tag_of_itunes_that_cannot_be_right_is_ignored(tmp_path, length: int):
    x = sweep(44100)
    bare = by_av(tmp_path, x, 44100, "aac", "mp4")
    assert read(by_itunes(bare, 1024, length), 44100).shape == x.shape


# -- webm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.5, 1.37])
@pytest.mark.parametrize("kind", ["webm", "matroska"])
def test_webm_has_its_exact_length(tmp_path, kind: str, seconds: float):
    x = sweep(48000, seconds)
    data = by_av(tmp_path, x, 48000, "libopus", kind)
    found = read(data, 48000, extension="webm")
    assert found.shape == x.shape
    assert snr(x, found) > 10


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9, 0.999])
def test_a_cut_webm_is_refused(tmp_path, kept: float):
    data = by_av(tmp_path, sweep(48000, 3), 48000, "libopus", "webm")
    with pytest.raises(BadSample, match=r"truncated|damaged"):
        read(data[: int(kept * len(data))])


def test_a_live_webm_that_states_no_size_is_read(tmp_path):
    x = sweep(48000, 1.0)
    data = by_av(tmp_path, x, 48000, "libopus", "webm", live="1")
    at = data.index(b"\x18\x53\x80\x67") + 4
    assert data[at : at + 8] == b"\x01" + b"\xff" * 7
    assert 0 <= len(read(data, 48000)) - len(x) < 960


# -- loud files ---------------------------------------------------------------------------------------------------


def test_a_lossy_file_may_overshoot_more_than_a_file_of_floats():
    loud = 30 * sine(44100, 44100)
    vorbis = by_soundfile(loud, 44100, "OGG", "VORBIS")
    assert 10 < np.abs(soundfile.read(io.BytesIO(vorbis))[0]).max() < 30
    louder = by_soundfile(3 * loud, 44100, "OGG", "VORBIS")
    assert np.abs(soundfile.read(io.BytesIO(louder))[0]).max() > 20
    found = read(louder, 44100)
    assert (found.min(), found.max()) == (-1, 1)
    with pytest.raises(BadSample, match="the peak is 45, but full scale is 1"):
        read(wav(3 * loud, 44100, "FLOAT"), 44100)


def test_a_lossy_file_in_16_bit_units_is_refused():
    with pytest.raises(BadSample, match="the floats may be in 16-bit units"):
        read(by_soundfile(20_000 * sine(44100, 44100), 44100, "OGG", "VORBIS"))


# -- files that end early, on request -----------------------------------------------------------------------------


def faststart_m4a(folder: Path) -> bytes:
    return by_av(folder, sweep(seconds=3), 16000, "aac", "ipod", movflags="faststart")


EARLY: list[tuple[str, Callable[[Path], bytes]]] = [
    *[
        (kind, lambda _, kind=kind: by_soundfile(sweep(seconds=3), 16000, kind, "PCM_16"))
        for kind in CONTAINERS.values()
    ],
    ("FLAC", lambda _: by_soundfile(sweep(seconds=3), 16000, "FLAC", "PCM_16")),
    ("VORBIS", lambda _: ogg("VORBIS", noise=0.1)),
    ("MP3", lambda _: by_soundfile(sweep(seconds=3), 16000, "MP3", "MPEG_LAYER_III")),
    ("M4A", faststart_m4a),
    ("WEBM", lambda folder: by_av(folder, sweep(48000, 3), 48000, "libopus", "webm")),
]


@pytest.mark.parametrize(("kind", "made"), EARLY, ids=[kind for kind, _ in EARLY])
def test_with_allow_truncated_a_cut_file_gives_what_is_there(tmp_path, kind: str, made: Callable[[Path], bytes]):
    data = made(tmp_path)
    cut = data[: int(0.6 * len(data))]
    with pytest.raises(BadSample):
        read(cut)
    whole, found = read(data), read(cut, allow_truncated=True)
    assert 0.3 < len(found) / len(whole) < 0.75
    middle = slice(0, len(found) - 4000)  # the last frame of a codec needs the next one
    assert snr(whole[middle], found[middle]) > 60


def test_a_recording_that_was_not_closed_is_read_with_allow_truncated():
    data = wav(sweep())
    unclosed = patched(data, data.index(b"data") + 4, bytes(4))
    with pytest.raises(
        BadSample, match=r"probably not closed; data\.preprocess\.allow_truncated=true reads what is there"
    ):
        read(unclosed)
    assert np.array_equal(read(unclosed, allow_truncated=True), read(data))


def test_a_file_without_a_sample_is_refused_with_allow_truncated_too():
    for data in (wav(np.zeros((0, 1))), by_soundfile(sweep(), 16000, "FLAC", "PCM_16")[:60], ogg("VORBIS")[:80]):
        with pytest.raises(BadSample):
            read(data, allow_truncated=True)


# -- surround sound -----------------------------------------------------------------------------------------------

SURROUND = [("WAVEX", "PCM_16", 48000), ("FLAC", "PCM_16", 48000), ("RF64", "PCM_16", 48000)]
SURROUND += [("OGG", "VORBIS", 44100), ("OGG", "OPUS", 48000)]
# the order of channels in these files. WAVEX and FLAC: L R C LFE Ls Rs; Vorbis and Opus: L C R Ls Rs LFE
HALF_POWER = 2**-0.5
STANDARD = {"L": HALF_POWER, "R": HALF_POWER, "C": 1.0, "LFE": 0.0, "Ls": 0.5, "Rs": 0.5}
TOTAL = 2 + 2 * HALF_POWER  # so that all channels at full scale give full scale
ORDER = {"VORBIS": "L C R Ls Rs LFE", "OPUS": "L C R Ls Rs LFE"}


def surround(kind: str, subtype: str, sample_rate: int, channel: str) -> tuple[np.ndarray, bytes]:
    """A sine in one of six channels."""
    order = ORDER.get(subtype, "L R C LFE Ls Rs").split()
    x = sine(sample_rate, sample_rate // 2, hertz=100)  # low enough for the LFE of lossy codecs
    channels = np.zeros((len(x), 6), np.float32)
    channels[:, order.index(channel)] = x[:, 0]
    return x, by_soundfile(channels, sample_rate, kind, subtype)


@pytest.mark.parametrize("channel", STANDARD)
@pytest.mark.parametrize(("kind", "subtype", "sample_rate"), SURROUND)
def test_a_channel_of_5_1_has_the_weight_of_bs775(kind: str, subtype: str, sample_rate: int, channel: str):
    x, data = surround(kind, subtype, sample_rate, channel)
    found = read(data, sample_rate)
    assert found.shape == x.shape
    weight = float((found * x).sum() / (x * x).sum())
    assert weight == pytest.approx(STANDARD[channel] / TOTAL, abs=0.004)


def test_5_1_in_m4a_has_the_weights_of_bs775(tmp_path):
    path = tmp_path / "made.m4a"
    x = np.zeros((6, 16000), np.float32)
    x[2] = sine(16000, 16000)[:, 0]  # the centre, in FFmpeg's order
    with av.open(str(path), "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=16000, layout="5.1")
        frame = av.AudioFrame.from_ndarray(x, format="fltp", layout="5.1")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    found = read(path.read_bytes())[:, 0]
    assert float(found @ x[2] / (x[2] @ x[2])) == pytest.approx(1 / TOTAL, abs=0.004)


def wav_by_av(folder: Path, x: np.ndarray, layout: str) -> bytes:
    """x float32 [T, C], with the names of the layout."""
    path = folder / "made.wav"
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_f32le", rate=16000, layout=layout)
        for packet in [*stream.encode(packed(x, layout)), *stream.encode(None)]:
            container.mux(packet)
    return path.read_bytes()


def packed(x: np.ndarray, layout: str) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(x.reshape(1, -1), format="flt", layout=layout)
    frame.sample_rate = 16000
    return frame


@pytest.mark.parametrize("layout", ["3.0", "quad", "5.0", "5.1", "5.1(side)", "7.1"])
def test_the_downmix_agrees_with_ffmpegs_up_to_its_level(tmp_path, layout: str):
    """FFmpeg's resampler has the same matrix, but does not scale it."""
    channels = av.AudioLayout(layout).nb_channels
    x = np.random.default_rng(0).normal(0, 0.1, (4000, channels)).astype(np.float32)
    [mixed] = av.AudioResampler(format="fltp", layout="mono", rate=16000).resample(packed(x, layout))
    expected, found = mixed.to_ndarray()[0], read(wav_by_av(tmp_path, x, layout))[:, 0]
    assert snr(expected, float(expected @ found / (found @ found)) * found) > 100


def test_a_single_surround_channel_counts_as_it_does_by_way_of_stereo(tmp_path):
    """3/1: L' = L + 0.7071 C + 0.5 S, R' likewise, and 0.7071 (L' + R')."""
    x = np.zeros((4000, 4), np.float32)
    x[:, 3] = sine(16000, 4000)[:, 0]
    assert av.AudioLayout("4.0").channels[3].name == "BC"
    expected = HALF_POWER / (1 + 3 * HALF_POWER) * x[:, 3:]
    assert snr(expected, read(wav_by_av(tmp_path, x, "4.0"))) > 100


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF"])
def test_six_channels_without_names_are_averaged(kind: str):
    x = sweep(channels=6)
    assert np.abs(read(by_soundfile(x, 16000, kind, "PCM_16")) - x.mean(axis=1, keepdims=True)).max() <= 2**-15


def test_downmix_mean_averages_named_channels_too():
    x = sweep(channels=6)
    found = read(by_soundfile(x, 16000, "WAVEX", "PCM_16"), downmix="mean")
    assert np.abs(found - x.mean(axis=1, keepdims=True)).max() <= 2**-15


def test_stereo_is_averaged_by_either_rule_to_the_bit():
    data = by_soundfile(sweep(channels=2), 16000, "WAVEX", "PCM_16")
    assert np.array_equal(read(data), read(data, downmix="mean"))


def test_an_unknown_downmix_is_named():
    with pytest.raises(ValueError, match=r"data\.preprocess\.downmix is 'loud'; choose one of: bs775, mean"):
        AudioConfig(downmix="loud")


def test_a_surround_file_of_floats_keeps_its_check_of_the_peak():
    with pytest.raises(BadSample, match="the floats may be in 16-bit units"):
        read(by_soundfile(20_000 * sweep(channels=6), 16000, "WAVEX", "FLOAT"))


@pytest.mark.parametrize("kind", ["webm", "ipod"])
def test_eight_channels_of_ffmpeg_are_read(tmp_path: Path, kind: str):
    """PyAV counts more of them than there are, and reading those would end the process."""
    x = sine(48000, 24000, channels=8)
    found = read(by_av(tmp_path, x, 48000, "libopus" if kind == "webm" else "aac", kind), 48000, downmix="mean")
    assert abs(len(found) - len(x)) <= 1024
    assert snr(x[2000:20000, :1], found[2000:20000]) > 12


# -- values and positions that no decoder should give ------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 6])
def test_infinite_floats_of_several_channels_are_refused_by_name(channels: int):
    x = np.full((100, channels), np.inf, np.float32)
    x[:, 1] = -np.inf
    with pytest.raises(BadSample, match="sample 0 is NaN or infinite"):
        read(wav(x, subtype="FLOAT"))


def test_an_opus_file_with_a_gap_in_its_page_numbers_is_refused_in_words(tmp_path: Path):
    """libsndfile then reports positions beyond the length that it stated."""
    data = bytearray(by_av(tmp_path, sine(48000, 14400), 48000, "libopus", "ogg"))
    first = next(pages(bytes(data)))
    data[first.start + 21] = 0xFF
    data[first.start + 22 : first.start + 26] = bytes(4)
    checksum = reference_checksum(bytes(data[first.start : first.end]))
    data[first.start + 22 : first.start + 26] = checksum.to_bytes(4, "little")
    with pytest.raises(BadSample, match="its positions are beyond the length that it states"):
        read(bytes(data), 48000)
