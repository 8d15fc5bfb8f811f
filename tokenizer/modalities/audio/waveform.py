"""Audio files to waveforms and back: float32 [T, 1], mono, in -1..1, at a given sample rate.

soundfile decodes wav, flac, ogg (vorbis, opus) and mp3; PyAV decodes m4a, aac, g722 and files that soundfile cannot
open. We always pass the format to PyAV: with format detection FFmpeg would also open playlists, which can refer to
other files and addresses.

If a file has fewer samples than its header claims, it is a BadSample ("truncated"). Extra samples are not read.
Truncation is always detected in wav, flac, ogg and m4a; in mp3 if the file has a length header and lost more than one
frame; in aac only within a frame; in g722 never, because any bytes are valid g722.
"""

import importlib
import io
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np

from tokenizer.errors import BadSample
from tokenizer.modalities.audio.formats import check_whole, identify

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 64  # 7th-order ambisonics
MAX_PEAK = 16.0  # 24 dB over full scale; floats in 16-bit units would be clipped to noise
BLOCK = 2**16  # frames decoded at a time
# allowed missing samples: some encoders count their mp3 header as a frame, and m4a can round to ms
SLACK = {"mp3": 1152, "mp4": 2048}


def require_packages() -> None:
    """Raises ImportError, with the pip command, if the packages for decoding and resampling are not installed."""
    for name in ("soundfile", "soxr", "av"):
        _package(name)


def read_waveform(
    data: bytes, sample_rate: int, *, max_seconds: float, extension: str = ""
) -> tuple[np.ndarray, dict[str, int]]:
    """Decodes a file to float32 [T, 1] at sample_rate Hz. Also returns the original's sample_rate and num_samples.

    Channels are averaged. T is resampled_length of num_samples. Values outside -1..1 (float files, lossy codecs,
    overshoot of the resampler) are clipped at the end, like on a sound card; with scaling, one click would change the
    whole clip. extension (without the dot) only matters for g722, which has no header.
    Raises BadSample with the reason if the file cannot be decoded or is longer than max_seconds.
    """
    kind, data = identify(data, extension)
    check_whole(kind, data)
    audio = _open(kind, data)
    _check_header(audio, max_seconds)
    resampler = Resampler(audio.sample_rate, sample_rate)
    for block in audio.blocks:
        resampler.add(_to_mono(block, resampler.num_samples))
        _check_length(resampler.num_samples, audio.sample_rate, max_seconds)
    num_samples = resampler.num_samples
    if num_samples == 0:
        raise BadSample(f"the {kind} file has no samples")
    if audio.claimed is not None and num_samples < audio.claimed - SLACK.get(kind, 0):
        raise BadSample(f"truncated: the header claims {audio.claimed} samples, the file has {num_samples}")
    waveform = resampler.finish()
    np.clip(waveform, -1, 1, out=waveform)
    return waveform[:, None], {"sample_rate": audio.sample_rate, "num_samples": num_samples}


def to_wav(waveform: np.ndarray, sample_rate: int) -> bytes:
    """A 16-bit PCM wav from float [T, 1] in -1..1, clipped. Samples read from 16-bit files are restored exactly.

    Raises ValueError for another shape and for NaN.
    """
    if waveform.ndim != 2 or waveform.shape[1] != 1:
        raise ValueError(f"a waveform must have shape [T, 1], not {list(waveform.shape)}")
    if np.isnan(waveform).any():
        raise ValueError("the waveform contains NaN")
    pcm = np.round(waveform.astype(np.float64) * 32768).clip(-32768, 32767).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm.tobytes())
    return out.getvalue()


