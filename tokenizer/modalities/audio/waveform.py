"""Audio files to waveforms and back: float32 [T, 1], mono, in -1..1, at a given sample rate.

If a file has fewer samples than its header claims, it is a BadSample ("truncated"). Extra samples are not read.
Truncation is always detected in wav, w64, aiff, au, caf, nist, flac and m4a; in ogg unless the file ends exactly after
a page; in webm if the header states the size; in mp3 if the file has a length header and lost more than
one frame; in aac only within a frame; in g722 never, because any bytes are valid g722.
"""

import io
import wave
from dataclasses import dataclass

import numpy as np

from tokenizer.errors import BadSample
from tokenizer.modalities.audio.decoders import DecodingStopped, OpenFile, open_audio, package
from tokenizer.modalities.audio.downmix import RULES, mono_weights
from tokenizer.modalities.audio.formats import identify
from tokenizer.modalities.audio.truncation import truncation

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_CHANNELS = 64  # 7th-order ambisonics
# Floats in 16-bit units would be clipped to noise. Vorbis of loud music overshoots by more than 24 dB
MAX_PEAK_PCM, MAX_PEAK_LOSSY = 16.0, 256.0


@dataclass
class AudioConfig:
    """How files become waveforms. A tokenizer from before downmix and gapless existed has mean and false."""

    sample_rate: int = 16_000  # of the model, in Hz; files are resampled to it
    max_seconds: float = 3600.0  # longer files are quarantined
    downmix: str = "bs775"  # of three or more channels: ITU-R BS.775 for named channels, else their mean; or mean
    gapless: bool = True  # cut m4a to the length in its iTunSMPB tag, without the encoder's padding
    allow_truncated: bool = False  # read files that end early up to where they end, instead of quarantining them

    def __post_init__(self) -> None:
        if self.sample_rate < 1000 or self.max_seconds <= 0:
            raise ValueError(
                f"data.preprocess.sample_rate is {self.sample_rate} and max_seconds {self.max_seconds:g}; "
                "the first must be 1000 Hz or more, the second above 0"
            )
        if self.downmix not in RULES:
            raise ValueError(f"data.preprocess.downmix is {self.downmix!r}; choose one of: {', '.join(RULES)}")


def require_packages() -> None:
    """Raises MissingPackage, with the pip command, if the packages for decoding and resampling are not installed."""
    for name in ("soundfile", "soxr", "av"):
        package(name)


def read_waveform(data: bytes, config: AudioConfig, extension: str = "") -> tuple[np.ndarray, dict[str, int]]:
    """Decodes a file to float32 [T, 1] at the model's rate. Also returns the original's sample_rate and num_samples.

    T is resampled_length of num_samples. Values outside -1..1 (float files, lossy codecs, overshoot of the resampler)
    are clipped at the end, like on a sound card; with scaling, one click would change the whole clip. extension
    (without the dot) only matters for g722, which has no header.
    Raises BadSample with the reason if the file cannot be decoded or is longer than max_seconds.
    """
    kind, data = identify(data, extension)
    _refuse_truncated(truncation(kind, data), config)
    audio = open_audio(
        kind,
        data,
        channel_names=config.downmix == "bs775",
        gapless=config.gapless,
        allow_truncated=config.allow_truncated,
    )
    _check_header(audio, config.max_seconds)
    resampler = Resampler(audio.sample_rate, config.sample_rate)
    _refuse_truncated(_decode(audio, resampler, config), config)
    num_samples = resampler.num_samples
    if num_samples == 0:
        raise BadSample(f"the {kind} file has no samples")
    waveform = resampler.finish()
    np.clip(waveform, -1, 1, out=waveform)
    return waveform[:, None], {"sample_rate": audio.sample_rate, "num_samples": num_samples}


def _decode(audio: OpenFile, resampler: "Resampler", config: AudioConfig) -> str | None:
    """Decodes the file into the resampler. Returns why it ended early, or None."""
    surround = config.downmix == "bs775" and audio.channels > 2
    weights = mono_weights(audio.channel_names) if surround else None
    max_peak = MAX_PEAK_PCM if audio.float_pcm else MAX_PEAK_LOSSY
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # such values are refused by name; numpy would also warn
            for block in audio.blocks:
                mono = _to_mono(block, weights)
                _check_values(mono, resampler.num_samples, max_peak)
                resampler.add(mono)
                _check_length(resampler.num_samples, audio.sample_rate, config.max_seconds)
    except DecodingStopped as error:
        return str(error)
    if audio.claimed is not None and resampler.num_samples < audio.claimed - audio.slack:
        return f"truncated: the header claims {audio.claimed} samples, the file has {resampler.num_samples}"
    return None


def _refuse_truncated(why: str | None, config: AudioConfig) -> None:
    if why is not None and not config.allow_truncated:
        raise BadSample(f"{why}; data.preprocess.allow_truncated=true reads what is there")


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
            self._stream = package("soxr").ResampleStream(rate_from, rate_to, 1, dtype="float32", quality="HQ")

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


# -- checks -------------------------------------------------------------------------------------------------------


def _check_header(audio: OpenFile, max_seconds: float) -> None:
    if not MIN_RATE <= audio.sample_rate <= MAX_RATE:
        raise BadSample(f"sample rate {audio.sample_rate} Hz is outside {MIN_RATE}..{MAX_RATE}")
    if not 1 <= audio.channels <= MAX_CHANNELS:
        raise BadSample(f"the file has {audio.channels} channels; allowed are 1..{MAX_CHANNELS}")
    if audio.claimed is not None:
        _check_length(audio.claimed, audio.sample_rate, max_seconds)


def _check_length(num_samples: int, sample_rate: int, max_seconds: float) -> None:
    if num_samples > max_seconds * sample_rate:
        raise BadSample(f"longer than max_seconds={max_seconds:g}: {num_samples} samples or more at {sample_rate} Hz")


def _to_mono(block: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """[T, C] -> [T]: the weighted sum of the channels, or their mean."""
    if block.shape[1] == 1:
        return block[:, 0]
    return block.mean(axis=1, dtype=np.float32) if weights is None else block @ weights


def _check_values(mono: np.ndarray, start: int, max_peak: float) -> None:
    """start: position of the block, for error messages."""
    peak = float(np.abs(mono).max(initial=0))
    if not np.isfinite(peak):
        raise BadSample(f"sample {start + int(np.argmin(np.isfinite(mono)))} is NaN or infinite")
    if peak > max_peak:
        raise BadSample(f"the peak is {peak:g}, but full scale is 1; the floats may be in 16-bit units")
