"""The frozen tokenizer: its id is a hash of its content, and files that do not match are refused."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.corpus import encoded, picture
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.errors import BadSample, CodebookMissing, TokenizerMismatch
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.tokenizer import Tokenizer

TINY = {"name": "vqgan", "width": 8, "multipliers": [1, 2], "res_blocks": 1, "channels": 8, "attention": False}
DEMO = {**TINY, "width": 32, "multipliers": [1, 2, 2], "channels": 64, "patch_size": 2}
SMALL = {"codebook_size": 32, "dim": 4}  # for quantizers whose Config has these fields


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """For small nets, synchronising threads costs much more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def autoencoder(quantizer: str = "vp_vae", net: dict[str, Any] = TINY, seed: int = 0, **settings) -> Autoencoder:
    """A tokenizer with random weights; its codebook comes from one training step and fit on a few pictures."""
    torch.manual_seed(seed)
    known = {field.name for field in dataclasses.fields(QUANTIZERS.get(quantizer).Config)}
    settings = {"name": quantizer, **{key: size for key, size in SMALL.items() if key in known}, **settings}
    made = Autoencoder({"modality": "image", "net": net, "quantizer": settings})
    z = torch.stack(LatentEncoder(made, {}).latents([picture(112, 112, i) for i in range(6)]))
    made.quantizer.train()(z.clone())  # LatentEncoder has set eval mode, and z was made in inference mode
    made.quantizer.fit(z.flatten(0, -2))
    return made


def tokenizer(quantizer: str = "vp_vae", preprocessing: dict[str, Any] | None = None, **settings) -> Tokenizer:
    return Tokenizer(autoencoder(quantizer, **settings), preprocessing or {})


def pictures(height: int = 24, width: int = 40, count: int = 3) -> list[np.ndarray]:
    return [picture(height, width, seed) for seed in range(count)]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# -- bytes to tokens and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", QUANTIZERS.names())
