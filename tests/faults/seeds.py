"""Small real files of every kind that the product reads: what `tests.faults.fuzz` damages. Always the same bytes."""

import base64
import bz2
import functools
import gzip
import io
import lzma
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms, PngImagePlugin

from pipeline.tokens.schema import read_parquet, to_parquet
from tests.corpus import encoded, picture, tar_bytes
from tests.sounds import by_av, by_soundfile, sweep
from tokenizer.modalities.audio.ogg import pages

GOLDEN = Path(__file__).parents[1] / "golden"


def _same(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Seed:
    """extension: of the file, or its path in an output. wrap: the file from `data`, such as a compression or new
    checksums; without it, `data` is the file if `is_plain`, else it is wrapped first.
    """

    extension: str
    data: bytes
    wrap: Callable[[bytes], bytes] = _same
    is_plain: bool = True

    @property
    def file(self) -> bytes:
        return self.data if self.is_plain else self.wrap(self.data)

    @property
    def wraps(self) -> bool:
        return self.wrap is not _same


@functools.cache
def seeds() -> dict[str, list[Seed]]:
    """By kind."""
    return {**pictures(), **sounds(), **tars(), **tables(), **token_files()}


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, list[Seed]]:
    return {
        "jpeg": [Seed("jpg", data) for data in _jpegs()],
        "png": [Seed("png", data, with_png_checksums) for data in _pngs()],
        "apng": [Seed("apng", _animated("png"), with_png_checksums)],
        "gif": [Seed("gif", data) for data in _gifs()],
        "webp": [Seed("webp", data) for data in _webps()],
        "avif": [Seed("avif", data) for data in (encoded(picture(32, 40), "avif"), _timeless(_animated("avif")))],
        "tiff": [Seed("tif", data) for data in _tiffs()],
        "bmp": [Seed("bmp", data) for data in (*(encoded(_small(mode), "bmp") for mode in ("RGB", "L", "1")), _rle())],
        "tga": [
            Seed("tga", encoded(_small(mode), "tga", rle=rle)) for mode in ("RGBA", "L", "P") for rle in (False, True)
        ],
        "jpeg 2000": [Seed("jp2", encoded(_small("RGBA"), "jpeg2000")), Seed("j2k", _j2k())],
        "pnm": [Seed("pnm", data) for data in _pnms()],
    }


def _small(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(picture(24, 32)).convert(mode)


def _deep(mode: str) -> Image.Image:
    """Grey of 16 bits, or of floats."""
    grey = picture(24, 32)[:, :, 0]
    return Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255)


def _profile() -> bytes:
    """Without the time at which it was made."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"  # turned, described
    return exif


def _jpegs() -> Iterator[bytes]:
    yield encoded(_small(), "jpeg", exif=_exif(), icc_profile=_profile())
    yield encoded(_small(), "jpeg", progressive=True, comment=b"progressive")
    yield encoded(_small("CMYK"), "jpeg")
    yield encoded(_small("L"), "jpeg", restart_marker_rows=1)
    yield encoded(_small(), "mpo", save_all=True, append_images=[_small()])


def _pngs() -> Iterator[bytes]:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "hello")
    text.add_text("Long", "x" * 2000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    yield encoded(_small(), "png", icc_profile=_profile(), pnginfo=text, exif=_exif())
    yield encoded(_small("P"), "png", transparency=3)
    yield encoded(_deep("I;16"), "png")
    yield encoded(_small("RGBA"), "png")
    yield encoded(_small("1"), "png")
    yield interlaced_png(picture(24, 32))
    yield encoded(Image.new("1", (999, 1000)), "png")  # 200 bytes that give 3 MB
    yield encoded(_small(), "png", icc_profile=_profile() + bytes(30_000_000))


def interlaced_png(image: np.ndarray) -> bytes:
    """Adam7 (ISO 15948, 8.2): seven passes, each a smaller picture."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in image[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(b)) + k + b + _crc(k + b) for k, b in chunks)


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def with_png_checksums(data: bytes) -> bytes:
    """The chunks that are whole get the checksums of their content."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 <= len(data):
            fixed[end : end + 4] = _crc(data[at + 4 : end])
        at = end + 4
    return bytes(fixed)


def _animated(kind: str, **options: object) -> bytes:
    frames = [Image.fromarray(picture(24, 32, seed)) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def _timeless(avif: bytes) -> bytes:
    """Without the times at which its tracks were made (ISO 14496-12, 8.2.2): 16 bytes after the version."""
    fixed = bytearray(avif)
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        at = avif.index(box) + 8
        fixed[at : at + 16] = bytes(16)
    return bytes(fixed)


def _gifs() -> Iterator[bytes]:
    yield encoded(_small("P"), "gif", transparency=1, interlace=1)
    yield encoded(Image.new("L", (1000, 999)), "gif")
    yield _animated("gif")


def _webps() -> Iterator[bytes]:
    yield encoded(_small(), "webp", exif=_exif(), icc_profile=_profile())
    yield encoded(_small("RGBA"), "webp", lossless=True)
    yield _animated("webp")


def _tiffs() -> Iterator[bytes]:
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        yield encoded(_small(), "tiff", compression=compression)
    yield encoded(_small("1"), "tiff", compression="group4")
    yield encoded(_small("CMYK"), "tiff", icc_profile=_profile())
    yield encoded(_deep("I;16"), "tiff")
    yield encoded(_deep("F"), "tiff")
    yield encoded(_small("P"), "tiff")
    yield _animated("tiff", compression="tiff_lzw")


def _rle() -> bytes:
    """8 x 4 pixels in 4 runs of BI_RLE8, each with its end of line."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    runs = b"".join(bytes([8, 50 * row, 0, 0]) for row in range(4)) + b"\0\1"
    start = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start)
    return header + struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 8, 1, len(runs), 0, 0, 256, 0) + palette + runs


