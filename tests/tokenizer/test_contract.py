"""What every quantizer keeps, whatever its method: G1 to G8. A new one is tested by being in the registry."""

import copy
import dataclasses
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizer.quantizer import QUANTIZERS, Quantizer, QuantizerOutput, build_quantizer

SMALL = {"codebook_size": 64, "dim": 4}  # for each Config that has such a field
SPECIAL = {"vp_vae": {"latents_per_code": 16}}  # a queue of 1,024: full after TRAIN_STEPS, with latents waiting
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("vp_vae", {"eta": 1.0, "mh_steps": 2}),
    ("fsp", {"mixing": "vector", "activation": "normal"}),
    ("fsp", {"activation": "cauchy"}),
    ("fsq", {"edges": "original"}),
    ("fsq", {"noise_rate": 0.5}),
    ("vq_vae", {"gradient": "rotation"}),
]
CASES = [(name, {}) for name in QUANTIZERS.names()] + VARIANTS
TRAIN_STEPS = 7
all_cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])
)


def fresh(case: tuple[str, dict[str, Any]]) -> Quantizer:
    name, settings = case
    known = {field.name for field in dataclasses.fields(QUANTIZERS.get(name).Config)}
    small = {key: value for key, value in SMALL.items() if key in known}
    return build_quantizer({"name": name, **small, **SPECIAL.get(name, {}), **settings})


def trained(case: tuple[str, dict[str, Any]]) -> Quantizer:
    """Trained for a few steps and fitted, so that whatever state the method has is real. In train mode."""
    torch.manual_seed(0)
    quantizer = fresh(case)
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    for _ in range(TRAIN_STEPS):
        out = quantizer(torch.randn(256, quantizer.in_dim))
        loss = out.z_q.square().mean() + sum(out.losses.values(), torch.zeros(()))
        if optimizer and loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    quantizer.fit(torch.randn(2000, quantizer.in_dim), seed=0)
    return quantizer


def latents(quantizer: Quantizer, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, quantizer.in_dim, generator=torch.Generator().manual_seed(seed))


def train_outputs(quantizer: Quantizer, steps: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """All that a few further training steps put out, from one seed."""
    torch.manual_seed(5)
    quantizer.train()
    outs = [quantizer(latents(quantizer, 300, seed=10 + step).to(dtype)) for step in range(steps)]
    return [tensor.detach() for out in outs for tensor in tensors_of(out)]


def tensors_of(out: QuantizerOutput) -> list[Tensor]:
    indices = [] if out.indices is None else [out.indices]
    return [out.z_q, *indices, *out.losses.values(), *out.metrics.values()]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- shapes ---------------------------------------------------------------------------------------------------------


@all_cases
def test_leading_shape_is_kept(case):
    quantizer = trained(case)
    z = latents(quantizer, 2, 3, 5)
    for out in (quantizer.train()(z), quantizer.eval()(z)):
        assert out.z_q.shape == (2, 3, 5, quantizer.dim)
        assert out.indices is None or out.indices.shape == (2, 3, 5)
    assert quantizer.decode(quantizer.encode(z)).shape == (2, 3, 5, quantizer.dim)


@all_cases
def test_latents_of_other_width_are_refused(case):
    quantizer = fresh(case)
    with pytest.raises(ValueError, match=f"takes latents of {quantizer.in_dim} channels"):
        quantizer(torch.randn(3, quantizer.in_dim + 1))


# -- G1 to G4 -------------------------------------------------------------------------------------------------------


@all_cases
def test_g1_eval_is_deterministic_and_draws_no_random_number(case):
    quantizer = trained(case).eval()
    z = latents(quantizer, 500)
    before = torch.get_rng_state()
    assert_same(tensors_of(quantizer(z)), tensors_of(quantizer(z)))
    assert torch.equal(torch.get_rng_state(), before)


@all_cases
def test_g2_decode_of_encode_is_the_eval_output(case):
    quantizer = trained(case).eval()
    z = latents(quantizer, 500)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(z)), quantizer(z).z_q, rtol=0, atol=1e-6)
    assert torch.equal(quantizer.encode(z), quantizer(z).indices)


