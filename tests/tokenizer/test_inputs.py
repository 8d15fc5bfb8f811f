"""`Tokenizer.encode` and `decode` over what callers have in memory: the tokens of the same file, or a refusal.

DEVICES holds cuda where there is one.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image as PIL

from tests.corpus import encoded, picture
from tokenizer.autoencoder import Autoencoder
from tokenizer.errors import BadSample
from tokenizer.tokenizer import Tokenizer

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VQGAN = {"name": "vqgan", "width": 8, "multipliers": [1], "res_blocks": 1, "channels": 8, "patch_size": 4}
SEANET = {"name": "seanet", "width": 4, "decoder_width": 4, "strides": [6, 4, 4], "dilations": [1, 3], "channels": 8}


def made(
    modality: str, net: dict[str, Any], preprocessing: dict[str, Any], device: str, name: str = "fsp"
) -> Tokenizer:
    torch.manual_seed(0)
    quantizer: dict[str, Any] = {"name": name, "codebook_size": 64}
    if name == "residual":
        quantizer = {"name": name, "num_quantizers": 2, "base": {"name": "fsq", "codebook_size": 64}}
    autoencoder = Autoencoder({"modality": modality, "net": {**net}, "quantizer": quantizer})
    tokenizer = Tokenizer(autoencoder.eval(), preprocessing)
    tokenizer.to(device)
    return tokenizer


@pytest.fixture(scope="module", params=DEVICES)
def images(request: pytest.FixtureRequest) -> Tokenizer:
    return made("image", VQGAN, {"short_side": 16, "color_rules": 2}, request.param)


@pytest.fixture(scope="module", params=DEVICES)
def audio(request: pytest.FixtureRequest) -> Tokenizer:
    return made("audio", SEANET, {}, request.param)


PIXELS = picture(24, 40)
GREY = PIXELS[:, :, 0]
RGBA = np.dstack([PIXELS, np.full((24, 40), 255, np.uint8)])
UNIT = PIXELS.astype(np.float32) / 255

READ: dict[
    str, tuple[Any, np.ndarray, dict[str, Any]]
] = {  # the input, the pixels of the PNG it equals, what is stated
    "PNG bytes": (encoded(PIXELS), PIXELS, {}),
    "a PIL image": (PIL.fromarray(PIXELS), PIXELS, {}),
    "a grey PIL image": (PIL.fromarray(GREY), GREY, {}),
    "uint8 HWC": (PIXELS, PIXELS, {}),
    "uint8 CHW": (PIXELS.transpose(2, 0, 1), PIXELS, {}),
    "uint8 HW": (GREY, GREY, {}),
    "uint8 HW1": (GREY[:, :, None], GREY, {}),
    "uint8 1HW": (GREY[None], GREY, {}),
    "uint8 HW4": (RGBA, RGBA, {}),
    "uint8 4HW": (RGBA.transpose(2, 0, 1), RGBA, {}),
    "uint8 not contiguous": (np.asfortranarray(PIXELS)[::-1][::-1], PIXELS, {}),
    "uint8 tensor CHW": (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS, {}),
    "float32 HWC in 0..1": (UNIT, PIXELS, {"value_range": (0, 1)}),
    "float64 HWC in 0..1": (PIXELS / 255, PIXELS, {"value_range": (0, 1)}),
    "float16 CHW in 0..1": (UNIT.astype(np.float16).transpose(2, 0, 1), PIXELS, {"value_range": (0, 1)}),
    "float32 in -1..1": (UNIT * 2 - 1, PIXELS, {"value_range": (-1, 1)}),
    "bfloat16 tensor of zeros and ones": (
        torch.from_numpy(PIXELS // 128).bfloat16().permute(2, 0, 1),
        PIXELS // 128 * 255,
        {"value_range": (0, 1)},
    ),
    "float32 in 0..255": (PIXELS.astype(np.float32), PIXELS, {"value_range": (0, 255)}),
    "float32 tensor CHW": (torch.from_numpy(UNIT).permute(2, 0, 1), PIXELS, {"value_range": (0, 1)}),
    "three columns, with its layout": (PIXELS[:, :3].transpose(2, 0, 1), PIXELS[:, :3], {"layout": "CHW"}),
    "three rows and columns, with its layout": (PIXELS[:3, :3], PIXELS[:3, :3], {"layout": "HWC"}),
}

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "float without a range": (UNIT, {}, r"needs value_range.*shape \(24, 40, 3\) and dtype float32 and values in 0"),
    "a wrong range": (UNIT * 255, {"value_range": (0, 1)}, r"value_range is \(0, 1\).*values in"),
    "an empty range": (UNIT, {"value_range": (1, 1)}, "finite, and the first below the second"),
    "an infinite range": (UNIT, {"value_range": (0, float("inf"))}, "finite, and the first below the second"),
    "one number for a range": (UNIT, {"value_range": 1}, r"value_range is 1; it must be two numbers"),
    "three numbers for a range": (UNIT, {"value_range": (0, 1, 2)}, "it must be two numbers"),
    "a range for a file": (
        encoded(PIXELS),
        {"value_range": (0, 1)},
        "value_range is for arrays; a file says it itself",
    ),
    "a rate for a file": (encoded(PIXELS), {"sample_rate": 5}, "sample_rate is for arrays"),
    "a layout for a PIL image": (PIL.fromarray(PIXELS), {"layout": "HWC"}, "layout is for arrays; a PIL image"),
    "a PIL mode that no file has": (PIL.fromarray(PIXELS).convert("HSV"), {}, "mode HSV cannot be stored; convert it"),
    "a range for uint8": (PIXELS, {"value_range": (0, 1)}, "dtype uint8, which is 0..255"),
    "NaN": (np.full((8, 8, 3), np.nan, np.float32), {"value_range": (0, 1)}, "NaN or infinity"),
    "int64": (PIXELS.astype(np.int64), {}, "must be uint8 or float.*dtype int64"),
    "uint16": (PIXELS.astype(np.uint16), {}, "dtype uint16"),
    "bool": (GREY > 9, {}, "dtype bool"),
    "both layouts fit": (PIXELS[:3, :3], {}, r"shape \(3, 3, 3\).*both HWC and CHW fit; state layout"),
    "two channels": (PIXELS[:, :, :2], {}, r"shape \(24, 40, 2\).*channels must be 1, 3 or 4"),
    "a layout that does not fit": (PIXELS, {"layout": "CHW"}, "the number of channels"),
    "an unknown layout": (PIXELS, {"layout": "NHWC"}, "choose one of: HWC, CHW"),
    "a vector": (PIXELS[0, :, 0], {}, r"\[H, W\].*shape \(40,\)"),
    "no pixels": (PIXELS[:0], {}, "the picture is empty"),
    "an object": ({"image": PIXELS}, {}, "dict is not a picture"),
    "a number": (3, {}, "int is not a picture"),
    "a sample rate": (PIXELS, {"sample_rate": 16_000}, "this tokenizer is for images"),
    "preprocessed floats": (UNIT, {"preprocessed": True}, r"is uint8 \[H, W, 3\].*float32"),
    "preprocessed bytes": (encoded(PIXELS), {"preprocessed": True}, "needs arrays, not bytes"),
}


@pytest.mark.parametrize("cell", READ)
def test_a_picture_in_memory_has_the_tokens_of_its_png(images: Tokenizer, cell: str):
    value, pixels, stated = READ[cell]
    preprocessed = images.modality.read(encoded(pixels)).array
    [expected] = images.encode_batch([preprocessed])
    found = images.encode(value, **stated)
    assert (found.dtype, found.shape) == (np.int64, expected.shape)
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 3


@pytest.mark.parametrize("cell", REFUSED)
def test_a_picture_that_could_mean_several_things_is_refused(images: Tokenizer, cell: str):
    value, stated, message = REFUSED[cell]
    with pytest.raises(ValueError, match=message):
        images.encode(value, **stated)


def test_files_of_other_kinds_have_the_tokens_of_their_bytes(images: Tokenizer, tmp_path: Path):
    for kind in ("jpeg", "webp", "gif"):
        data = encoded(PIXELS, kind)
        (tmp_path / f"x.{kind}").write_bytes(data)
        of_bytes = images(data)
        assert np.array_equal(images(tmp_path / f"x.{kind}"), of_bytes)
        assert np.array_equal(images(str(tmp_path / f"x.{kind}")), of_bytes)
        assert np.array_equal(images(PIL.open(io.BytesIO(data))), of_bytes)


def test_a_turned_jpeg_is_upright_as_a_pil_image_too(images: Tokenizer):
    exif = PIL.Exif()
    exif[0x0112] = 6
    data = encoded(PIXELS, "jpeg", exif=exif)
    assert images(data).shape == images(PIL.open(io.BytesIO(data))).shape == images(PIXELS).T.shape
    assert np.array_equal(images(data), images(PIL.open(io.BytesIO(data))))


def test_many_of_several_sizes_keep_their_order(images: Tokenizer):
    several = [picture(24, 40, 1), encoded(picture(40, 24, 2)), PIL.fromarray(picture(24, 40, 3)), picture(16, 16, 4)]
    together = images(several)
    assert [t.shape for t in together] == [images(one).shape for one in several]
    assert all(np.array_equal(t, images(one)) for t, one in zip(together, several, strict=True))
    batch = np.stack([picture(24, 40, 1), picture(24, 40, 3)])
    assert all(np.array_equal(t, together[i]) for t, i in zip(images(batch), (0, 2), strict=True))
    assert images([]) == []


def test_the_input_at_fault_is_numbered(images: Tokenizer):
    with pytest.raises(ValueError, match=r"input 1: an array of a picture must be uint8"):
        images([PIXELS, GREY > 9])
    with pytest.raises(BadSample, match="input 0: not a picture"):
        images([b"no picture"])


def test_preprocessed_pictures_are_not_resized_again(images: Tokenizer):
    array = images.modality.read(encoded(PIXELS)).array
    assert np.array_equal(images(array, preprocessed=True), images(PIXELS))
    assert images(PIXELS, preprocessed=True).shape > images(PIXELS).shape


# -- audio --------------------------------------------------------------------------------------------------------

RATE = 22_050
WAVE = (0.4 * np.sin(np.arange(9_000) / 17) + 0.2 * np.sin(np.arange(9_000) / 5)).astype(np.float32)
PCM = (WAVE * 32767).astype(np.int16)
STEREO = np.stack([WAVE, WAVE[::-1]])
SOUNDS: dict[str, tuple[Any, np.ndarray, str, dict[str, Any]]] = {  # the input, the samples and subtype of its wav
    "int16 T": (PCM, PCM, "PCM_16", {}),
    "float32 T": (WAVE, WAVE, "FLOAT", {}),
    "float64 T": (WAVE.astype(np.float64), WAVE.astype(np.float64), "DOUBLE", {}),
    "float16 T": (WAVE.astype(np.float16), WAVE.astype(np.float16).astype(np.float32), "FLOAT", {}),
    "float32 1T": (WAVE[None], WAVE, "FLOAT", {}),
    "float32 T1": (WAVE[:, None], WAVE, "FLOAT", {}),
    "bfloat16 tensor": (
        torch.from_numpy(WAVE).bfloat16(),
        torch.from_numpy(WAVE).bfloat16().float().numpy(),
        "FLOAT",
        {},
    ),
    "float32 CT": (STEREO, STEREO.T, "FLOAT", {}),
    "int16 tensor CT": (torch.from_numpy(PCM)[None], PCM, "PCM_16", {}),
    "float32 tensor CT": (torch.from_numpy(STEREO.copy()), STEREO.T, "FLOAT", {"value_range": (-1, 1)}),
}
REFUSED_SOUNDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no rate": (WAVE, {"sample_rate": None}, r"needs sample_rate.*shape \(9000,\) and dtype float32"),
    "no hertz": (WAVE, {"sample_rate": 0}, "whole Hz, not 0"),
    "half a hertz": (WAVE, {"sample_rate": 0.5}, "whole Hz, not 0.5"),
    "a rate in words": (WAVE, {"sample_rate": "22050"}, "whole Hz, not '22050'"),
    "a square": (STEREO[:, :2], {}, r"audio is \[C, T\].*shape \(2, 2\)"),
    "TC": (STEREO.T, {}, r"audio is \[C, T\].*shape \(9000, 2\).*transpose"),
    "int32": (PCM.astype(np.int32), {}, "dtype int32"),
    "uint8": (PCM.astype(np.uint8), {}, "dtype uint8"),
    "NaN": (np.full(4000, np.nan, np.float32), {}, "NaN or infinity"),
    "16-bit numbers as floats": (PCM.astype(np.float32), {}, "the floats may be in 16-bit units"),
    "empty": (WAVE[:0], {}, "not empty"),
    "a range": (WAVE, {"value_range": (0, 1)}, "for images"),
    "an object": (object(), {}, "object is not audio"),
    "preprocessed without a channel": (WAVE, {"preprocessed": True}, r"is float32 \[T, 1\]"),
    "preprocessed beyond 1": (3 * WAVE[:, None], {"preprocessed": True}, "in -1..1"),
}


def wav(samples: np.ndarray, subtype: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, RATE, format="WAV", subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize("cell", SOUNDS)
def test_audio_in_memory_has_the_tokens_of_its_wav(audio: Tokenizer, cell: str):
    value, samples, subtype, stated = SOUNDS[cell]
    [expected] = audio.encode_batch([audio.modality.read(wav(samples, subtype)).array])
    assert np.array_equal(audio.encode(value, sample_rate=RATE, **stated), expected)
    assert np.array_equal(audio.encode(wav(samples, subtype)), expected)


@pytest.mark.parametrize("cell", REFUSED_SOUNDS)
def test_audio_that_could_mean_several_things_is_refused(audio: Tokenizer, cell: str):
    value, stated, message = REFUSED_SOUNDS[cell]
    with pytest.raises(ValueError, match=message):
        audio.encode(value, **{"sample_rate": RATE, **stated})


def test_clips_of_several_lengths_keep_their_order(audio: Tokenizer):
    several = [WAVE, WAVE[:700], STEREO]
    together = audio(several, sample_rate=RATE)
    assert all(np.array_equal(t, audio(one, sample_rate=RATE)) for t, one in zip(together, several, strict=True))


# -- decoding -----------------------------------------------------------------------------------------------------


def test_without_sizes_a_sample_has_the_size_of_its_grid(images: Tokenizer, audio: Tokenizer):
    tokens = images(PIXELS)
    factor = images.autoencoder.factor
    found = images.decode(tokens)
    assert (found.dtype, found.shape) == (np.uint8, (tokens.shape[0] * factor, tokens.shape[1] * factor, 3))
    clip = audio(WAVE, sample_rate=RATE)
    assert audio.decode(clip).shape == (len(clip) * audio.autoencoder.factor, 1)


def test_with_its_size_a_sample_has_the_size_of_the_preprocessed_one(images: Tokenizer):
    tokens = images(picture(30, 45))
    assert images.decode(tokens, {"height": 30, "width": 45}).shape == (16, 24, 3)


def as_tensor(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens)


@pytest.mark.parametrize(
    "convert", [np.uint8, np.uint16, np.uint32, np.int64, as_tensor], ids=lambda kind: kind.__name__
)
def test_tokens_of_any_integer_type_are_decoded(images: Tokenizer, convert: Callable[[Any], Any]):
    tokens = images(PIXELS)
    assert np.array_equal(images.decode(convert(tokens)), images.decode(tokens))


def test_several_grids_are_decoded_in_order(images: Tokenizer):
    grids = images([PIXELS, picture(40, 24), picture(24, 40, 5)])
    together = images.decode(grids)
    assert all(np.array_equal(found, images.decode(grid)) for found, grid in zip(together, grids, strict=True))
    batch = images.decode(np.stack([grids[0], grids[2]]))
    assert np.array_equal(batch[1], together[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * 0 + 64, r"tokens are in 64\.\.64, but this tokenizer has 0\.\.63"),
        (lambda t: t - 100, r"tokens are in -\d+\.\.-\d+, but this tokenizer has 0"),
        (lambda t: t.astype(np.float32), "integers with 2 dimensions, and not empty; this array has .*float32"),
        (lambda t: t > 3, "dtype bool"),
        (lambda t: t[0], r"2 dimensions, and not empty; this array has shape \(\d+,\)"),
        (lambda t: t[None, None], "2 dimensions"),
        (lambda t: t[:0], "not empty; this array has shape"),
        (lambda t: t.astype(np.uint64) + np.uint64(2**63), r"tokens are in 92233720368547758\d\d"),
    ],
)
def test_what_are_no_tokens_is_refused(images: Tokenizer, change: Callable[[np.ndarray], np.ndarray], message: str):
    with pytest.raises(ValueError, match=message):
        images.decode(change(images(PIXELS)))


def test_sizes_must_be_as_many_as_grids(images: Tokenizer):
    with pytest.raises(ValueError, match="1 sizes for 2 grids"):
        images.decode([images(PIXELS)] * 2, [{"height": 24, "width": 40}])


@pytest.mark.parametrize("size", [{"height": 2400, "width": 2400}, {"height": 16, "width": 16}])
def test_sizes_of_another_sample_are_refused(images: Tokenizer, size: dict[str, int]):
    with pytest.raises(ValueError, match=r"does not belong to these tokens, whose grid is \(4, 7\), times 4"):
        images.decode(images(PIXELS), size)


def test_a_size_without_a_column_is_refused(images: Tokenizer):
    with pytest.raises(ValueError, match="lacks width"):
        images.decode(images(PIXELS), {"height": 24})


def test_decoded_audio_can_be_encoded_again(audio: Tokenizer):
    decoded = audio.decode(audio(WAVE, sample_rate=RATE))
    assert audio(decoded, sample_rate=16_000).shape == audio(WAVE, sample_rate=RATE).shape


def test_a_truncated_pil_image_is_a_bad_sample(images: Tokenizer):
    data = encoded(picture(200, 300), "jpeg")
    with pytest.raises(BadSample, match="truncated"):
        images(PIL.open(io.BytesIO(data[: len(data) // 2])))


def test_residual_tokens_have_one_more_dimension():
    residual = made("image", VQGAN, {}, "cpu", "residual")
    tokens = residual(PIXELS)
    assert tokens.shape == (2, 6, 10)
    assert residual.decode(tokens).shape == (24, 40, 3)
    assert len(residual.decode(np.stack([tokens, tokens]))) == 2
    with pytest.raises(ValueError, match="that of 2 quantizers"):
        residual.decode(tokens[:1])


def test_repr_says_what_the_tokenizer_is(images: Tokenizer):
    text = repr(images)
    assert (
        text
        == f"Tokenizer(image, fsp, K=64, factor={images.autoencoder.factor}, id={images.id}, device={images.device})"
    )
