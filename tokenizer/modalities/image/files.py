"""Opens picture files: the format from the first bytes, the size and the colour profile before any pixel is decoded."""

import ctypes
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image as PIL

from tokenizer.errors import BadSample

# without this list Pillow opens every format it knows, EPS by running Ghostscript; JPEG includes the MPO of phones
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
UNSIGNED = {"tga": "TGA"}  # extension -> format that cannot be recognised by its first bytes
EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jpe", "jfif", "apng", "avif"),
    *("pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "tga"),
)
PREFIX = 16  # bytes by which Pillow recognises a format
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_TEXT = 2**20  # Pillow refuses PNGs with larger texts or profiles, as its PngImagePlugin.MAX_TEXT_CHUNK says
LARGEST_PROFILE = 2**26
NO_LOG = logging.NullHandler()  # without any handler, Python prints errors to stderr
TGA_ALPHA_BITS = "tga_alpha_bits"  # our key in a picture's `info`


def open_picture(data: bytes, extension: str = "") -> PIL.Image:
    """The picture with its size and `info`; no pixel is decoded. extension: of the file, without the dot.

    Differs from PIL.Image.open: a failure has the decoder's own reason, and any number of pixels is accepted. Raises
    BadSample, and whatever else Pillow's decoders raise.
    """
    if not data:
        raise BadSample("the file is empty")
    check_png_pixels(data)
    data, profile = without_large_text(data)
    unsigned = UNSIGNED.get(extension.lower())
    picture = _opened(data, (*FORMATS, unsigned) if unsigned else FORMATS)
    profile = profile or (jp2_profile(data) if picture.format == "JPEG2000" else None)
    if profile:
        picture.info["icc_profile"] = profile
    if picture.format == "TGA":
        picture.info[TGA_ALPHA_BITS] = data[17] & 0x0F
    return picture


def silence_decoders() -> None:
    """Pillow and libtiff would print about damaged files without their names, for the whole process.

    What matters of it is in the message of BadSample.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.\w+ImagePlugin")
    warnings.filterwarnings("ignore", category=PIL.DecompressionBombWarning)  # we have our own limits
    logging.getLogger("PIL").addHandler(NO_LOG)
    library = ctypes.CDLL(PIL.core.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(library, name):  # not where libtiff is a hidden part of Pillow
            getattr(library, name)(None)


def _opened(data: bytes, formats: tuple[str, ...]) -> PIL.Image:
    PIL.init()
    reasons = []
    for name in formats:
        factory, accepts = PIL.OPEN[name]
        accepted = accepts is None or accepts(data[:PREFIX])
        if isinstance(accepted, str):  # Pillow was built without this format
            reasons.append(accepted)
        elif accepted:
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
                reasons.append(f"{name}: {_reason(error)}")
    if reasons:
        raise BadSample(f"not a picture that we can read: {'; '.join(reasons)}")
    raise BadSample(f"not a picture that we can read ({', '.join(formats)}); it starts with {data[:12]!r}")


def _reason(error: BaseException) -> str:
    """Pillow's own words, if it has any: it also raises SyntaxError from others, whose text may be a mere number."""
    cause = error.__cause__ or error
    return str(error) if isinstance(cause, SyntaxError) else f"the header is damaged ({type(cause).__name__}: {cause})"


# -- PNG --------------------------------------------------------------------------------------------------------------


def without_large_text(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without texts and profiles above 1 MiB, and that profile. Other files are returned as they are."""
    if not data.startswith(PNG_SIGNATURE):
        return data, None
    kept, profile = [memoryview(PNG_SIGNATURE)], None
    for kind, chunk in _png_chunks(data):
        if kind in (b"iCCP", b"iTXt", b"tEXt", b"zTXt"):
            text = _png_text(kind, bytes(chunk[8:-4]))
            if len(text) > LARGEST_TEXT:
                profile = text if kind == b"iCCP" else profile
                continue
        kept.append(chunk)
    return b"".join(kept) if sum(map(len, kept)) < len(data) else data, profile


def check_png_pixels(data: bytes) -> None:
    """Raises BadSample if the checksum of compressed pixels is wrong, which Pillow does not check."""
    if not data.startswith(PNG_SIGNATURE):
        return
    for kind, chunk in _png_chunks(data):
        is_whole = len(chunk) == 12 + int.from_bytes(chunk[:4], "big")  # Pillow says that the file is cut
        if kind == b"IDAT" and is_whole and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise BadSample("PNG: the pixels are damaged (wrong checksum of an IDAT chunk)")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and bytes of each chunk, with its length and checksum; the last may be cut."""
    start = len(PNG_SIGNATURE)
    while start < len(data):
        num_bytes = int.from_bytes(data[start : start + 4], "big")
        end = start + 12 + num_bytes
        yield data[start + 4 : start + 8], memoryview(data)[start:end]
        start = end


def _png_text(kind: bytes, body: bytes) -> bytes:
    """The text or profile in a chunk, or its first 64 MiB."""
    _, _, rest = body.partition(b"\0")  # the keyword
    if kind == b"tEXt":
        return rest
    is_deflated, rest = (rest[:1] == b"\1", rest[2:]) if kind == b"iTXt" else (True, rest[1:])
    if kind == b"iTXt":
        _, _, rest = rest.partition(b"\0")[2].partition(b"\0")  # language and translated keyword
    if not is_deflated:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, LARGEST_PROFILE)
    except zlib.error:
        return b""  # Pillow finds the damage too, and refuses the file


# -- JPEG 2000 --------------------------------------------------------------------------------------------------------


def jp2_profile(data: bytes) -> bytes | None:
    """The ICC profile in the header of a JP2 file (ISO 15444-1, annex I.5.3.3), which Pillow does not return."""
    for kind, body in _jp2_boxes(data):
        if kind == b"jp2h":
            for inner, colour in _jp2_boxes(body):
                if inner == b"colr" and colour[:1] in (b"\2", b"\3"):
                    return colour[3:]
    return None


def _jp2_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 0
    while start + 8 <= len(data):
        num_bytes, kind = struct.unpack(">I4s", data[start : start + 8])
        head = 8
        if num_bytes == 1:
            head, num_bytes = 16, int.from_bytes(data[start + 8 : start + 16], "big")
        end = start + num_bytes if num_bytes else len(data)
        if end < start + head:
            return  # a raw codestream, or damage that the decoder reports
        yield kind, data[start + head : end]
        start = end