def _j2k() -> bytes:
    out = io.BytesIO()
    _small().save(out, format="jpeg2000", no_jp2=True, tile_size=(16, 16))
    return out.getvalue()


def _pnms() -> Iterator[bytes]:
    for mode in ("RGB", "L", "1"):
        yield encoded(_small(mode), "ppm")
    yield encoded(_deep("I;16").convert("I"), "ppm")
    yield b"P3\n# text\n4 2\n255\n" + b" ".join(str(i * 10).encode() for i in range(24)) + b"\n"
    yield b"P1\n4 2\n1 0 1 0\n0 1 0 1\n"


# -- sounds -----------------------------------------------------------------------------------------------------------


def sounds() -> dict[str, list[Seed]]:
    mono, stereo = sweep(16000, 0.3), sweep(16000, 0.3, 2)
    containers = {"wav": "WAV", "rf64": "RF64", "aiff": "AIFF", "au": "AU", "caf": "CAF", "w64": "W64", "sph": "NIST"}
    found = {
        kind: [Seed(kind, by_soundfile(x, 16000, name, "PCM_16")) for x in (mono, stereo)]
        for kind, name in containers.items()
    }
    found["wav"] += [Seed("wav", by_soundfile(mono, 16000, "WAV", kind)) for kind in ("IMA_ADPCM", "ULAW")]
    found["wav"] += [Seed("wav", _float_wav(sweep(16000, 0.1, channels))) for channels in (1, 2, 6)]
    found["caf"].append(Seed("caf", by_soundfile(mono, 16000, "CAF", "ALAC_16")))
    silence = np.zeros((20 * 16000, 1), np.float32)  # a few kB
    found["flac"] = [Seed("flac", by_soundfile(x, 16000, "FLAC", "PCM_16")) for x in (mono, stereo, silence)]
    found["mp3"] = [Seed("mp3", by_soundfile(stereo, 16000, "MP3", "MPEG_LAYER_III")), Seed("mp3", _ffmpeg("mp3"))]
    vorbis = [
        _with_fixed_serial(by_soundfile(sweep(44100, 0.3, channels), 44100, "OGG", "VORBIS")) for channels in (1, 3)
    ]
    found["ogg"] = [Seed("ogg", data, with_ogg_checksums) for data in vorbis]
    found["opus"] = [Seed("opus", _ffmpeg("opus"), with_ogg_checksums)]
    found |= {kind: [Seed(kind, _ffmpeg(kind))] for kind in ("m4a", "aac", "webm", "g722")}
    for kind in ("m4a", "webm"):
        found[kind].append(Seed(kind, _ffmpeg(kind, 8)))
    return found


def _float_wav(x: np.ndarray) -> bytes:
    """Without the time at which it was made."""
    data = by_soundfile(x, 16000, "WAV", "FLOAT")
    at = data.index(b"PEAK") + 12
    return data[:at] + bytes(4) + data[at + 4 :]


CODECS = {
    **{"opus": ("libopus", "ogg", 48000), "webm": ("libopus", "webm", 48000), "mp3": ("libmp3lame", "mp3", 16000)},
    **{"m4a": ("aac", "ipod", 16000), "aac": ("aac", "adts", 16000), "g722": ("g722", "g722", 16000)},
}


def _ffmpeg(extension: str, channels: int = 1) -> bytes:
    codec, kind, rate = CODECS[extension]
    with tempfile.TemporaryDirectory() as folder:  # bitexact: no random ids
        return by_av(Path(folder), sweep(rate, 0.3, channels), rate, codec, kind, fflags="+bitexact")


def _with_fixed_serial(data: bytes) -> bytes:
    """libsndfile gives each file a random one."""
    fixed = bytearray(data)
    for page in pages(data):
        fixed[page.start + 14 : page.start + 18] = b"same"
    return with_ogg_checksums(bytes(fixed))


