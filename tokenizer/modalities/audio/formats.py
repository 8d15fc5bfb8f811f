"""Identifies audio formats by their first bytes. Imports no decoder."""

from tokenizer.errors import BadSample

FORMATS = "wav, w64, aiff, au, caf, nist, flac, ogg (vorbis, opus), mp3, m4a, aac, webm, g722"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
PICTURES_AND_ARCHIVES = (b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"GIF8", b"%PDF", b"PK\3\4", b"\x1f\x8b")
MARKS = {
    **{b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"caff": "caf"},
    **{b"riff\x2e\x91\xcf\x11": "w64", b"NIST_1A\n": "nistsphere", b"\x1a\x45\xdf\xa3": "matroska"},
}


def identify(data: bytes, extension: str) -> tuple[str, bytes]:
    """FFmpeg's name of the format, and the data without leading ID3 tags and zeros. Depends on the content, not the
    extension, except for g722, which has no header.

    Raises BadSample for empty files and unknown formats.
    """
    if not data:
        raise BadSample("the file is empty")
    audio = _without_id3(data)
    kind = _by_mark(audio)
    if kind is not None:
        return kind, audio
    if not data.startswith(PICTURES_AND_ARCHIVES):
        if extension.lower() == "g722":  # before mp3, because speech in g722 can start with mp3's 11-bit sync word
            return "g722", data
        if _is_mpeg(audio):  # layer 0 is ADTS
            return "mp3" if audio[1] & 0x06 else "aac", audio
    raise BadSample(f"not an audio file that we can read ({FORMATS}); it starts with {data[:8]!r}")


def _by_mark(audio: bytes) -> str | None:
    if audio[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and audio[8:12] == b"WAVE":
        return "wav"
    if audio[:4] == b"FORM" and audio[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if audio[4:8] in MP4_BOXES:
        return "mp4"
    return next((kind for mark, kind in MARKS.items() if audio.startswith(mark)), None)


def _is_mpeg(audio: bytes) -> bool:
    """Whether it starts with MPEG's sync word, 11 bits."""
    return len(audio) > 3 and audio[0] == 0xFF and audio[1] & 0xE0 == 0xE0


def _without_id3(data: bytes) -> bytes:
    """ID3v2.4, section 3: a header of ten bytes, the last four with the tag's size, 7 bits each; a flag says whether a
    footer of ten bytes follows the tag. A file that two programs tagged has two tags.
    """
    audio = _without_zeros(data)
    while audio[:3] == b"ID3" and len(audio) >= 10:
        size = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(audio[6:10], (21, 14, 7, 0), strict=True))
        size += 10 if audio[5] & 0x10 else 0
        if size >= len(audio):
            raise BadSample(f"truncated: its ID3 tag claims {size} bytes, the file has {len(audio)}")
        audio = _without_zeros(audio[size:])
    return audio


def _without_zeros(audio: bytes) -> bytes:
    """Without the zeros that some programs leave before an mp3 or its tag."""
    if audio[:1] != b"\0" or audio[4:8] in MP4_BOXES:  # the size of an mp4 box starts with zeros
        return audio
    rest = audio.lstrip(b"\0")
    return rest if rest[:3] == b"ID3" or _is_mpeg(rest) else audio
