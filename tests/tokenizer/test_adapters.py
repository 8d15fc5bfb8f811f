"""Imported tokenizers give the tokens of the families' own libraries, for each sample alone and in any batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, save
from tokenizer.adapters.base.adapter import ADAPTERS
from tokenizer.adapters.base.model import read_model
from tokenizer.adapters.base.windows import context_frames
from tokenizer.errors import TokenizerMismatch
from tokenizer.tokenizer import Tokenizer

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("diffusers", reason="needs the extra hf")

LENGTHS = (24 * 40, 24 * 40 + 7, 24 * 97 + 1, 24 * 5)  # samples of clips; not only whole tokens
SIDES = ((16, 16), (32, 16), (20, 24))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any, tmp_path_factory: Any) -> tuple[str, Any, Tokenizer, Path]:
    """(name, the library's model, the imported tokenizer, the model's folder)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    model = save(request.param, folder)
    return request.param, model, read_model(folder).freeze(), folder


def samples(modality: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if modality == "audio":
        return [rng.uniform(-0.5, 0.5, (length, 1)).astype(np.float32) for length in LENGTHS]
    return [rng.integers(0, 256, (*side, 3), dtype=np.uint8) for side in SIDES]


def as_input(name: str, array: np.ndarray) -> torch.Tensor:
    """A sample as the library's own processor makes it: [1, 1, T], or [1, 3, H, W] in -1..1."""
    if FAMILIES[name].modality == "audio":
        x = torch.from_numpy(array).T[None]
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % FAMILIES[name].multiple))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def test_every_adapter_is_tested():
    assert ADAPTERS.names() == sorted(FAMILIES)


@torch.inference_mode()
def test_tokens_of_a_sample_are_those_of_the_library(family: Any):
    name, model, tokenizer, _ = family
    for array in samples(FAMILIES[name].modality):
        expected = FAMILIES[name].tokens(model, as_input(name, array))
        np.testing.assert_array_equal(tokenizer.encode_batch([array])[0], expected)
        assert len(np.unique(expected)) > 3, "a test with one token proves nothing"


def test_tokens_do_not_depend_on_the_batch(family: Any):
    name, _, tokenizer, _ = family
    arrays = samples(FAMILIES[name].modality)
    alone = [tokenizer.encode(array, preprocessed=True) for array in arrays]
    for order in (arrays, arrays[::-1], [arrays[0]] * 3 + arrays):
        for array, tokens in zip(order, tokenizer.encode(list(order), preprocessed=True), strict=True):
            [number] = [i for i, one in enumerate(arrays) if one is array]
            np.testing.assert_array_equal(tokens, alone[number])


