"""The images or recordings of a sample, known by their file extension or by their first bytes."""

import re
from dataclasses import dataclass

FIRST_BYTES = {
    "jpg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n",
    "gif": rb"GIF8",
    "webp": rb"RIFF....WEBP",
    "bmp": rb"BM....\0\0\0\0",
    "tif": rb"II\*\0|MM\0\*",
    "ppm": rb"P6\s",
    "jp2": rb"\0\0\0\x0cjP  ",
    "avif": rb"....ftypavi[fs]",
    "wav": rb"(RIFF|RF64)....WAVE",
    "flac": rb"fLaC",
    "ogg": rb"OggS",
    "mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
    "m4a": rb"....ftyp(M4A|M4B|isom|mp4|dash)",
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    "aiff": rb"FORM....AIF",
    "au": rb"\.snd",
    "caf": rb"caff",
    "w64": rb"riff\x2e\x91\xcf\x11",
    "webm": rb"\x1aE\xdf\xa3",
}
PATTERNS = {extension: re.compile(pattern, re.DOTALL) for extension, pattern in FIRST_BYTES.items()}


@dataclass(frozen=True)
class Media:
    """kind: image or audio. extensions: those that the modality reads, without the dot."""

    kind: str
    extensions: tuple[str, ...]

    def extension(self, name: str) -> str:
        """The last extension of a file name in lower case if it is that of a medium, else an empty string."""
        found = name.rpartition(".")[2].lower() if "." in name else ""
        return found if found in self.extensions else ""

    def recognise(self, data: bytes) -> str:
        """The extension of data that starts like a medium of this kind, else an empty string."""
        return next((e for e, pattern in PATTERNS.items() if e in self.extensions and pattern.match(data)), "")
