"""Detects truncated audio files by their containers, before decoding. Decoders read most of them as shorter files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tokenizer.errors import BadSample
from tokenizer.modalities.audio.ogg import ogg_truncation

# Programs that write to a pipe do not know the size. They write about the largest that fits, signed or unsigned, less
# the header; Kyutai's pocket-tts writes the size of a billion 16-bit samples
PLACEHOLDERS, AROUND = (2**31, 2**32), 4096
POCKET_TTS = 2_000_000_000


def truncation(kind: str, data: bytes) -> str | None:
    """Why data is missing from the file; None if the container shows none missing. kind: FFmpeg's name of the format.

    Raises BadSample if the file is empty, or holds several recordings.
    """
    return CHECKS[kind](data) if kind in CHECKS else None


# -- formats of chunks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunks:
    """A file of chunks: each has a name, a size, and a body that is padded to a multiple of `align` bytes."""

    start: int  # of the first chunk
    name_bytes: int = 4
    size_bytes: int = 4
    order: Literal["little", "big"] = "little"
    align: int = 2
    size_has_header: bool = False

    def walk(self, data: bytes) -> Iterator[tuple[bytes, int, int]]:
        """The first four bytes of the name, the position of the body, and its size, of each chunk that starts."""
        header, position = self.name_bytes + self.size_bytes, self.start
        while position + header <= len(data):
            name = data[position : position + 4]
            size = int.from_bytes(data[position + self.name_bytes : position + header], self.order)
            size -= header if self.size_has_header else 0
            yield name, position + header, size
            position += header + max(0, size) + -size % self.align


def _wav(data: bytes) -> str | None:
    """Sizes are little-endian, or big-endian in RIFX. EBU 3306: ds64 has sizes that do not fit into 32 bits."""
    long_size = None
    for name, position, size in _Chunks(12, order="big" if data[:4] == b"RIFX" else "little").walk(data):
        if name == b"ds64":
            long_size = int.from_bytes(data[position + 8 : position + 16], "little")
        if name == b"data":
            if long_size is not None and size == 0xFFFFFFFF:
                return _compare("wav", long_size, len(data) - position)
            return None if _is_unknown(size) else _compare("wav", size, len(data) - position)
    return _no_chunk("wav")


def _aiff(data: bytes) -> str | None:
    """SSND starts with eight bytes that are not audio."""
    for name, position, size in _Chunks(12, order="big").walk(data):
        if name == b"SSND":
            return None if _is_unknown(size) else _compare("aiff", size - 8, len(data) - position - 8)
    return _no_chunk("aiff")


def _w64(data: bytes) -> str | None:
    """Names are GUIDs, sizes include the header."""
    for name, position, size in _Chunks(40, 16, 8, align=8, size_has_header=True).walk(data):
        if name == b"data":
            return None if size >= 2**63 else _compare("w64", size, len(data) - position)
    return _no_chunk("w64")


def _caf(data: bytes) -> str | None:
    """Size -1: to the end of the file. The data chunk starts with four bytes that are not audio."""
    for name, position, size in _Chunks(8, 4, 8, "big", align=1).walk(data):
        if name == b"data":
            return None if size == 2**64 - 1 else _compare("caf", size - 4, len(data) - position - 4)
    return _no_chunk("caf")


def _au(data: bytes) -> str | None:
    offset, size = int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big")
    return None if size == 0xFFFFFFFF else _compare("au", size, len(data) - offset)


def _nist(data: bytes) -> str | None:
    """The header is text: "sample_count -i 44100", a field a line. Compressed samples have no size."""
    lines = data[:1024].decode("latin-1").splitlines()
    fields = {words[0]: words[2] for line in lines if len(words := line.split(maxsplit=2)) == 3}
    if "," in fields.get("sample_coding", ""):  # such as pcm,embedded-shorten-v2.00
        return None
    try:
        claimed = int(fields["sample_count"]) * int(fields["channel_count"]) * int(fields["sample_n_bytes"])
        return _compare("nist", claimed, len(data) - int(lines[1]))
    except (KeyError, ValueError, IndexError) as error:
        raise BadSample(
            f"the nist header has no usable sample_count, channel_count and sample_n_bytes: {error}"
        ) from error


def _is_unknown(size: int) -> bool:
    return size == POCKET_TTS or any(abs(size - limit) <= AROUND for limit in PLACEHOLDERS)


def _compare(kind: str, claimed: int, actual: int) -> str | None:
    if claimed > 0:
        why = f"truncated: the {kind} header claims {claimed} bytes of audio, the file has {max(0, actual)}"
        return why if claimed > actual else None
    if actual <= 0:
        raise BadSample(f"the {kind} header claims no samples")
    return f"the {kind} header claims no samples, but {actual} bytes follow; the recording was probably not closed"


def _no_chunk(kind: str) -> str:
    return f"truncated: the {kind} file has no data chunk; it was probably truncated in its header"


# -- other containers ---------------------------------------------------------------------------------------------


def _mp4(data: bytes) -> str | None:
    """Walks the outermost boxes (ISO 14496-12, 4.2): each must end within the file."""
    position = 0
    while position + 8 <= len(data):
        size, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:  # the box extends to the end of the file
            return None
        if size < 8 or position + size > len(data):
            return f"truncated: box {name!r} claims {size} bytes at {position}, the file has {len(data)}"
        position += size
    return None


def _matroska(data: bytes) -> str | None:
    """RFC 8794: the header and the segment, each with its size. Live recorders do not state the segment's size."""
    position = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if data[position : position + 4] != name:
            return f"truncated: the webm file has no element {name.hex()} at {position}"
        size, position = _ebml_size(data, position + 4)
        if size is None:
            return None
        if position + size > len(data):
            return f"truncated: the webm file claims {position + size} bytes, it has {len(data)}"
        position += size
    return None


def _ebml_size(data: bytes, position: int) -> tuple[int | None, int]:
    """A size, and where it ends. The leading zeros say how many bytes it has; None if all bits after them are set."""
    first = data[position] if position < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[position : position + length], "big") & (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value, position + length


CHECKS = {
    **{"wav": _wav, "aiff": _aiff, "w64": _w64, "caf": _caf, "au": _au, "nistsphere": _nist},
    **{"ogg": ogg_truncation, "mp4": _mp4, "matroska": _matroska},
}
