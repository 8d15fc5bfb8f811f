"""Opens audio files and decodes them block by block.

soundfile decodes wav, w64, aiff, au, caf, nist, flac, ogg (vorbis, opus) and mp3; PyAV decodes m4a, aac, webm, g722,
and files that soundfile cannot open.

We always pass the format to PyAV: with format detection FFmpeg would also open playlists, which can refer to other
files and addresses.
"""

import contextlib
import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np

from tokenizer.errors import BadSample, MissingPackage
from tokenizer.modalities.audio.ogg import with_end_mark

# samples that libsndfile decodes at a time. It loses those of a block in which flac fails; mp3 needs large blocks,
# because soundfile seeks after each
BLOCK, FLAC_BLOCK = 2**16, 2**8
SOUNDFILE = ("wav", "w64", "aiff", "au", "caf", "nistsphere", "flac", "ogg", "mp3")
# allowed missing samples: some encoders count their mp3 header as a frame, and m4a can round to ms
MP3_SLACK, MP4_SLACK = 1152, 2048
PLANAR = {"u8p": "u1", "s16p": "i2", "s32p": "i4", "fltp": "f4", "dblp": "f8"}  # FFmpeg's names -> numpy's
# Vorbis I, section 4.3.9, and RFC 7845, section 5.1.1.2. FFmpeg gives the names in an order of its own
VORBIS_ORDER = {
    3: ("FL", "FC", "FR"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FC", "FR", "BL", "BR"),
    6: ("FL", "FC", "FR", "BL", "BR", "LFE"),
    7: ("FL", "FC", "FR", "SL", "SR", "BC", "LFE"),
    8: ("FL", "FC", "FR", "SL", "SR", "BL", "BR", "LFE"),
}


class DecodingStopped(Exception):
    """The decoder failed before the end of the file."""

    def __init__(self, why: str):
        super().__init__(f"decoding stopped before the end of the file ({why}): truncated or damaged")


@dataclass
class OpenFile:
    """blocks: float32 [T, C]; iterating raises DecodingStopped. claimed: number of samples in the header, None if it
    does not state it; slack: how many of them may be missing. float_pcm: the samples are stored as floats, in any unit.
    channel_names: FFmpeg's, in the order of the blocks, as far as open_audio was asked for them and the file has them.
    """

    sample_rate: int
    channels: int
    claimed: int | None
    blocks: Iterator[np.ndarray]
    slack: int = 0
    float_pcm: bool = False
    channel_names: tuple[str, ...] = ()


def open_audio(kind: str, data: bytes, *, channel_names: bool, gapless: bool, allow_truncated: bool) -> OpenFile:
    """channel_names: they are needed for surround sound. gapless: cut m4a to the length that iTunes wrote.
    allow_truncated: lose few samples of flac before a fault, at the price of speed.

    Raises BadSample if the file cannot be opened, or not one sample of it can be decoded.
    """
    data = with_end_mark(data) if kind == "ogg" else data
    block = FLAC_BLOCK if kind == "flac" and allow_truncated else BLOCK
    opened = _open_soundfile(kind, data, block) if kind in SOUNDFILE else None
    if opened is not None and opened.claimed != 0:
        if channel_names and opened.channels > 2:
            opened.channel_names = _channel_names(kind, data)
        return opened
    try:
        return _open_av(kind, data, gapless)
    except DecodingStopped as error:
        raise BadSample(str(error)) from error


def package(name: str) -> ModuleType:
    """Raises MissingPackage with the pip command if the package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"audio needs the package {name}; run pip install 'tokenmill[audio]'") from error


# -- soundfile ----------------------------------------------------------------------------------------------------


class _Content(io.BytesIO):
    """libsndfile seeks to places before the start of damaged files, and an error there would be printed by cffi."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Stays where it is if the place is before the start."""
        with contextlib.suppress(ValueError):
            super().seek(offset, whence)
        return self.tell()


def _open_soundfile(kind: str, data: bytes, block: int) -> OpenFile | None:
    """None if libsndfile cannot open the file, or would fail at the end: flac without a length in its header."""
    soundfile = package("soundfile")
    try:
        file = soundfile.SoundFile(_Content(data))
    except soundfile.LibsndfileError:
        return None
    if file.frames > 2**62:
        file.close()
        return None
    # without a length header, libsndfile estimates the length of an mp3 from the first frames
    claimed = file.frames if kind != "mp3" or _has_length_header(data) else None
    return OpenFile(
        file.samplerate,
        file.channels,
        claimed,
        _soundfile_blocks(file, block, soundfile.LibsndfileError),
        slack=MP3_SLACK if file.subtype.startswith("MPEG") else 0,
        float_pcm=file.subtype in ("FLOAT", "DOUBLE"),
    )


def _has_length_header(mp3: bytes) -> bool:
    """Whether the first frame is a length header instead of audio: Xing or Info (LAME), VBRI (Fraunhofer)."""
    return any(mark in mp3[:64] for mark in (b"Xing", b"Info", b"VBRI"))


def _soundfile_blocks(file: Any, size: int, failure: type[Exception]) -> Iterator[np.ndarray]:
    with file:
        try:
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                yield block
        except failure as error:
            raise DecodingStopped(error.error_string) from error  # type: ignore[attr-defined]
        except ValueError as error:  # soundfile asks for a negative number of samples
            raise DecodingStopped("its positions are beyond the length that it states") from error


def _channel_names(kind: str, data: bytes) -> tuple[str, ...]:
    """The names of the channels, which libsndfile does not tell. Empty if FFmpeg cannot open the file."""
    av = package("av")
    try:
        with av.open(io.BytesIO(data), format=kind, metadata_errors="replace") as container:
            stream = container.streams.audio[0]
            names = tuple(channel.name for channel in stream.layout.channels)
            is_vorbis = stream.codec_context.name in ("vorbis", "opus", "libvorbis", "libopus")
    except (av.FFmpegError, IndexError):
        return ()
    return VORBIS_ORDER.get(len(names), ()) if is_vorbis and "FL" in names else names


# -- PyAV ---------------------------------------------------------------------------------------------------------


def _open_av(kind: str, data: bytes, gapless: bool) -> OpenFile:
    av = package("av")
    try:
        container = av.open(io.BytesIO(data), format=kind, metadata_errors="replace")
    except av.FFmpegError as error:
        raise BadSample(f"the {kind} file cannot be opened ({error.strerror}): damaged or truncated") from error
    if not container.streams.audio:
        raise BadSample(f"the {kind} file has no audio stream")
    stream = container.streams.audio[0]
    frames = _av_frames(container, stream, av.FFmpegError)
    first = next(frames, None)
    if first is None:
        raise BadSample(f"the {kind} file has no samples")
    rate, channels = first.sample_rate, first.layout.nb_channels  # a header can state those of a lower layer (HE-AAC)
    has_length = kind in ("flac", "mp4") and stream.duration is not None
    claimed = round(stream.duration * stream.time_base * rate) if has_length else None
    if gapless and claimed is not None and stream.time_base == Fraction(1, rate):
        claimed = _length_by_itunes(container.metadata.get("iTunSMPB", ""), claimed)
    return OpenFile(
        rate,
        channels,
        claimed,
        _cut((_frame_array(frame, rate, channels) for frame in chain([first], frames)), claimed),
        slack=MP4_SLACK if kind == "mp4" else 0,
        float_pcm=stream.codec_context.name.startswith("pcm_f"),
        channel_names=tuple(channel.name for channel in first.layout.channels),
    )


def _length_by_itunes(text: str, claimed: int) -> int:
    """The number of samples without delay and padding. text: hexadecimal numbers; FFmpeg skips as many samples at the
    start as the second says (delay), the third is the padding at the end, the fourth the length.
    """
    numbers = text.split()
    try:
        length = int(numbers[3], 16)
    except (IndexError, ValueError):
        return claimed
    return length if 0 < length <= claimed else claimed


def _av_frames(container: Any, stream: Any, failure: type[Exception]) -> Iterator[Any]:
    with container:
        try:
            yield from container.decode(stream)
        except failure as error:
            raise DecodingStopped(error.strerror) from error  # type: ignore[attr-defined]


def _frame_array(frame: Any, rate: int, channels: int) -> np.ndarray:
    """float32 [T, C]. FFmpeg's frames are planar or interleaved, in float or in integers (u8 is offset by 128)."""
    now = (frame.sample_rate, frame.layout.nb_channels)
    if now != (rate, channels):
        raise BadSample(
            f"the format changes within the file, from {rate} Hz and {channels} channels to {now[0]} Hz and {now[1]}"
        )
    values = _planes(frame, channels) if frame.format.is_planar else frame.to_ndarray().reshape(-1, channels)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    offset = 128 if values.dtype.kind == "u" else 0
    return ((values.astype(np.float64) - offset) / 2 ** (8 * values.dtype.itemsize - 1)).astype(np.float32)


def _planes(frame: Any, channels: int) -> np.ndarray:
    """[T, C] of a planar frame. With 8 channels or more, frame.to_ndarray reads beyond them and crashes (PyAV 18.1)."""
    kind = np.dtype(PLANAR[frame.format.name])
    return np.stack([np.frombuffer(plane, kind, frame.samples) for plane in frame.planes[:channels]]).T


def _cut(blocks: Iterator[np.ndarray], length: int | None) -> Iterator[np.ndarray]:
    """The first length samples. FFmpeg returns the last frame of an m4a with the encoder's padding."""
    position = 0
    for block in blocks:
        yield block if length is None else block[: length - position]
        position += len(block)
        if length is not None and position >= length:
            return