def test_tokens_are_codes_in_the_shape_of_the_grid(quantizer: str):
    frozen = tokenizer(quantizer)
    num_quantizers = frozen.autoencoder.quantizer.num_quantizers
    shape = (12, 20) if num_quantizers == 1 else (num_quantizers, 12, 20)
    for tokens in frozen.encode_batch(pictures(24, 40)):
        assert (tokens.shape, tokens.dtype) == (shape, np.int64)
        assert 0 <= tokens.min() <= tokens.max() < frozen.codebook_size


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (13, 29), (17, 64), (3, 50), (64, 64)])
def test_decode_gives_back_the_original_size(height: int, width: int):
    frozen = tokenizer(net={**TINY, "multipliers": [1, 1, 2]})
    decoded = frozen.modality.read(encoded(picture(height, width)))
    [tokens] = frozen.encode_batch([decoded.array])
    [reconstruction] = frozen.decode([tokens], [decoded.size])
    assert tokens.shape == (-(-height // 4), -(-width // 4))
    assert (reconstruction.shape, reconstruction.dtype) == ((height, width, 3), np.uint8)


def test_decode_gives_the_size_after_preprocessing():
    frozen = tokenizer(preprocessing={"short_side": 16, "center_crop": True})
    decoded = frozen.modality.read(encoded(picture(30, 50)))
    [reconstruction] = frozen.decode(frozen.encode_batch([decoded.array]), [decoded.size])
    assert decoded.size == {"height": 30, "width": 50}
    assert reconstruction.shape == (16, 16, 3)


def test_decode_is_the_decoder_over_the_codes():
    frozen = tokenizer()
    tokens = np.random.default_rng(0).integers(32, size=(5, 7))
    x = frozen.autoencoder.reconstruct(frozen.autoencoder.quantizer.codebook[torch.from_numpy(tokens)][None])
    expected = (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    [reconstruction] = frozen.decode([tokens], [{"height": 10, "width": 14}])
    assert np.abs(reconstruction.astype(int) - expected).max() <= 1


def test_decode_takes_the_narrow_integers_of_a_token_shard():
    frozen = tokenizer()
    tokens = frozen.encode_batch(pictures())
    sizes = [{"height": 24, "width": 40}] * 3
    narrow = [grid.astype(np.uint8) for grid in tokens]
    assert same(frozen.decode(narrow, sizes), frozen.decode(tokens, sizes))


@pytest.mark.parametrize("token", [32, -1, 1000])
@pytest.mark.parametrize("quantizer", ["vp_vae", "vq_vae"])
def test_a_token_that_is_no_code_is_not_decoded(quantizer: str, token: int):
    with pytest.raises(ValueError, match=rf"tokens are in .*{token}.*, but this tokenizer has 0\.\.31"):
        tokenizer(quantizer).decode([np.array([[3, token]])], [{"height": 2, "width": 4}])


def test_other_latents_get_other_tokens():
    [tokens] = tokenizer().encode_batch(pictures(64, 64, 1))
    assert len(np.unique(tokens)) > 8


@pytest.mark.parametrize(
    "quantizer",
    [{"quantizer": "vp_vae", "codebook_size": 1024}, {"quantizer": "fsq", "codebook_size": 1024},
     {"quantizer": "vq_vae", "codebook_size": 1024, "dim": 16}],
)  # fmt: skip
@pytest.mark.parametrize("attention", [False, True])
def test_tokens_alone_and_in_a_batch_agree_but_for_ties(quantizer: dict[str, Any], attention: bool):
    """Another order of float32 sums moves a latent by 2e-6, which changes about one token in 50,000."""
    frozen = tokenizer(net={**DEMO, "attention": attention}, **quantizer)
    arrays = pictures(64, 64, 16)
    together = frozen.encode_batch(arrays)
    alone = [frozen.encode_batch([array])[0] for array in arrays]
    assert sum(int((a != b).sum()) for a, b in zip(together, alone, strict=True)) <= 1


def test_tokens_are_the_same_every_time():
    frozen = tokenizer(net=DEMO)
    assert same(frozen.encode_batch(pictures()), frozen.encode_batch(pictures()))


def test_freezing_ends_training():
    resnet = {"name": "resnet32", "channels": 16}  # its batch norms would reveal training mode
    expected = tokenizer(net=resnet).encode_batch(pictures())
    frozen = Tokenizer(autoencoder(net=resnet).train(), {})
    assert same(frozen.encode_batch(pictures()), expected)
    assert not any(module.training for module in frozen.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in frozen.autoencoder.parameters())


def test_padding_changes_only_tokens_near_it():
    frozen = tokenizer(net={"name": "resnet32", "channels": 16})  # no group norm, which depends on all pixels
    cut = pictures(61, 61, 1)[0]
    padded = np.pad(cut, ((0, 3), (0, 3), (0, 0)), mode="edge")
    assert same(frozen.encode_batch([cut]), frozen.encode_batch([padded]))


# -- refusals -----------------------------------------------------------------------------------------------------


def test_without_a_codebook_nothing_is_frozen_and_the_command_is_named():
    unfitted = Autoencoder({"modality": "image", "net": TINY, "quantizer": {"name": "vp_vae", "codebook_size": 32}})
    with pytest.raises(CodebookMissing, match="tokenmill codebook"):
        Tokenizer(unfitted, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_latents_are_a_bad_sample(value: float):
    frozen = tokenizer()
    frozen.autoencoder.project_in.bias.data[1] = value
    with pytest.raises(BadSample, match="NaN or infinite"):
        frozen.encode_batch(pictures())


def test_unknown_preprocessing_is_refused():
    with pytest.raises(TypeError, match="short_sid"):
        tokenizer(preprocessing={"short_sid": 16})


def test_a_quantizer_that_was_never_trained_is_not_frozen():
    untrained = Autoencoder({"modality": "image", "net": TINY, "quantizer": {"name": "vq_vae", "codebook_size": 32}})
    with pytest.raises(CodebookMissing, match="never trained"):
        Tokenizer(untrained, {})


# -- save and load ------------------------------------------------------------------------------------------------


def saved(frozen: Tokenizer, folder: Path) -> Path:
    frozen.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantizer", QUANTIZERS.names())
def test_a_tokenizer_survives_its_files(tmp_path: Path, quantizer: str):
    frozen = tokenizer(quantizer, preprocessing={"short_side": 20})
    loaded = Tokenizer.from_pretrained(saved(frozen, tmp_path))
    assert (loaded.id, loaded.codebook_id) == (frozen.id, frozen.codebook_id)
    assert loaded.preprocessing == frozen.preprocessing
    tokens, sizes = frozen.encode_batch(pictures(20, 40)), [{"height": 20, "width": 40}] * 3
    assert same(loaded.encode_batch(pictures(20, 40)), tokens)
    assert same(loaded.decode(tokens, sizes), frozen.decode(tokens, sizes))


def test_a_loaded_tokenizer_saves_the_same_files(tmp_path: Path):
    first = saved(tokenizer(), tmp_path / "first")
    second = saved(Tokenizer.from_pretrained(first), tmp_path / "second")
    assert sorted(f.name for f in first.iterdir()) == ["codebook.safetensors", "model.safetensors", "tokenizer.json"]
    assert all((second / f.name).read_bytes() == f.read_bytes() for f in first.iterdir())


def test_tokenizer_json_has_the_ids(tmp_path: Path):
    frozen = tokenizer(preprocessing={"short_side": 20})
    about = json.loads((saved(frozen, tmp_path) / "tokenizer.json").read_text())
    assert (about["tokenizer_id"], about["codebook_id"], about["codebook_size"]) == (frozen.id, frozen.codebook_id, 32)
    assert about["preprocessing"] == {"short_side": 20}
    assert about["index_order"] == "first dimension least significant"


@pytest.mark.parametrize("quantizer", QUANTIZERS.names())
def test_the_saved_codebook_is_what_the_decoder_sees(tmp_path: Path, quantizer: str):
    frozen = tokenizer(quantizer)
    table = load_file(saved(frozen, tmp_path) / "codebook.safetensors")["codebook"]
    assert torch.equal(table, frozen.autoencoder.quantizer.codebook)


def test_a_very_large_codebook_is_not_saved(tmp_path: Path):
    frozen = tokenizer("fsq", codebook_size=16**6, levels=[16] * 6)
    loaded = Tokenizer.from_pretrained(saved(frozen, tmp_path))
    assert "codebook" not in load_file(tmp_path / "codebook.safetensors")
    assert same(loaded.encode_batch(pictures()), frozen.encode_batch(pictures()))


def test_training_leaves_no_trace_in_the_files(tmp_path: Path):
    names = {*load_file(saved(tokenizer(), tmp_path) / "codebook.safetensors")}
    names |= {*load_file(tmp_path / "model.safetensors")}
    assert not any("queue" in name or "eta" in name for name in names)


def test_a_codebook_of_any_size_survives_its_files(tmp_path: Path):
    other = autoencoder()
    other.quantizer.fit(torch.randn(500, 4), codebook_size=50)
    loaded = Tokenizer.from_pretrained(saved(Tokenizer(other, {}), tmp_path))
    assert loaded.codebook_size == 50


# -- identity -----------------------------------------------------------------------------------------------------


def test_the_same_content_has_the_same_id():
    assert tokenizer().id == tokenizer().id


def test_id_changes_with_any_weight():
    ids = {tokenizer().id}
    for name in ("net.encoder.0.weight", "net.decoder.0.bias", "project_in.weight", "project_out.bias"):
        changed = autoencoder()
        parameter = changed.get_parameter(name)
        parameter.data.view(-1)[0] += 1e-3
        ids.add(Tokenizer(changed, {}).id)
    assert len(ids) == 5


def test_codebook_id_follows_the_codes_alone():
    frozen, other = tokenizer(), autoencoder()
    other.project_in.weight.data[0, 0] += 1e-3
    other_encoder = Tokenizer(other, {})
    assert (other_encoder.codebook_id == frozen.codebook_id, other_encoder.id == frozen.id) == (True, False)
    other = autoencoder()
    other.quantizer.table[0, 0] += 1e-3
    other_codes = Tokenizer(other, {})
    assert (other_codes.codebook_id == frozen.codebook_id, other_codes.id == frozen.id) == (False, False)


def test_id_changes_with_running_statistics():
    first, second = (autoencoder(net={"name": "resnet32", "channels": 16}) for _ in range(2))
    second.net.encoder[1].running_mean += 1e-3
    assert Tokenizer(first, {}).id != Tokenizer(second, {}).id


def test_id_changes_with_preprocessing():
    made = autoencoder()
    settings = [{}, {"short_side": 16}, {"short_side": 17}, {"short_side": 16, "center_crop": True}]
    assert len({Tokenizer(made, preprocessing).id for preprocessing in settings}) == 4


def test_id_changes_with_the_arithmetic_of_a_scalar_quantizer():
    ids = {tokenizer("fsq", edges=edges).id for edges in ("original", "symmetric")}
    assert len(ids) == 2


def test_id_does_not_depend_on_memory_format_device_or_order():
    made = autoencoder()
    settings = made.settings
    made.settings = {name: settings[name] for name in reversed(settings)}
    made._modules = dict(reversed(made._modules.items()))  # this also changes the state_dict
    ids = {Tokenizer(copy.deepcopy(made), {}).id, tokenizer().id}
    ids.add(Tokenizer(copy.deepcopy(made).to(memory_format=torch.channels_last), {}).id)
    ids.add(Tokenizer(copy.deepcopy(made).train(), {}).id)
    if torch.cuda.is_available():
        ids.add(Tokenizer(copy.deepcopy(made).to("cuda"), {}).id)
    assert len(ids) == 1


def test_id_does_not_depend_on_training_state():
    made = autoencoder()
    made.quantizer.queue.add(torch.randn(10, 4))
    made.quantizer.log_eta.fill_(0.5)
    assert Tokenizer(made, {}).id == tokenizer().id


# -- tampering ----------------------------------------------------------------------------------------------------


def change_tensor(file: Path, name: str | None = None) -> None:
    tensors = load_file(file)
    name = name or next(n for n, t in tensors.items() if t.is_floating_point() and n != "codebook")
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file)


@pytest.mark.parametrize("file", ["model.safetensors", "codebook.safetensors"])
def test_changed_weights_are_refused_by_the_id(tmp_path: Path, file: str):
    frozen = tokenizer()
    change_tensor(saved(frozen, tmp_path) / file)
    with pytest.raises(TokenizerMismatch, match=f"tokenizer.json has id {frozen.id}, but the other files do not match"):
        Tokenizer.from_pretrained(tmp_path)


def test_files_of_two_tokenizers_are_not_mixed(tmp_path: Path):
    saved(tokenizer(seed=0), tmp_path / "a")
    saved(tokenizer(seed=1), tmp_path / "b")
    (tmp_path / "b" / "codebook.safetensors").replace(tmp_path / "a" / "codebook.safetensors")
    with pytest.raises(TokenizerMismatch):
        Tokenizer.from_pretrained(tmp_path / "a")


def test_changed_preprocessing_is_refused(tmp_path: Path):
    file = saved(tokenizer(), tmp_path) / "tokenizer.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "preprocessing": {"short_side": 64}}))
    with pytest.raises(TokenizerMismatch):
        Tokenizer.from_pretrained(tmp_path)


def test_a_changed_codebook_is_refused(tmp_path: Path):
    change_tensor(saved(tokenizer(), tmp_path) / "codebook.safetensors", "codebook")
    with pytest.raises(TokenizerMismatch):
        Tokenizer.from_pretrained(tmp_path)


def test_weights_of_another_net_are_refused_by_their_names(tmp_path: Path):
    saved(tokenizer(), tmp_path / "a")
    saved(tokenizer(net={**TINY, "multipliers": [1, 2, 2]}), tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(TokenizerMismatch, match=r"missing|size mismatch|unexpected"):
        Tokenizer.from_pretrained(tmp_path / "a")


JSON_DAMAGE: dict[str, Callable[[dict], object]] = {
    "a list": lambda about: [about],
    "null": lambda about: None,
    "no model": lambda about: {name: value for name, value in about.items() if name != "model"},
    "no id": lambda about: {name: value for name, value in about.items() if name != "tokenizer_id"},
    "no preprocessing": lambda about: {name: value for name, value in about.items() if name != "preprocessing"},
    "model is a word": lambda about: {**about, "model": "vqgan"},
    "no net": lambda about: {**about, "model": {**about["model"], "net": None}},
    "unknown net": lambda about: {**about, "model": {**about["model"], "net": {"name": "gone"}}},
    "unknown setting": lambda about: {**about, "model": {**about["model"], "net": {**about["model"]["net"], "x": 1}}},
    "unknown quantizer": lambda about: {**about, "model": {**about["model"], "quantizer": {"name": "gone"}}},
    "negative codebook": lambda about: {
        **about, "model": {**about["model"], "quantizer": {**about["model"]["quantizer"], "codebook_size": -4}}
    },
    "unknown modality": lambda about: {**about, "model": {**about["model"], "modality": "smell"}},
    "preprocessing is a word": lambda about: {**about, "preprocessing": "none"},
    "schema_version is a word": lambda about: {**about, "schema_version": "1"},
    "no schema_version": lambda about: {name: value for name, value in about.items() if name != "schema_version"},
}  # fmt: skip


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, damage: str):
    file = saved(tokenizer(), tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(JSON_DAMAGE[damage](json.loads(file.read_text()))))
    with pytest.raises(TokenizerMismatch, match=r"tokenizer\.json (is damaged|has id)") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "codebook.safetensors", "model.safetensors"])
@pytest.mark.parametrize("content", ["empty", "cut", "noise", "one byte flipped in the header", "folder"])
def test_a_damaged_file_of_a_tokenizer_is_named(tmp_path: Path, file: str, content: str):
    path = saved(tokenizer(), tmp_path) / file
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    contents = {"empty": b"", "cut": data[: len(data) // 2], "noise": b"\xff\xfe" * 40}
    path.unlink()
    if content == "folder":
        path.mkdir()
    else:
        path.write_bytes(contents.get(content, data))
    with pytest.raises(TokenizerMismatch, match=f"{file} is damaged"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "codebook.safetensors", "model.safetensors"])
def test_a_missing_file_of_a_tokenizer_is_named(tmp_path: Path, file: str):
    (saved(tokenizer(), tmp_path) / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_with_a_newer_schema_is_refused(tmp_path: Path):
    file = saved(tokenizer(), tmp_path) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 2}))
    with pytest.raises(TokenizerMismatch, match=r"schema_version is 2; .*upgrade tokenmill"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_a_trained_model_is_named(tmp_path: Path, file: str):
    tokenizer().autoencoder.save(tmp_path)
    (tmp_path / file).write_bytes(b"{")
    with pytest.raises(TokenizerMismatch, match=f"{file} is damaged"):
        Autoencoder.load(tmp_path)