def with_ogg_checksums(data: bytes) -> bytes:
    """The pages get the checksums of their content (RFC 3533, section 6)."""
    fixed = bytearray(data)
    for page in pages(data):
        fixed[page.start + 22 : page.start + 26] = bytes(4)
        fixed[page.start + 22 : page.start + 26] = _ogg_crc(bytes(fixed[page.start : page.end]))
    return bytes(fixed)


def _ogg_crc(page: bytes) -> bytes:
    register = 0
    for byte in page:
        register = (register << 8 & 0xFFFFFFFF) ^ OGG_TABLE[register >> 24 ^ byte]
    return register.to_bytes(4, "little")


def _ogg_entry(index: int) -> int:
    register = index << 24
    for _ in range(8):
        register = (register << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if register >> 31 else 0)
    return register


OGG_TABLE = [_ogg_entry(index) for index in range(256)]


# -- tars -------------------------------------------------------------------------------------------------------------


def tars() -> dict[str, list[Seed]]:
    plain = list(_plain_tars())
    zstd = pa.Codec("zstd")
    compressions: dict[str, Callable[[bytes], bytes]] = {
        "tar.gz": lambda data: gzip.compress(data, mtime=0),
        "tar.bz2": bz2.compress,
        "tar.xz": lzma.compress,
        "tar.zst": lambda data: zstd.compress(data, asbytes=True),
    }
    found = {"tar": [Seed("tar", data, with_tar_checksums) for data in plain]}
    for kind, compress in compressions.items():
        found[kind] = [Seed(kind, data, compress, is_plain=False) for data in plain]
    found["tar.xz"].append(Seed("tar.xz", xz_of_a_large_dictionary(plain[0])))
    return found


def _plain_tars() -> Iterator[bytes]:
    members = [(f"{i}.{name}", f"{name} {i}".encode() * 20) for i in range(4) for name in ("cls", "jpg", "txt")]
    long = [("folder/" * 20 + name, data) for name, data in members]
    yield tar_bytes(members)
    yield tar_bytes(long)
    yield tar_bytes([("é" * 60 + name, data) for name, data in members], kind=tarfile.PAX_FORMAT)
    yield tar_bytes(members, kind=tarfile.USTAR_FORMAT)
    yield tar_bytes([*members, ("zeros.bin", bytes(2**20))])  # compresses to 1 kB


def with_tar_checksums(data: bytes) -> bytes:
    """Each block that has the mark of a header gets its checksum."""
    fixed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def xz_of_a_large_dictionary(data: bytes) -> bytes:
    """An xz file that claims to need 4 GiB to decompress (xz file format 1.2.1, section 5.3.1)."""
    file = bytearray(lzma.compress(data))
    at = 12  # the block header: its size, flags, filter 0x21 with one byte of properties
    size = 4 * (file[at] + 1)
    assert file[at + 1 : at + 4] == b"\0\x21\1"
    file[at + 4] = 40
    file[at + size - 4 : at + size] = struct.pack("<I", zlib.crc32(file[at : at + size - 4]))
    return bytes(file)


# -- tables and token files -------------------------------------------------------------------------------------------


def tables() -> dict[str, list[Seed]]:
    jpegs = [encoded(picture(8, 8, seed), "jpeg") for seed in range(3)]
    table = pa.table({"key": ["a", "b", "c"], "jpg": jpegs, "txt": ["é", "b", None], "cls": [0, 1, 2]})
    nested = pa.table({"image": [{"bytes": data, "path": None} for data in jpegs], "tags": [["x"], [], ["y", "z"]]})
    rows = [f"{key}\t{base64.b64encode(data).decode()}\t{key} é" for key, data in zip("abc", jpegs, strict=True)]
    text = "key\tjpg\ttxt\n" + "\n".join(rows) + "\n"
    return {
        "parquet": [Seed("parquet", _parquet(table)), Seed("parquet", _parquet(nested, compression="none"))],
        "csv": [
            Seed("csv", text.replace("\t", ",").encode()),
            Seed("csv", text.replace("\t", ",").encode("utf-8-sig")),
        ],
        "tsv": [Seed("tsv", text.encode())],
    }


def _parquet(table: pa.Table, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def token_files() -> dict[str, list[Seed]]:
    """Files of committed outputs. extension: the path below tests/golden, whose token files have no page checksums."""
    old = _golden("tokens/*.parquet")
    return {
        "token Parquet": [Seed(seed.extension, to_parquet(read_parquet(seed.data))) for seed in old],
        "old token Parquet": old,
        "manifest entries": _golden("manifest/*.json"),
        "dataset.json": _golden("dataset.json"),
    }


def _golden(glob: str) -> list[Seed]:
    paths = [path for folder in ("out", "out_audio") for path in sorted((GOLDEN / folder).glob(glob))]
    return [Seed(str(path.relative_to(GOLDEN)), path.read_bytes()) for path in paths]