@all_cases
def test_g3_indices_are_int64_in_range_and_rows_of_the_codebook(case):
    quantizer = trained(case).eval()
    indices = quantizer.encode(3 * latents(quantizer, 2000))
    assert indices.dtype == torch.int64
    assert 0 <= int(indices.min()) < int(indices.max()) < quantizer.codebook_size
    assert quantizer.codebook.shape == (quantizer.codebook_size, quantizer.dim)
    assert torch.equal(quantizer.codebook[indices], quantizer.decode(indices))


@all_cases
def test_g4_a_latent_has_the_same_index_in_every_batch(case):
    quantizer = trained(case).eval()
    z = latents(quantizer, 500)
    parts = [quantizer.encode(part) for part in z.split([1, 36, 463])]
    assert torch.equal(torch.cat(parts), quantizer.encode(z))


# -- G5 and G6: state -----------------------------------------------------------------------------------------------


@all_cases
def test_g5_state_dict_reproduces_eval(case):
    quantizer, loaded = trained(case).eval(), fresh(case).eval()
    loaded.load_state_dict(quantizer.state_dict())
    z = latents(quantizer, 500)
    assert_same(tensors_of(loaded(z)), tensors_of(quantizer(z)))


@all_cases
def test_g5_state_dict_continues_training_as_if_never_stopped(case):
    quantizer, loaded = trained(case), fresh(case)
    loaded.load_state_dict(quantizer.state_dict())
    assert_same(train_outputs(loaded), train_outputs(quantizer))
    assert_same(list(loaded.state_dict().values()), list(quantizer.state_dict().values()))


@all_cases
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_g6_a_copy_trains_on_like_its_original(case, copied):
    quantizer = trained(case)
    train_outputs(quantizer, steps=1)  # whatever is cached between steps is there
    twin = copied(quantizer)
    assert_same(train_outputs(twin), train_outputs(quantizer))


@all_cases
def test_a_copy_shares_no_memory_with_its_original(case):
    quantizer = trained(case)
    before = [value.clone() for value in quantizer.state_dict().values()]
    train_outputs(copy.deepcopy(quantizer))
    assert_same(list(quantizer.state_dict().values()), before)


@all_cases
def test_eval_changes_no_state(case):
    quantizer = trained(case)
    before = [value.clone() for value in quantizer.state_dict().values()]
    quantizer.eval()(latents(quantizer, 500))
    quantizer.encode(latents(quantizer, 500))
    assert_same(list(quantizer.state_dict().values()), before)


@all_cases
def test_a_frozen_tokenizer_works_without_the_training_state(case):
    quantizer, frozen = trained(case), fresh(case)
    kept = {k: v for k, v in quantizer.state_dict().items() if not k.startswith(quantizer.training_state or ("-",))}
    missing, unexpected = frozen.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(key.startswith(quantizer.training_state) for key in missing)
    z = latents(quantizer, 500)
    assert torch.equal(frozen.encode(z), quantizer.encode(z))
    assert torch.equal(frozen.codebook, quantizer.codebook)


# -- G7: half precision ---------------------------------------------------------------------------------------------


@all_cases
def test_g7_autocast_changes_no_index(case):
    quantizer = trained(case).eval()
    z = latents(quantizer, 2000)
    expected = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(tensors_of(quantizer(z)), tensors_of(expected))
        assert torch.equal(quantizer.encode(z), expected.indices)
        assert torch.equal(quantizer.decode(expected.indices), expected.z_q)


