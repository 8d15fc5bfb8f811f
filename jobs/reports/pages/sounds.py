"""Cards of clips: players of the original and its reconstruction, waveforms, and spectrograms in one colour scale."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from jobs.reports.pages.document import data_url
from tokenizer.modalities.audio.spectrogram import SHOWN_DB, TOP_DB, spectrogram

PICTURE = (640, 180)  # pixels of a spectrogram
WAVE_COLUMNS = 300
LOSSLESS_BUDGET = 2_400_000  # bytes of all players of a page as FLAC; above it they are Ogg Vorbis
LOSSY_BUDGET = 2_200_000  # above it the last clips have no player
VORBIS_LEVEL = 0.2  # of soundfile: 0 is the best quality


def as_waveform(wav: bytes) -> tuple[np.ndarray, int]:
    """float32 [T] in -1..1, and the sample rate in Hz."""
    import soundfile

    waveform, rate = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)
    return waveform[:, 0], rate


def sound_cards(pairs: Sequence[tuple[bytes, bytes]]) -> tuple[list[dict[str, Any]], str]:
    """The pictures and players of each clip, and how the players are compressed. pairs: wav files."""
    sounds = [tuple(as_waveform(wav) for wav in pair) for pair in pairs]
    players, how = players_of(sounds)
    cards = []
    for pair, player in zip(sounds, players, strict=True):
        (waveform, rate), _ = pair
        card: dict[str, Any] = {"players": player, "seconds": len(waveform) / rate}
        card |= {"frequencies": _frequencies(rate), "times": _times(len(waveform) / rate)}
        loudest = max(float(np.abs(one).max(initial=0)) for one, _ in pair) or 1.0
        for name, (one, _) in zip(("original", "reconstruction"), pair, strict=True):
            card[name] = {"wave": wave_path(one / loudest), "spectrogram": spectrogram_url(one, rate)}
        cards.append(card)
    return cards, how


def players_of(sounds: Sequence[tuple[tuple[np.ndarray, int], ...]]) -> tuple[list[list[str] | None], str]:
    """Data URLs of the sides of each clip; None for clips beyond the budget."""
    for form, mime, budget, how in (
        ("FLAC", "audio/flac", LOSSLESS_BUDGET, "lossless (FLAC, 16 bits)"),
        ("OGG", "audio/ogg", LOSSY_BUDGET, "compressed as Ogg Vorbis, so that the page stays small"),
    ):
        players: list[list[str] | None] = []
        spent = 0
        for pair in sounds:
            urls = [data_url(_encoded(waveform, rate, form), mime) for waveform, rate in pair]
            spent += sum(map(len, urls))
            players.append(urls if spent <= budget * 4 / 3 else None)
        if None not in players:
            return players, how
    return players, how


def _encoded(waveform: np.ndarray, rate: int, form: str) -> bytes:
    import soundfile

    out = io.BytesIO()
    lossy = {"subtype": "VORBIS", "compression_level": VORBIS_LEVEL} if form == "OGG" else {"subtype": "PCM_16"}
    soundfile.write(out, waveform, rate, format=form, **lossy)
    return out.getvalue()


def spectrogram_url(waveform: np.ndarray, rate: int, size: tuple[int, int] = PICTURE) -> str:
    """A picture without axes, low frequencies at the bottom. Colours have the same levels in all spectrograms."""
    levels = spectrogram(waveform, rate).level_db[::-1]
    shares = ((levels - TOP_DB + SHOWN_DB) / SHOWN_DB).clip(0, 1)
    picture = Image.fromarray((colormaps["magma"](shares)[..., :3] * 255).astype(np.uint8))
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.BILINEAR).save(out, format="WEBP", quality=70)
    return data_url(out.getvalue(), "image/webp")


def level_scale() -> str:
    """The colours of spectrograms, for CSS."""
    stops = [colormaps["magma"](i / 8)[:3] for i in range(9)]
    return (
        "linear-gradient(90deg,"
        + ",".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in s)) for s in stops)
        + ")"
    )


def wave_path(waveform: np.ndarray) -> str:
    """The outline of a waveform in -1..1 as an SVG path in a box of 300 x 48."""
    edges = np.linspace(0, len(waveform), min(WAVE_COLUMNS, len(waveform)) + 1).astype(int)
    highs = np.maximum.reduceat(waveform, edges[:-1])
    lows = np.minimum.reduceat(waveform, edges[:-1])
    xs = np.linspace(0, 300, len(highs))
    upper = [f"{x:.0f} {24 - 23 * high:.1f}" for x, high in zip(xs, highs, strict=True)]
    lower = [f"{x:.0f} {24.5 - 23 * low:.1f}" for x, low in zip(xs, lows, strict=True)]
    return f"M{'L'.join([*upper, *lower[::-1]])}Z"


def _frequencies(rate: int) -> list[str]:
    """Labels from top to bottom, evenly spaced."""
    top = rate / 2000
    return [f"{top:g} kHz", f"{top / 2:g}", "0"]


def _times(seconds: float) -> list[str]:
    """Labels from left to right, evenly spaced."""
    return [f"{seconds * i / 4:.1f}{' s' if i == 4 else ''}" for i in range(5)]
