"""The pages of an Ogg file (RFC 3533): whether the last one is whole, and its end flag, which many recorders omit."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizer.errors import BadSample

FIRST, LAST = 0x02, 0x04  # flags of a page
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Page:
    """start, end: positions in the file; end is beyond it if the page is cut. lacing: sizes of its segments."""

    start: int
    end: int
    flags: int
    lacing: bytes

    @property
    def continues(self) -> bool:
        """Whether its last packet continues on the next page."""
        return self.lacing[-1:] == b"\xff"


def pages(data: bytes) -> Iterator[Page]:
    start = 0
    while data[start : start + 4] == b"OggS" and start + 27 <= len(data):
        lacing = data[start + 27 : start + 27 + data[start + 26]]
        end = start + 27 + data[start + 26] + sum(lacing)
        yield Page(start, end, data[start + 5], lacing)
        start = end


def ogg_truncation(data: bytes) -> str | None:
    """Why data is missing; None if the last page is whole. Raises BadSample if a second recording follows the first.

    We do not ask for the end flag: a third of a real corpus lacks it, also where the last packet would continue on
    another page. Such a file is read to the last packet that ends.
    """
    started = False
    last: Page | None = None
    for last in pages(data):
        if last.flags & FIRST and started:
            raise BadSample("the ogg file contains several recordings in sequence; store each one in its own file")
        started = started or not last.flags & FIRST
    if last is None or last.end > len(data):
        return "truncated: the last page of the ogg file is cut"
    if last.flags & LAST:
        return None
    if last.end < len(data):
        return "truncated or damaged: the last page of the ogg file has no end flag, and no other page follows it"
    return None


def with_end_mark(data: bytes) -> bytes:
    """The file with the end flag on its last whole page. Without the flag, libsndfile refuses the last page of an opus
    file that ends within a packet, and FFmpeg plays the rest of that packet.
    """
    whole = [page for page in pages(data) if page.end <= len(data)]
    if not whole or whole[-1].flags & LAST or whole[-1].continues:
        return data
    last = whole[-1]
    page = bytearray(data[last.start : last.end])
    page[5] |= LAST
    page[22:26] = bytes(4)
    page[22:26] = _checksum(page).to_bytes(4, "little")
    return data[: last.start] + page


def _checksum(page: bytearray) -> int:
    """Ogg's CRC-32: zlib's polynomial with the bits in the other order, and zeros at both ends."""
    reflected = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
