"""Which documents go into which block. Pure functions of their lengths."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

FITS = ("best", "concat")


class Piece(NamedTuple):
    """Tokens start..stop of a document."""

    document: int
    start: int
    stop: int


def best_fit(lengths: Sequence[int], block: int) -> list[list[Piece]]:
    """Best-fit decreasing (arXiv 2404.10830): each document goes into the fullest block that has room for it, the
    longest first. Documents longer than a block are cut into full blocks and a rest. No other one is cut.

    Blocks, and the documents within a block, are in the order of their first document.
    """
    blocks: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, length in enumerate(lengths):
        full = length // block * block
        blocks += [[Piece(document, start, start + block)] for start in range(0, full, block)]
        if full < length:
            rests.append(Piece(document, full, length))
    room: list[tuple[int, int]] = []  # of the blocks that are not full: space left, number of the block; sorted
    for piece in sorted(rests, key=lambda piece: (piece.start - piece.stop, piece.document)):
        length = piece.stop - piece.start
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            blocks.append([piece])
            space, number = block - length, len(blocks) - 1
        else:
            space, number = room.pop(place)
            blocks[number].append(piece)
            space -= length
        if space:
            bisect.insort(room, (space, number))
    return sorted(sorted(pieces) for pieces in blocks)


def concatenated(lengths: Sequence[int], block: int) -> list[list[Piece]]:
    """One document after another, cut at the end of each block. Only the last block may have room left."""
    blocks: list[list[Piece]] = []
    room = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                blocks.append([])
                room = block
            stop = min(length, start + room)
            blocks[-1].append(Piece(document, start, stop))
            room -= stop - start
            start = stop
    return blocks
