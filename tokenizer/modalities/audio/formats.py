"""Identifies audio formats by their first bytes, and detects truncated files before decoding. Imports no decoder."""

from typing import Literal

from tokenizer.errors import BadSample

FORMATS = "wav, flac, ogg (vorbis, opus), mp3, m4a, aac, g722"
UNKNOWN_BYTES = 0x7FFFF000  # a wav header with at least this size was written to a pipe, so the real size is unknown
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
PICTURES_AND_ARCHIVES = (b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"GIF8", b"%PDF", b"PK\3\4", b"\x1f\x8b")


def identify(data: bytes, extension: str) -> tuple[str, bytes]:
    """FFmpeg's name of the format, and the data without a leading ID3 tag. Depends on the content, not the extension,
    except for g722, which has no header.

    Raises BadSample for empty files and unknown formats.
    """
    if not data:
        raise BadSample("the file is empty")
    audio = _without_id3(data)
    head = audio[:12]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        return "wav", audio
    if head[:4] in (b"fLaC", b"OggS"):
        return {b"fLaC": "flac", b"OggS": "ogg"}[head[:4]], audio
    if head[4:8] in MP4_BOXES:
        return "mp4", audio
    if not data.startswith(PICTURES_AND_ARCHIVES):
        if (
            extension.lower() == "g722"
        ):  # checked before mp3, because speech in g722 can start with mp3's 11-bit sync word
            return "g722", data
        if len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # MPEG's sync word; layer 0 is ADTS
            return "mp3" if head[1] & 0x06 else "aac", audio
    raise BadSample(f"not an audio file that we can read ({FORMATS}); it starts with {data[:8]!r}")


def check_whole(kind: str, data: bytes) -> None:
    """Raises BadSample if the container shows that data is missing. Decoders would not report it."""
    if kind in CHECKS:
        CHECKS[kind](data)


def _without_id3(data: bytes) -> bytes:
    """ID3v2.4, section 3.1: a header of ten bytes; the last four contain the tag's size, 7 bits each."""
    if data[:3] != b"ID3" or len(data) < 10:
        return data
    size = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    if size >= len(data):
        raise BadSample(f"truncated: its ID3 tag claims {size} bytes, the file has {len(data)}")
    return data[size:]


def _check_wav(data: bytes) -> None:
    """libsndfile reads a truncated wav as a shorter one. Sizes are little-endian, or big-endian in RIFX."""
    order: Literal["little", "big"] = "big" if data[:4] == b"RIFX" else "little"
    position, long_size = 12, None
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], order)
        position += 8
        if name == b"ds64":  # EBU 3306: sizes that do not fit into 32 bits
            long_size = int.from_bytes(data[position + 8 : position + 16], "little")
        if name == b"data":
            size = long_size if long_size is not None and size == 0xFFFFFFFF else size
            _check_wav_data(size, len(data) - position, size >= UNKNOWN_BYTES and long_size is None)
            return
        position += size + size % 2
    raise BadSample("the wav file has no data chunk; it was probably truncated in its header")


def _check_wav_data(claimed: int, actual: int, unknown: bool) -> None:
    if claimed > actual and not unknown:
        raise BadSample(f"truncated: the wav header claims {claimed} bytes of audio, the file has {actual}")
    if claimed == 0:
        follow = f", but {actual} bytes follow; the recording was probably not closed" if actual else ""
        raise BadSample(f"the wav header claims no samples{follow}")


def _check_ogg(data: bytes) -> None:
    """Walks the pages (RFC 3533): the last one must have the end flag, and no second stream may start later."""
    position, flags, started = 0, 0, False
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        flags = data[position + 5]
        if flags & 0x02 and started:
            raise BadSample("the ogg file contains several recordings in sequence; store each one in its own file")
        started = started or not flags & 0x02
        segments = data[position + 27 : position + 27 + data[position + 26]]
        position += 27 + data[position + 26] + sum(segments)
    if position > len(data) or not flags & 0x04:
        raise BadSample("truncated or damaged: the last page of the ogg file has no end flag")


def _check_mp4(data: bytes) -> None:
    """Walks the outermost boxes (ISO 14496-12, 4.2): each must end within the file."""
    position = 0
    while position + 8 <= len(data):
        size, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:  # the box extends to the end of the file
            return
        if size < 8 or position + size > len(data):
            raise BadSample(f"truncated: box {name!r} claims {size} bytes at {position}, the file has {len(data)}")
        position += size


CHECKS = {"wav": _check_wav, "ogg": _check_ogg, "mp4": _check_mp4}