@torch.inference_mode()
def test_decoded_samples_are_those_of_the_library(family: Any):
    name, model, tokenizer, _ = family
    if FAMILIES[name].decoded is None:
        pytest.skip(f"the library has no decoder of {name}")
    array = samples(FAMILIES[name].modality)[0]
    [tokens] = tokenizer.encode_batch([array])
    expected = FAMILIES[name].decoded(model, torch.from_numpy(tokens))[0]
    decoded = tokenizer.decode(tokens, tokenizer.modality.size_of(array))
    assert decoded.shape == array.shape
    if FAMILIES[name].modality == "image":
        expected = ((expected.clamp(-1, 1) + 1) / 2 * 255).round()
        assert np.abs(decoded.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
    else:
        expected = torch.nn.functional.pad(expected, (0, len(array) - expected.shape[-1]))
        np.testing.assert_allclose(decoded.T, expected.clamp(-1, 1).numpy(), atol=1e-5)


def test_a_saved_tokenizer_is_the_same(family: Any, tmp_path: Path):
    name, _, tokenizer, folder = family
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.id == tokenizer.id == read_model(folder).freeze().id
    array = samples(FAMILIES[name].modality)[1]
    np.testing.assert_array_equal(again.encode_batch([array])[0], tokenizer.encode_batch([array])[0])


def test_other_weights_give_another_id(family: Any, tmp_path: Path):
    name, _, tokenizer, _ = family
    save(name, tmp_path, seed=1)
    assert read_model(tmp_path).freeze().id != tokenizer.id


def test_the_codebook_holds_what_the_decoder_sees(family: Any):
    """The sum of the chosen rows is the code, up to rounding."""
    _, _, tokenizer, _ = family
    quantizer = tokenizer.autoencoder.quantizer
    count = quantizer.num_quantizers
    indices = torch.randint(quantizer.codebook_size, (50, count), generator=torch.Generator().manual_seed(0))
    tables = quantizer.codebook.reshape(count, quantizer.codebook_size, -1)
    expected = sum(tables[q][indices[:, q]] for q in range(count))
    torch.testing.assert_close(quantizer.decode(indices if count > 1 else indices[:, 0]), expected)


@pytest.mark.parametrize("name", ["encodec", "dac", "mimi"])
def test_the_first_quantizers_give_the_first_tokens(name: str, tmp_path: Path):
    save(name, tmp_path)
    every, two = read_model(tmp_path).freeze(), read_model(tmp_path).freeze(2)
    array = samples("audio")[0]
    np.testing.assert_array_equal(two.encode_batch([array])[0], every.encode_batch([array])[0][:2])
    assert two.id != every.id
    assert two.decode(two.encode_batch([array])[0]).shape == (960, 1)


def test_the_windows_of_dac_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save("dac", tmp_path)
    tokenizer = read_model(tmp_path).freeze()
    array = np.random.default_rng(0).uniform(-0.5, 0.5, (24 * 1000, 1)).astype(np.float32)
    monkeypatch.setattr("tokenizer.adapters.base.windows.WINDOW_FRAMES", 10_000)
    [latents], [whole] = tokenizer.latents([array]), tokenizer.encode_batch([array])
    decoded = tokenizer.decode(whole)
    monkeypatch.setattr("tokenizer.adapters.base.windows.WINDOW_FRAMES", 100)
    torch.testing.assert_close(tokenizer.latents([array])[0], latents, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(tokenizer.encode_batch([array])[0], whole)
    np.testing.assert_allclose(tokenizer.decode(whole), decoded, atol=1e-5)


def test_a_frame_depends_on_nothing_beyond_the_context(tmp_path: Path):
    """By the gradient: the true receptive field of DAC's encoder is within the bound, and more than half of it."""
    save("dac", tmp_path)
    net = read_model(tmp_path).freeze().autoencoder.net.model.encoder
    context = context_frames(net, 24, decoder=False)
    x = torch.randn(1, 1, 24 * 201, requires_grad=True, generator=torch.Generator().manual_seed(0))
    net(x)[0, :, 100].sum().backward()
    [reached] = torch.nonzero(x.grad.abs().sum(dim=(0, 1)) > 0, as_tuple=True)
    before, after = 100 - int(reached[0]) / 24, int(reached[-1]) / 24 - 101
    assert max(before, after) <= context
    assert before + after > context / 2


def test_a_pickled_model_is_refused(tmp_path: Path):
    model = save("encodec", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a format that can run code"):
        read_model(tmp_path).freeze()


def test_an_unknown_family_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"the model is 'bert'; tokenmill imports: VQModel, .*encodec"):
        read_model(tmp_path).freeze()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "encodec", "hidden_size": "many"}'])
def test_a_damaged_config_is_named(tmp_path: Path, text: str):
    save("encodec", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((TokenizerMismatch, ValueError), match=r"config.json"):
        read_model(tmp_path).freeze()


def test_a_damaged_weight_file_is_named(tmp_path: Path):
    save("encodec", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TokenizerMismatch, match=r"is damaged"):
        read_model(tmp_path).freeze()


def test_a_model_that_normalises_chunks_is_refused(tmp_path: Path):
    from transformers import EncodecConfig, EncodecModel

    small = {"num_filters": 2, "hidden_size": 8, "codebook_dim": 8, "codebook_size": 4, "num_lstm_layers": 1}
    EncodecModel(EncodecConfig(**small, normalize=True, chunk_length_s=1.0, overlap=0.01)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"divides each chunk by its loudness"):
        read_model(tmp_path).freeze()


def test_another_sample_rate_is_refused(tmp_path: Path):
    save("encodec", tmp_path)
    with pytest.raises(ValueError, match=r"sample_rate is 16000; this model needs 24000"):
        read_model(tmp_path).freeze(preprocessing={"sample_rate": 16000})


def test_too_many_quantizers_are_refused(tmp_path: Path):
    save("dac", tmp_path)
    with pytest.raises(ValueError, match=r"num_quantizers is 5; this dac model has 1 to 4"):
        read_model(tmp_path).freeze(5)


def test_the_picture_tokenizer_of_a_large_model_is_found(tmp_path: Path):
    """config.json of Janus holds the tokenizer's in vq_config, and its tensors have the prefix model.vqmodel."""
    from safetensors.torch import load_file, save_file

    save("janus", tmp_path / "alone")
    (tmp_path / "large").mkdir()
    config = json.loads((tmp_path / "alone/config.json").read_text())
    (tmp_path / "large/config.json").write_text(json.dumps({"model_type": "janus", "vq_config": config}))
    tensors = load_file(tmp_path / "alone/model.safetensors")
    parts = [{f"model.vqmodel.{key}": t for key, t in tensors.items()}, {"model.language_model.norm": torch.ones(3)}]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"large/model-{number}.safetensors")
    assert read_model(tmp_path / "large").freeze().id == read_model(tmp_path / "alone").freeze().id