def resampled_length(num_samples: int, rate_from: int, rate_to: int) -> int:
    """ceil(num_samples * rate_to / rate_from): all output samples whose time is within the clip."""
    return -(-num_samples * rate_to // rate_from)


class Resampler:
    """Resamples mono blocks to one waveform. The block sizes do not change a bit of the result (soxr HQ)."""

    def __init__(self, rate_from: int, rate_to: int):
        self.rate_from, self.rate_to = rate_from, rate_to
        self.num_samples = 0  # added so far
        self._out = bytearray()  # grows in place; joining blocks at the end would need memory for two copies
        self._stream = None
        if rate_from != rate_to:
            self._stream = _package("soxr").ResampleStream(rate_from, rate_to, 1, dtype="float32", quality="HQ")

    def add(self, block: np.ndarray) -> None:
        """block: float32 [T]."""
        self.num_samples += len(block)
        self._out += (block if self._stream is None else self._stream.resample_chunk(block)).tobytes()

    def finish(self) -> np.ndarray:
        """Returns float32 [resampled_length(num_samples)]. Call it only once."""
        surplus = 0
        if self._stream is not None:
            # soxr rounds the length and we take the ceiling: silence at the end produces the possibly missing sample
            silence = np.zeros(-(-self.rate_from // self.rate_to) + 1, np.float32)
            self._out += self._stream.resample_chunk(silence, last=True).tobytes()
            surplus = resampled_length(len(silence), self.rate_from, self.rate_to) + 1
        samples = np.frombuffer(self._out, np.float32)
        length = resampled_length(self.num_samples, self.rate_from, self.rate_to)
        assert length <= len(samples) <= length + surplus, (len(samples), length, surplus)
        return samples[:length]


# -- decoders -----------------------------------------------------------------------------------------------------


@dataclass
class _OpenFile:
    """blocks: float32 [T, C]. claimed: number of samples in the header, None if it does not state it."""

    sample_rate: int
    channels: int
    claimed: int | None
    blocks: Iterator[np.ndarray]


def _open(kind: str, data: bytes) -> _OpenFile:
    if kind in ("wav", "flac", "ogg", "mp3"):
        opened = _open_soundfile(kind, data)
        if opened is not None:
            return opened
    return _open_av(kind, data)


def _open_soundfile(kind: str, data: bytes) -> _OpenFile | None:
    """None if libsndfile cannot open the file, or would fail at the end: flac without a length in its header."""
    soundfile = _package("soundfile")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError:
        return None
    if file.frames > 2**62:
        file.close()
        return None
    # without a length header, libsndfile estimates the length of an mp3 from the first frames
    claimed = file.frames if kind != "mp3" or _has_length_header(data) else None
    return _OpenFile(file.samplerate, file.channels, claimed, _soundfile_blocks(file, soundfile.LibsndfileError))


def _has_length_header(mp3: bytes) -> bool:
    """Whether the first frame is a length header instead of audio: Xing or Info (LAME), VBRI (Fraunhofer)."""
    return any(mark in mp3[:64] for mark in (b"Xing", b"Info", b"VBRI"))


def _soundfile_blocks(file: Any, failure: type[Exception]) -> Iterator[np.ndarray]:
    with file:
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield block
        except failure as error:
            raise _broken(error.error_string) from error  # type: ignore[attr-defined]


def _open_av(kind: str, data: bytes) -> _OpenFile:
    av = _package("av")
    try:
        container = av.open(io.BytesIO(data), format=kind)
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
    blocks = (_frame_array(frame, rate, channels) for frame in chain([first], frames))
    return _OpenFile(rate, channels, claimed, _cut(blocks, claimed))


def _av_frames(container: Any, stream: Any, failure: type[Exception]) -> Iterator[Any]:
    with container:
        try:
            yield from container.decode(stream)
        except failure as error:
            raise _broken(error.strerror) from error  # type: ignore[attr-defined]


def _frame_array(frame: Any, rate: int, channels: int) -> np.ndarray:
    """float32 [T, C]. FFmpeg's frames are planar or interleaved, in float or in integers (u8 is offset by 128)."""
    now = (frame.sample_rate, frame.layout.nb_channels)
    if now != (rate, channels):
        raise BadSample(
            f"the format changes within the file, from {rate} Hz and {channels} channels to {now[0]} Hz and {now[1]}"
        )
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, channels)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    offset = 128 if values.dtype.kind == "u" else 0
    return ((values.astype(np.float64) - offset) / 2 ** (8 * values.dtype.itemsize - 1)).astype(np.float32)


def _cut(blocks: Iterator[np.ndarray], length: int | None) -> Iterator[np.ndarray]:
    """The first length samples. FFmpeg returns the last frame of an m4a with the encoder's padding."""
    position = 0
    for block in blocks:
        yield block if length is None else block[: length - position]
        position += len(block)
        if length is not None and position >= length:
            return


# -- checks -------------------------------------------------------------------------------------------------------


def _check_header(audio: _OpenFile, max_seconds: float) -> None:
    if not MIN_RATE <= audio.sample_rate <= MAX_RATE:
        raise BadSample(f"sample rate {audio.sample_rate} Hz is outside {MIN_RATE}..{MAX_RATE}")
    if not 1 <= audio.channels <= MAX_CHANNELS:
        raise BadSample(f"the file has {audio.channels} channels; allowed are 1..{MAX_CHANNELS}")
    if audio.claimed is not None:
        _check_length(audio.claimed, audio.sample_rate, max_seconds)


def _check_length(num_samples: int, sample_rate: int, max_seconds: float) -> None:
    if num_samples > max_seconds * sample_rate:
        raise BadSample(f"longer than max_seconds={max_seconds:g}: {num_samples} samples or more at {sample_rate} Hz")


def _to_mono(block: np.ndarray, start: int) -> np.ndarray:
    """[T, C] -> [T], the mean of the channels. start: position of the block, for error messages."""
    mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
    peak = float(np.abs(mono).max(initial=0))
    if not np.isfinite(peak):
        raise BadSample(f"sample {start + int(np.argmin(np.isfinite(mono)))} is NaN or infinite")
    if peak > MAX_PEAK:
        raise BadSample(f"the peak is {peak:g}, but full scale is 1; the floats may be in 16-bit units")
    return mono


def _broken(why: str) -> BadSample:
    return BadSample(f"decoding stopped before the end of the file ({why}): truncated or damaged")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"audio needs the package {name}; run pip install -e '.[audio]' in Tokenmill's folder"
        ) from error
