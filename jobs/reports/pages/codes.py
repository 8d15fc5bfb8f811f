"""Codes on a page: a colour for each, the patch that it decodes to, and how often it is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jobs.reports.pages.pictures import as_url
from tokenizer.tokenizer import Tokenizer

MOST_PATCHES = 1024  # codes whose patches a page holds: the most used ones
MOST_TOKENS = 4096  # of one sample that a page names under the pointer
MOST_COUNTS = 4096  # codes whose counts a page holds
NEIGHBOURS = 3  # a code is decoded as a square of this side, so that padding does not reach its middle patch
AT_A_TIME = 256


@dataclass
class CodeColors:
    """colors [K, 3] uint8: codes that are close to each other have similar colours."""

    colors: np.ndarray

    @classmethod
    def of(cls, codebook: np.ndarray) -> "CodeColors":
        """codebook [K, D]. The colour channels are its first three principal components, by rank."""
        centred = codebook - codebook.mean(axis=0)
        axes = np.linalg.svd(centred[:20_000], full_matrices=False)[2][:3]
        flat = np.zeros((len(codebook), 3))
        flat[:, : len(axes)] = centred @ axes.T
        ranks = flat.argsort(axis=0).argsort(axis=0) / max(1, len(codebook) - 1)
        return cls((30 + 210 * ranks).astype(np.uint8))

    def card(self, tokens: np.ndarray) -> dict[str, Any]:
        """The token grid as a picture. tokens [H, W] or [T]; of several quantizers, the first one's are shown."""
        grid = np.atleast_2d(tokens)
        values = grid.ravel().tolist() if grid.size <= MOST_TOKENS else []
        return {"image": as_url(self.colors[grid]), "codes": values, "columns": grid.shape[1]}


def first_layer(tokens: np.ndarray, num_quantizers: int) -> np.ndarray:
    """The tokens of the first quantizer."""
    return tokens[0] if num_quantizers > 1 else tokens


def first_codebook(tokenizer: Tokenizer) -> np.ndarray:
    """The codes of the first quantizer: [K, D] float32."""
    codebook = tokenizer.autoencoder.quantizer.codebook
    return (codebook[0] if codebook.ndim == 3 else codebook).float().cpu().numpy()


def patches(tokenizer: Tokenizer, counts: np.ndarray) -> dict[str, Any] | None:
    """The patch of each of the most used codes, the most used first, as one picture; None if a code has none alone.

    A patch is the middle of what the decoder makes of a square of equal codes. counts [K].
    """
    quantizer, factor = tokenizer.autoencoder.quantizer, tokenizer.autoencoder.factor
    if not tokenizer.modality.mime.startswith("image/") or quantizer.num_quantizers > 1:
        return None
    order = np.argsort(-counts, kind="stable")[:MOST_PATCHES]
    order = order[counts[order] > 0]
    if not len(order):
        return None
    squares = [np.full((NEIGHBOURS, NEIGHBOURS), code) for code in order]
    middle = slice(NEIGHBOURS // 2 * factor, (NEIGHBOURS // 2 + 1) * factor)
    cut: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(squares), AT_A_TIME):
            cut += [array[middle, middle] for array in tokenizer.decode(squares[start : start + AT_A_TIME])]
    columns = min(32, len(cut))
    sheet = _sheet(cut, columns)
    places = {int(code): place for place, code in enumerate(order)}
    rows = -(-len(cut) // columns)
    return {"image": as_url(sheet), "side": factor, "columns": columns, "rows": rows, "order": places}


def _sheet(cut: Sequence[np.ndarray], columns: int) -> np.ndarray:
    side, rows = len(cut[0]), -(-len(cut) // columns)
    sheet = np.full((rows * side, columns * side, 3), 128, dtype=np.uint8)
    for place, patch in enumerate(cut):
        top, left = place // columns * side, place % columns * side
        sheet[top : top + side, left : left + side] = patch
    return sheet


def projected(z: np.ndarray, codebook: np.ndarray | None) -> list[tuple[str, np.ndarray]]:
    """Latents z [N, D] and codes [K, D] on the latents' first two principal components, for `charts.scatter`."""
    centre = z.mean(axis=0)
    plane = np.linalg.svd(z - centre, full_matrices=False)[2][:2].T
    groups = [("latents", _flat((z - centre) @ plane))]
    if codebook is not None and codebook.shape[1] == z.shape[1]:
        groups.append(("codes", _flat((_some(codebook) - centre) @ plane)))
    return groups


def _some(codebook: np.ndarray) -> np.ndarray:
    """MOST_COUNTS random codes of a larger codebook: the first ones may be close to each other."""
    if len(codebook) <= MOST_COUNTS:
        return codebook
    return codebook[np.random.default_rng(0).choice(len(codebook), MOST_COUNTS, replace=False)]


def _flat(points: np.ndarray) -> np.ndarray:
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def usage_sentence(numbers: dict[str, Any]) -> str:
    """How many codes are used, and how evenly."""
    layers, size = int(numbers["num_quantizers"]), int(numbers["codebook_size"])
    used = layers * size - int(numbers["dead_codes"])
    share = numbers["perplexity"] / size
    return (
        f"{used:,} of {layers * size:,} codes are used; they carry as much as {numbers['perplexity']:,.0f} codes"
        f"{' of each quantizer' if layers > 1 else ''} that are used equally ({share:.0%})."
    )


def usage_facts(counts: np.ndarray) -> str:
    """How much of the tokens the most used codes are. counts [K]."""
    ordered = np.sort(counts)[::-1]
    top = max(1, len(ordered) // 10)
    share = ordered[:top].sum() / max(1, ordered.sum())
    return f"The most used tenth of the codes ({top:,}) makes up {share:.0%} of all tokens."
