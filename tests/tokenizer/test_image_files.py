"""Formats of pictures, what limits them, and the reasons for refusing one."""

import logging
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image as PIL
from PIL import ImageCms, PngImagePlugin

from tests.corpus import encoded, picture
from tokenizer.errors import BadSample
from tokenizer.modalities.base import Decoded
from tokenizer.modalities.image.modality import Image, ImageConfig

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def decoded(data: bytes, extension: str = "", **config) -> Decoded:
    return Image(ImageConfig(**config)).read(data, extension)


def read(data: bytes, extension: str = "", **config) -> np.ndarray:
    return decoded(data, extension, **config).array


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# -- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "extension"), [("tga", "tga"), ("jpeg2000", "jp2"), ("ppm", "pnm"), ("bmp", "jpg")])
def test_more_lossless_formats_give_their_very_pixels(kind: str, extension: str):
    original = picture(13, 29)
    assert extension in Image.extensions
    assert np.array_equal(read(encoded(original, kind), extension), original)


@pytest.mark.parametrize("extension", ["avif", "jpg"])
def test_avif_gives_about_its_pixels_under_any_name(extension: str):
    original = picture(32, 40)
    assert np.abs(read(encoded(original, "avif", quality=95), extension).astype(float) - original).mean() < 8


@pytest.mark.parametrize("extension", ["jfif", "jpe", "jpeg", "jpg"])
def test_every_name_of_jpeg_is_one_of_ours(extension: str):
    assert extension in Image.extensions
    assert read(encoded(picture(), "jpeg"), extension).shape == (16, 24, 3)


def test_a_raw_pgm_is_grey():
    assert read(b"P5\n3 1\n255\n\x00\x80\xff", "pgm")[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def tga(alpha_bits: int, pixels: bytes) -> bytes:
    """One row of uncompressed BGRA pixels (Truevision's specification of 1991, page 6)."""
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, len(pixels) // 4, 1, 32, 0x20 | alpha_bits) + pixels


def test_the_fourth_byte_of_a_tga_is_alpha_only_if_its_header_says_so():
    pixels = bytes([30, 20, 10, 0, 60, 50, 40, 255])
    assert read(tga(8, pixels), "tga").tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert read(tga(0, pixels), "tga").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_a_tga_needs_its_extension_because_it_has_no_signature():
    with pytest.raises(BadSample, match="not a picture that we can read"):
        read(tga(8, bytes(8)), "jpg")


# -- large texts and profiles in PNG ------------------------------------------------------------------------------


def text(kind: str, value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt("parameters", value, zip=True)
    else:
        info.add_text("workflow", value, zip=kind == "zTXt")
    return info


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_a_png_may_have_a_text_of_several_mib(kind: str):
    original = picture()
    data = encoded(original, "png", pnginfo=text(kind, "x" * 3_000_000))
    assert kind.encode() in data
    assert np.array_equal(read(data), original)


def test_a_text_after_the_pixels_may_be_large_too():
    original = picture()
    data, end = encoded(original, "png"), chunk(b"IEND", b"")
    late = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))
    assert np.array_equal(read(data.removesuffix(end) + late + end), original)


def test_a_small_text_still_turns_the_picture():
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    assert read(encoded(picture(6, 10), "png", pnginfo=xmp)).shape == (10, 6, 3)


def test_the_profile_of_a_png_may_have_several_mib():
    padded = bytearray(SRGB + bytes(3_000_000))
    padded[:4] = struct.pack(">I", len(padded))
    found = decoded(encoded(picture(), "png", icc_profile=bytes(padded)))
    assert np.abs(found.array.astype(int) - picture()).max() <= 1
    assert found.notes == []


def test_a_damaged_text_is_refused_in_pillows_words():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "hello")
    data = encoded(picture(), "png", pnginfo=info).replace(b"hello", b"jello")
    with pytest.raises(BadSample, match=r"PNG: broken PNG file \(bad header checksum in b'tEXt'\)"):
        read(data)


