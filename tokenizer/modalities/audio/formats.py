"""What a sound file is by its first bytes, and whether it is whole: before any decoder sees it. Imports no decoder."""

from typing import Literal

from tokenizer.errors import BadSample

FORMATS = "wav, flac, ogg (vorbis, opus), mp3, m4a, aac, g722"
UNKNOWN_BYTES = 0x7FFFF000  # a wav of at least this many was written into a pipe, its size not known
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
PICTURES_AND_ARCHIVES = (b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"GIF8", b"%PDF", b"PK\3\4", b"\x1f\x8b")


def identify(data: bytes, extension: str) -> tuple[str, bytes]:
    """FFmpeg's name of the format, and the data without an ID3 tag in front. The content decides, not the name."""
    if not data:
        raise BadSample("the file is empty")
    sound = _without_id3(data)
    head = sound[:12]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        return "wav", sound
    if head[:4] in (b"fLaC", b"OggS"):
        return {b"fLaC": "flac", b"OggS": "ogg"}[head[:4]], sound
    if head[4:8] in MP4_BOXES:
        return "mp4", sound
    if not data.startswith(PICTURES_AND_ARCHIVES):
        if extension.lower() == "g722":  # before mp3's mark, 11 bits, that speech may begin with
            return "g722", data
        if len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # MPEG's frame mark; layer 0 is ADTS
            return "mp3" if head[1] & 0x06 else "aac", sound
    raise BadSample(f"no sound in a format that we read ({FORMATS}): {data[:8]!r}...")


def check_whole(kind: str, data: bytes) -> None:
    """Raises BadSample where the container shows that a part is missing, which decoders would pass over."""
    if kind in CHECKS:
        CHECKS[kind](data)


def _without_id3(data: bytes) -> bytes:
    """ID3v2.4, section 3.1: ten bytes, the last four of them the tag's size in 7 bits each."""
    if data[:3] != b"ID3" or len(data) < 10:
        return data
    size = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    if size >= len(data):
        raise BadSample(f"truncated: its ID3 tag alone claims {size} bytes, the file has {len(data)}")
    return data[size:]


def _check_wav(data: bytes) -> None:
    """libsndfile reads a cut wav as a shorter one. Sizes are little-endian, in RIFX big-endian."""
    order: Literal["little", "big"] = "big" if data[:4] == b"RIFX" else "little"
    position, long_size = 12, None
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], order)
        position += 8
        if name == b"ds64":  # EBU 3306: the sizes that do not fit into 32 bits
            long_size = int.from_bytes(data[position + 8 : position + 16], "little")
        if name == b"data":
            size = long_size if long_size is not None and size == 0xFFFFFFFF else size
            _check_wav_data(size, len(data) - position, size >= UNKNOWN_BYTES and long_size is None)
            return
        position += size + size % 2
    raise BadSample("the wav file has no data chunk; was it cut off within its header?")


def _check_wav_data(claimed: int, there: int, unknown: bool) -> None:
    if claimed > there and not unknown:
        raise BadSample(f"truncated: the wav header claims {claimed} bytes of sound, the file holds {there}")
    if claimed == 0:
        follow = f", though {there} bytes follow; was the recording never closed?" if there else ""
        raise BadSample(f"the wav header claims no samples{follow}")


def _check_ogg(data: bytes) -> None:
    """Walks the pages (RFC 3533): the last one must be marked as such, and nothing may start behind the first ones."""
    position, flags, started = 0, 0, False
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        flags = data[position + 5]
        if flags & 0x02 and started:
            raise BadSample("several recordings one after another in one ogg file; store each in its own")
        started = started or not flags & 0x02
        segments = data[position + 27 : position + 27 + data[position + 26]]
        position += 27 + data[position + 26] + sum(segments)
    if position > len(data) or not flags & 0x04:
        raise BadSample("truncated or damaged: the ogg file has no page that is marked as its last")


def _check_mp4(data: bytes) -> None:
    """Walks the outermost boxes (ISO 14496-12, 4.2): each must lie within the file."""
    position = 0
    while position + 8 <= len(data):
        size, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:  # to the end of the file
            return
        if size < 8 or position + size > len(data):
            raise BadSample(f"truncated: box {name!r} claims {size} bytes at {position}, the file has {len(data)}")
        position += size


CHECKS = {"wav": _check_wav, "ogg": _check_ogg, "mp4": _check_mp4}
