"""Cards of examples: the pictures, players and tokens of each, whatever medium it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.reports.pages.codes import CodeColors, first_layer
from jobs.reports.pages.example import Example
from jobs.reports.pages.pictures import as_array, error_scale, pairs_url, picture_cards
from jobs.reports.pages.sounds import as_waveform, level_scale, sound_cards, spectrogram_url


@dataclass
class Cards:
    """kind: "image" or "audio". note: how the media are stored in the page."""

    kind: str
    cards: list[dict[str, Any]]
    note: str = ""


def cards_of(
    examples: Sequence[Example],
    badges: Sequence[list[str]] = (),
    ranked_by: str | None = None,
    colors: CodeColors | None = None,
) -> Cards:
    """badges: of each example. ranked_by: the metric that orders them. colors: of the codes, to show tokens."""
    if not examples:
        return Cards("", [])
    kind = examples[0].mime.split("/")[0]
    media, note = MEDIA[kind](examples)
    cards = []
    for place, (one, medium) in enumerate(zip(examples, media, strict=True)):
        card = {**medium, "key": one.key, "metrics": one.metrics, "place": place}
        card["badges"] = badges[place] if badges else []
        card["rank"] = one.metrics.get(ranked_by or "", "")
        card["tokens"] = None
        if colors is not None and one.tokens is not None:
            num_dims = 2 if kind == "image" else 1
            card["tokens"] = colors.card(first_layer(one.tokens, 1 if one.tokens.ndim == num_dims else 2))
        cards.append(card)
    return Cards(kind, cards, note)


def _pictures(examples: Sequence[Example]) -> tuple[list[dict[str, Any]], str]:
    pairs = [(as_array(one.views[0]), as_array(one.views[1])) for one in examples]
    cards, is_lossless = picture_cards(pairs)
    is_shrunk = any(pair[0].shape[0] != card["height"] for pair, card in zip(pairs, cards, strict=True))
    notes = [] if is_lossless else ["Pictures are compressed with small losses, so that the page stays small."]
    notes += ["Large pictures are shrunk."] if is_shrunk else []
    return cards, " ".join(notes)


def _sounds(examples: Sequence[Example]) -> tuple[list[dict[str, Any]], str]:
    cards, how = sound_cards([(one.files[0], one.files[1]) for one in examples])
    return cards, f"Players are {how}."


MEDIA = {"image": _pictures, "audio": _sounds}
SCALES = {"image": error_scale, "audio": level_scale}


def thumbnail(examples: Sequence[Example]) -> str:
    """A small picture of the first examples for index.html, as a data URL; empty if there are none."""
    if not examples:
        return ""
    if examples[0].mime.startswith("image/"):
        return pairs_url([(as_array(one.views[0]), as_array(one.views[1])) for one in examples])
    return spectrogram_url(*as_waveform(examples[0].files[1]), size=(360, 120))