# -- reasons ------------------------------------------------------------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def jpeg_of_12_bits() -> bytes:
    data = bytearray(encoded(picture(), "jpeg"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def tiff_without_its_palette() -> bytes:
    """Tag 320, ColorMap, becomes another."""
    return encoded(PIL.fromarray(picture()).convert("P"), "tiff").replace(b"\x40\x01\x03\0", b"\x41\x01\x03\0")


def test_a_flipped_bit_in_the_pixels_of_a_png_is_noticed():
    """Pillow checks neither the checksum of the chunk nor, once all rows are there, that of the pixels."""
    good = encoded(picture(24, 32), "png")
    for at in range(good.index(b"IDAT") + 4, good.index(b"IEND") - 8, 7):
        data = bytearray(good)
        data[at] ^= 64
        with pytest.raises(BadSample, match=r"the pixels are damaged \(wrong checksum of an IDAT chunk\)"):
            read(bytes(data))


def test_a_reason_of_the_decoder_follows_what_is_wrong_in_words():
    with pytest.raises(
        BadSample, match=r"^the file is damaged, or of a kind that cannot be read \(OSError: image file is"
    ):
        read(encoded(picture(), "bmp")[:-100])


def tiff_with_broken_pixels() -> bytes:
    tiff = encoded(picture(24, 32), "tiff", compression="tiff_adobe_deflate")
    return tiff[:40] + bytes(20) + tiff[60:]


def tiff_of_260_channels() -> bytes:
    """Tag 277, SamplesPerPixel."""
    return encoded(picture(), "tiff").replace(b"\x15\x01\x03\0\1\0\0\0\3\0", b"\x15\x01\x03\0\1\0\0\0\4\1")


@pytest.mark.parametrize(
    ("data", "said"),
    [(tiff_with_broken_pixels(), "decoder error"), (tiff_of_260_channels(), "samples per pixel")],
    ids=["libtiff", "a logger of Pillow"],
)
def test_decoders_print_nothing_about_damaged_files(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
):
    monkeypatch.setattr(logging.root, "handlers", [])  # those of pytest
    with pytest.raises(BadSample, match=said):
        read(data)
    assert capfd.readouterr() == ("", "")


def test_damaged_metadata_gives_the_picture_and_no_warning():
    exif = PIL.Exif()
    exif[0x010E] = "a description of more than four bytes"
    original = picture()
    with warnings.catch_warnings(record=True) as caught:
        found = read(encoded(original, "png", exif=exif.tobytes()[:-20]))
    assert np.array_equal(found, original)
    assert caught == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (jpeg_of_12_bits(), "JPEG: cannot handle 12-bit layers"),
        (b"II*\0\x08\0\0\0" + bytes(20), "TIFF: "),
        (tiff_without_its_palette(), r"TIFF: the header is damaged \(KeyError: 320\)"),
        (HEIC, r"\(JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF, JPEG2000\); it starts with .*ftypheic"),
    ],
    ids=["jpeg", "tiff", "palette", "heic"],
)
def test_a_refused_picture_says_why(data: bytes, said: str):
    with pytest.raises(BadSample, match=said) as found:
        read(data)
    assert " at 0x" not in str(found.value)


# -- limits -------------------------------------------------------------------------------------------------------


def bilevel_png(side: int) -> bytes:
    """A black square of one bit a pixel."""
    rows = zlib.compress((b"\0" + bytes(side // 8)) * side, 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_max_pixels_above_pillows_own_limit_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 1000)  # as if 10,000 pixels were above Pillow's 179 million
    data = bilevel_png(104)
    with pytest.raises(BadSample, match="104x104: more pixels than max_pixels=900"):
        read(data, max_pixels=900)
    assert read(data, max_pixels=20_000).shape == (104, 104, 3)
    with pytest.raises(BadSample, match="DecompressionBombError"):  # a decoder that checks Pillow's limit itself
        read(encoded(picture(104, 104), "webp"), max_pixels=20_000)
    assert read(encoded(picture(104, 104), "webp"), max_pixels=100_000_000).shape == (104, 104, 3)


def test_200_megapixels_are_read_if_max_pixels_allows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", PIL.MAX_IMAGE_PIXELS)  # reading raises it for the process
    found = decoded(bilevel_png(14_144), max_pixels=250_000_000, short_side=8)
    assert found.size == {"height": 14_144, "width": 14_144}
    assert found.array.shape == (8, 8, 3)


def test_other_limits_change_nothing_else():
    modality = Image(ImageConfig(short_side=8, max_pixels=100, color_rules=1))
    limited = modality.with_limits({"max_pixels": 1000})
    assert limited.config == ImageConfig(short_side=8, max_pixels=1000, color_rules=1)
    assert modality.with_limits({}) is modality
    with pytest.raises(ValueError, match="max_seconds is no limit of image samples"):
        modality.with_limits({"max_seconds": 3})


# -- several frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", "avif", "mpo"])
def test_the_first_frame_is_used_and_noted(kind: str):
    frames = [PIL.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    found = decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(found.array.reshape(-1, 3).mean(axis=0) - [255, 0, 0]).max() < 5
    assert found.notes == ["several frames or pages, only the first used"]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", "avif", "jpeg"])
def test_a_single_frame_has_no_note(kind: str):
    assert decoded(encoded(picture(), kind)).notes == []


def test_a_damaged_second_frame_does_not_cost_the_first():
    frames = [PIL.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    found = decoded(data[: data.rindex(b"\x2c") + 4])
    assert found.array[0, 0].tolist() == [255, 0, 0]