@all_cases
def test_g7_autocast_changes_no_training_step(case):
    quantizer, twin = trained(case), trained(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = train_outputs(quantizer)
    assert_same(outputs, train_outputs(twin))


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_g7_half_precision_latents_get_the_indices_of_the_same_values_in_float32(case, dtype):
    quantizer = trained(case).eval()
    z = latents(quantizer, 2000).to(dtype)
    assert torch.equal(quantizer.encode(z), quantizer.encode(z.float()))
    assert quantizer(z).z_q.dtype == torch.float32
    assert_same(tensors_of(quantizer(z)), tensors_of(quantizer(z.float())))


# -- G8: odd batches ------------------------------------------------------------------------------------------------


@all_cases
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [
        lambda q: torch.empty(0, q.in_dim),
        lambda q: latents(q, 1),
        lambda q: torch.full((64, q.in_dim), 0.7),
        lambda q: torch.zeros(64, q.in_dim),
    ],
    ids=["none", "one", "equal", "zero"],
)
def test_g8_odd_batches_give_finite_outputs_losses_and_gradients(case, mode, make):
    quantizer = trained(case).train(mode == "train")
    z = make(quantizer).requires_grad_()
    out = quantizer(z)
    assert all(tensor.isfinite().all() for tensor in tensors_of(out))
    total = out.z_q.sum() + sum(out.losses.values(), torch.zeros(()))
    assert total.requires_grad or mode == "eval"
    if total.requires_grad:
        total.backward()
    gradients = [leaf.grad for leaf in (z, *quantizer.parameters()) if leaf.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@all_cases
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_g8_a_method_that_only_ever_saw_one_value_stays_finite(case, value):
    quantizer = fresh(case)
    z = torch.full((256, quantizer.in_dim), value)
    outs = [quantizer(z) for _ in range(TRAIN_STEPS)]
    quantizer.fit(z)
    outs.append(quantizer.eval()(z))
    assert all(tensor.isfinite().all() for out in outs for tensor in tensors_of(out))
    assert quantizer.codebook.isfinite().all()


# -- losses, fit, registry ------------------------------------------------------------------------------------------


@all_cases
def test_every_loss_has_a_default_weight_and_every_weight_a_loss(case):
    quantizer = trained(case)
    assert set(quantizer(latents(quantizer, 50)).losses) == set(quantizer.default_loss_weights)


@all_cases
def test_losses_are_scalars(case):
    quantizer = trained(case)
    assert all(loss.shape == () for loss in quantizer(latents(quantizer, 50)).losses.values())


@all_cases
def test_another_codebook_size_is_met_or_refused(case):
    quantizer = trained(case)
    size = quantizer.codebook_size
    refusal = None
    try:
        quantizer.fit(latents(quantizer, 500), codebook_size=size // 2)
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or f"codebook.size={size // 2}" in refusal
    assert len(quantizer.codebook) == quantizer.codebook_size == (size if refusal else size // 2)


@all_cases
def test_fit_is_reproducible_from_its_seed(case):
    first, second = trained(case), trained(case)
    points = latents(first, 1000)
    assert first.fit(points, seed=3) == second.fit(points, seed=3)
    assert torch.equal(first.codebook, second.codebook)


class Rounding(Quantizer):
    @dataclasses.dataclass
    class Config:
        codebook_size: int = 8

    def __init__(self, config: Any):
        super().__init__()
        self.codebook_size, self.dim, self.in_dim = config.codebook_size, 1, 1

    def _encode(self, z):
        return z[:, 0].round().long().clamp(0, self.codebook_size - 1)

    def _decode(self, indices):
        return indices[:, None].float()


def test_one_class_is_all_that_a_new_quantizer_takes(monkeypatch):
    monkeypatch.setattr(QUANTIZERS, "_classes", dict(QUANTIZERS._classes))
    QUANTIZERS.register("rounding")(Rounding)
    assert "rounding" in QUANTIZERS.names()
    out = build_quantizer({"name": "rounding", "codebook_size": 4}).eval()(
        torch.tensor([[[0.2], [2.6]], [[9.0], [-1.0]]])
    )
    assert out.indices.tolist() == [[0, 3], [3, 0]]
    assert out.z_q.tolist() == [[[0.0], [3.0]], [[3.0], [0.0]]]


def test_a_file_in_the_package_is_found_without_any_other_edit(tmp_path, monkeypatch):
    (tmp_path / "things").mkdir()
    (tmp_path / "thing.py").write_text(
        "from tokenizer.registry import Registry\nTHINGS = Registry('thing', 'things')\n"
    )
    (tmp_path / "things" / "__init__.py").touch()
    (tmp_path / "things" / "a.py").write_text("from thing import THINGS\n@THINGS.register('one')\nclass One: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = importlib.import_module("thing").THINGS
    assert registry.names() == ["one"]
    assert registry.get("one").name == "one"


def test_an_unknown_name_lists_the_names_and_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'fsq'.*fsp, fsq, .*vp_vae, vq_vae"):
        build_quantizer({"name": "fsqq"})


def test_a_taken_name_is_refused(monkeypatch):
    monkeypatch.setattr(QUANTIZERS, "_classes", dict(QUANTIZERS._classes))
    with pytest.raises(ValueError, match="'fsq' is already FSQ"):
        QUANTIZERS.register("fsq")(Rounding)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="codebok_size"):
        build_quantizer({"name": "fsq", "codebok_size": 64})
