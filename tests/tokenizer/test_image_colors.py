"""Colour profiles to sRGB, against the formulas of the profiles and of IEC 61966-2-1."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image as PIL
from PIL import ImageCms

from tests.corpus import encoded, picture
from tokenizer.modalities.base import Decoded, build_modality, identity_of
from tokenizer.modalities.image.files import jp2_profile
from tokenizer.modalities.image.modality import Image, ImageConfig

# columns: XYZ of red, green and blue, adapted to D50
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
GAMMA = 563 / 256  # of Adobe RGB (1998)
WHITE = struct.pack(">iii", 63190, 65536, 54061)  # D50, in units of 2^-16


def profile(space: bytes, tags: dict[bytes, bytes], *, connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2.4 (ICC.1:2001-04, section 6)."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"wtpt": xyz(WHITE), **tags}
    tags[b"cprt"] = b"text\0\0\0\0none\0"
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4x4s4s4s4s12x4s28x", start + len(body), b"\2\x40\0\0", kind, space, connection, b"acsp")
    return (head + WHITE).ljust(128, b"\0") + table + body


def xyz(values: bytes) -> bytes:
    return b"XYZ \0\0\0\0" + values


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    tags = {}
    for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags[name + b"XYZ"] = xyz(struct.pack(">iii", *(round(value * 65536) for value in column)))
        tags[name + b"TRC"] = curve(gamma)
    return profile(b"RGB ", tags)


def cmyk_profile() -> bytes:
    """White paper; cyan alone is a grey of L* 50, key alone is black, and other inks do nothing."""
    corners = [(c, k) for c in (0, 1) for _m in (0, 1) for _y in (0, 1) for k in (0, 1)]
    lab = b"".join(bytes([round(255 * (1 - k) * (1 - c / 2)), 128, 128]) for c, k in corners)
    same, one = bytes(range(256)), 65536
    matrix = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, one)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + same * 4 + lab + same * 3
    return profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, connection=b"Lab ", kind=b"prtr")


ADOBE_PROFILE = rgb_profile(ADOBE, GAMMA)


def to_srgb(pixels: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    """The definition: linear light of the profile, XYZ, linear light of sRGB, and its curve. [..., 3] in 0..255."""
    linear = (pixels / 255) ** gamma @ primaries.T @ np.linalg.inv(SRGB).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decoded(data: bytes, **config) -> Decoded:
    return Image(ImageConfig(**config)).read(data)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_adobe_rgb_becomes_srgb(kind: str):
    original = picture(20, 30)
    options = {"lossless": True} if kind == "webp" else {}
    found = decoded(encoded(original, kind, icc_profile=ADOBE_PROFILE, **options))
    assert np.abs(found.array - to_srgb(original, ADOBE, GAMMA)).max() <= 2
    assert found.notes == []


def test_the_difference_is_one_that_people_see():
    data = encoded(PIL.new("RGB", (4, 4), (60, 180, 60)), icc_profile=ADOBE_PROFILE)
    assert decoded(data).array[0, 0].tolist() == [0, 181, 42]
    assert decoded(data, color_rules=1).array[0, 0].tolist() == [60, 180, 60]


def test_an_srgb_picture_keeps_its_pixels():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = decoded(encoded(picture(20, 30), icc_profile=srgb))
    assert np.array_equal(found.array, picture(20, 30))
    assert found.notes == []


def test_a_profile_with_the_primaries_of_srgb_and_another_gamma_is_converted():
    found = decoded(encoded(picture(20, 30), icc_profile=rgb_profile(SRGB, 1.8))).array
    assert np.abs(found - to_srgb(picture(20, 30), SRGB, 1.8)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_changes_the_brightness(mode: str):
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None]
    grey = PIL.fromarray(ramp).convert(mode)
    found = decoded(encoded(grey, icc_profile=profile(b"GRAY", {b"kTRC": curve(1.8)}))).array
    expected = to_srgb(np.stack([ramp] * 3, axis=2), SRGB, 1.8)
    assert np.abs(found - expected).max() <= 2


def test_16_bit_grey_goes_through_its_profile_too():
    ramp = np.array([[0, 20000, 40000, 65535]], np.uint16)
    found = decoded(encoded(PIL.fromarray(ramp), icc_profile=profile(b"GRAY", {b"kTRC": curve(1.8)}))).array
    assert np.abs(found - to_srgb(np.stack([ramp / 257] * 3, axis=2), SRGB, 1.8)).max() <= 2


def test_grey_with_a_profile_of_colours_is_the_grey_of_these():
    grey = np.full((4, 4), 90, np.uint8)
    found = decoded(encoded(PIL.fromarray(grey), icc_profile=ADOBE_PROFILE)).array[0, 0]
    assert np.abs(found - to_srgb(np.array([90.0] * 3), ADOBE, GAMMA)).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_palettes_and_transparency_are_converted_too(mode: str):
    colour = PIL.new("RGBA", (4, 4), (60, 180, 60, 51))
    shown = colour if mode == "RGBA" else PIL.new("P", (4, 4), 1)
    options = {}
    if mode == "P":
        shown.putpalette([0, 0, 0, 60, 180, 60])
        options = {"transparency": b"\xff\x33"}
    found = decoded(encoded(shown, icc_profile=ADOBE_PROFILE, **options)).array[0, 0]
    on_white = to_srgb(np.array([60.0, 180.0, 60.0]), ADOBE, GAMMA) * 0.2 + 255 * 0.8
    assert np.abs(found - on_white).max() <= 2


@pytest.mark.parametrize(
    ("ink", "seen"), [((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 0, 0, 0), 119), ((0, 255, 0, 0), 255)]
)
@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk_is_what_its_profile_says(kind: str, ink: tuple[int, ...], seen: int):
    found = decoded(encoded(PIL.new("CMYK", (16, 16), ink), kind, icc_profile=cmyk_profile())).array
    assert np.abs(found.astype(int) - seen).max() <= 2  # L* 50 is 119 in sRGB


def test_jpeg_2000_has_its_profile_in_a_box():
    plain = encoded(PIL.new("RGB", (8, 8), (60, 180, 60)), "jpeg2000")
    old = plain.index(b"colr") - 4
    size = int.from_bytes(plain[old : old + 4], "big")
    box = struct.pack(">I4s3s", 11 + len(ADOBE_PROFILE), b"colr", b"\2\0\0") + ADOBE_PROFILE
    head = plain.index(b"jp2h") - 4
    head_size = int.from_bytes(plain[head : head + 4], "big") + len(box) - size
    data = plain[:head] + struct.pack(">I", head_size) + plain[head + 4 : old] + box + plain[old + size :]
    assert jp2_profile(data) == ADOBE_PROFILE
    assert jp2_profile(plain) is None
    assert decoded(data).array[0, 0].tolist() == [0, 181, 42]


@pytest.mark.parametrize(
    ("bad", "note"),
    [
        (b"no profile at all" * 20, "unreadable colour profile, ignored"),
        (ADOBE_PROFILE[:300], "unreadable colour profile, ignored"),
        (cmyk_profile(), "colour profile of another kind of picture, ignored"),
    ],
    ids=["noise", "cut", "cmyk"],
)
def test_a_profile_that_cannot_be_used_is_noted_and_costs_no_picture(bad: bytes, note: str):
    found = decoded(encoded(picture(), icc_profile=bad))
    assert np.array_equal(found.array, picture())
    assert found.notes == [note]


def test_the_profile_survives_turning_the_picture():
    exif = PIL.Exif()
    exif[0x0112] = 6
    found = decoded(encoded(PIL.new("RGB", (4, 8), (60, 180, 60)), "jpeg", exif=exif, icc_profile=ADOBE_PROFILE)).array
    assert found.shape == (4, 8, 3)
    assert np.abs(found[0, 0].astype(int) - [0, 181, 42]).max() <= 4


def test_threads_share_the_transform():
    files = [encoded(picture(64, 64, seed), icc_profile=ADOBE_PROFILE) for seed in range(16)]
    alone = [decoded(data).array for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decoded(data).array, files * 4))
    assert all(np.array_equal(one, alone[i % 16]) for i, one in enumerate(together))


# -- identity -----------------------------------------------------------------------------------------------------


def test_settings_from_before_the_rules_had_versions_mean_the_first():
    old = {"short_side": 16, "center_crop": False, "max_pixels": 64_000_000, "max_side": 16_384}
    assert build_modality("image", old).config.color_rules == 1
    assert build_modality("image", {**old, "color_rules": 2}).config.color_rules == 2
    assert identity_of("image", {**old, "color_rules": 1}) == old
    assert identity_of("image", {**old, "color_rules": 2}) == {**old, "color_rules": 2}


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="color_rules is 3; choose 1 or 2"):
        ImageConfig(color_rules=3)
