"""The contract G1 to G8 for every registered quantizer, and for every file in configs/quantizers with small sizes."""

import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput, build_quantizer

CONFIGS = Path(__file__).parents[2] / "configs"
METHOD_FILES = sorted((CONFIGS / "quantizers").glob("*.yaml"))
SMALL = {"codebook_size": 64, "dim": 4}  # for each Config that has these fields
SPECIAL: dict[str, dict[str, Any]] = {
    "vp_vae": {"latents_per_code": 16},  # a queue of 1,024: full after TRAIN_STEPS, with latents waiting
    "token_bridge": {"dim": 0},  # derived from 64 codes
}
# What each method promises. Residual and product promise the same as their base
ENCODES_UNTRAINED = {"bsq", "fsp", "fsq", "lfq"}  # their codes are fixed
NEEDS_FIT = {"token_bridge", "vp_vae"}  # their codebook is made by `fit`
FITS_ANY_SIZE = {"vp_vae"}
CHOOSES_CODES_IN_TRAINING = {"bsq", "ema_vq", "fsq", "ibq", "lfq", "sim_vq", "vq_vae"}  # except fsq with noise
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("vp_vae", {"eta": "auto", "mh_steps": 2, "balance": 0.0}),
    ("fsp", {"mixing": "vector", "activation": "normal"}),
    ("fsp", {"activation": "cauchy"}),
    ("fsp", {"activation": "laplace", "inverse_activation": True}),
    ("fsq", {"edges": "original"}),
    ("fsq", {"noise_rate": 0.5}),
    ("vq_vae", {"l2": True, "replace_after": 2}),
    ("vq_vae", {"l2": True, "replace_after": 2, "affine": 10.0, "alternating_lr": 50.0, "gradient": "rotation"}),
    ("vq_vae", {"affine": 10.0, "sync_nu": 2.0}),
    ("sq_vae", {"theta_start": -2.0, "theta_lr": 20.0}),
    ("gm_vq", {"beta": 5.0}),
    ("vp_vae", {"update_probability": 0.01}),
    ("ema_vq", {"revive_below": 2.0}),
    ("gumbel", {"hard": True}),
    ("residual", {"base": {"name": "fsp"}}),
    ("residual", {"base": {"name": "vp_vae", "latents_per_code": 16}}),
    ("residual", {"base": {"name": "vq_vae", "replace_after": 2}, "dropout": True}),
    ("product", {"base": {"name": "residual", "base": {"name": "fsp"}, "num_quantizers": 2, "dropout": True}}),
    ("product", {"base": {"name": "vp_vae", "latents_per_code": 16}}),
    ("product", {"base": {"name": "gm_vq"}, "groups": 4}),  # the base reads more channels than it outputs
    ("residual", {"base": {"name": "ema_vq", "revive_below": 2.0}, "dropout": True}),
]
TRAIN_STEPS = 7


@dataclasses.dataclass
class Case:
    """One configuration of one method, with small sizes."""

    label: str
    name: str
    settings: dict[str, Any]

    @property
    def method(self) -> str:
        """The name of the method, or of the innermost base of residual and product."""
        return self.method_settings["name"]

    @property
    def method_settings(self) -> dict[str, Any]:
        settings = {"name": self.name, **dataclasses.asdict(self.config)}
        while "base" in settings:
            base = QUANTIZERS.get(settings["base"]["name"])
            defaults = dataclasses.asdict(base.Config())  # type: ignore[call-overload]
            settings = {**defaults, **settings["base"]}
        return settings

    @property
    def config(self) -> Any:
        return QUANTIZERS.get(self.name).Config(**self.settings)


def case_of(name: str, given: dict[str, Any], label: str = "") -> Case:
    known = {field.name for field in dataclasses.fields(QUANTIZERS.get(name).Config)}
    small = {key: value for key, value in SMALL.items() if key in known}
    label = label or "-".join([name, *(f"{key}={value}" for key, value in given.items())])
    return Case(label, name, {**given, **small, **SPECIAL.get(name, {})})


def case_of_file(file: Path) -> Case:
    """The configuration of a run of 100 steps."""
    config = OmegaConf.merge({"train": {"steps": 100}}, OmegaConf.load(file))
    settings = OmegaConf.to_container(config, resolve=True)["quantizer"]  # type: ignore[call-overload, index]
    return case_of(settings.pop("name"), settings, file.name)


def all_distinct(cases: list[Case]) -> list[Case]:
    """Drops cases that differ only in their label."""
    distinct: dict[str, Case] = {}
    for case in cases:
        distinct.setdefault(f"{case.name} {case.config}", case)
    return list(distinct.values())


NAMED = [case_of(name, {}) for name in QUANTIZERS.names()]
CASES = all_distinct([*NAMED, *(case_of(*variant) for variant in VARIANTS), *map(case_of_file, METHOD_FILES)])
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """For small tensors, synchronising threads costs much more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(case: Case) -> Quantizer:
    return build_quantizer({"name": case.name, **case.settings})


def unfitted(case: Case) -> Quantizer:
    """A quantizer trained for a few steps, in train mode."""
    return _copy_of(case.label, False)


def trained(case: Case) -> Quantizer:
    """A quantizer trained for a few steps and fitted, so that all of its state is realistic. In train mode."""
    return _copy_of(case.label, True)


def _copy_of(label: str, fit: bool) -> Quantizer:
    torch.manual_seed(0)
    return pickle.loads(_pickled(label, fit))


@functools.cache
def _pickled(label: str, fit: bool) -> bytes:
    """Cached, because training takes longer than most tests."""
    quantizer = fresh(next(case for case in CASES if case.label == label))
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    for _ in range(TRAIN_STEPS):
        out = quantizer(torch.randn(256, quantizer.in_dim))
        loss = out.z_q.square().mean() + sum(out.losses.values(), torch.zeros(()))
        if optimizer and loss.requires_grad:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    if fit:
        quantizer.fit(torch.randn(2000, quantizer.in_dim), seed=0)
    quantizer.zero_grad(set_to_none=True)
    return pickle.dumps(quantizer)


def several(quantizer: Quantizer) -> tuple[int, ...]:
    """The last axis of indices and the first of the codebook: (Q,), or () for one quantizer."""
    return (quantizer.num_quantizers,) if quantizer.num_quantizers > 1 else ()


def latents(quantizer: Quantizer, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, quantizer.in_dim, generator=torch.Generator().manual_seed(seed))


def train_outputs(quantizer: Quantizer, steps: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """All outputs of a few more training steps, from a fixed seed."""
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
    in_training, in_eval = quantizer.train()(z), quantizer.eval()(z)
    assert in_training.z_q.shape == in_eval.z_q.shape == (2, 3, 5, quantizer.dim)
    assert in_eval.indices.shape == (2, 3, 5, *several(quantizer))
    chooses = case.method in CHOOSES_CODES_IN_TRAINING and not case.settings.get("noise_rate")
    expected = (2, 3, 5, *several(quantizer)) if chooses else None
    assert (None if in_training.indices is None else in_training.indices.shape) == expected
    assert quantizer.encode(z).shape == (2, 3, 5, *several(quantizer))
    assert quantizer.decode(quantizer.encode(z)).shape == (2, 3, 5, quantizer.dim)


@all_cases
def test_latents_of_other_width_are_refused(case):
    quantizer = fresh(case)
    with pytest.raises(ValueError, match=f"needs latents of {quantizer.in_dim} channels"):
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
    codebook, size = quantizer.codebook, (quantizer.codebook_size, quantizer.dim)
    assert codebook.shape == (*several(quantizer), *size)
    if several(quantizer):  # the sum of the codes of all quantizers
        codes = codebook[torch.arange(quantizer.num_quantizers), indices].sum(dim=-2)
        torch.testing.assert_close(quantizer.decode(indices), codes, rtol=0, atol=1e-6)
    else:
        assert torch.equal(quantizer.decode(indices), codebook[indices])


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
def test_g6_a_copy_continues_training_like_its_original(case, copied):
    quantizer = trained(case)
    train_outputs(quantizer, steps=1)  # fills all caches between steps
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


odd_batches = pytest.mark.parametrize(
    "make",
    [
        lambda q: torch.empty(0, q.in_dim),
        lambda q: latents(q, 1),
        lambda q: torch.full((64, q.in_dim), 0.7),
        lambda q: torch.zeros(64, q.in_dim),
    ],
    ids=["none", "one", "equal", "zero"],
)


@all_cases
@odd_batches
def test_g8_odd_batches_give_finite_outputs_in_eval(case, make):
    quantizer = trained(case).eval()
    assert all(tensor.isfinite().all() for tensor in tensors_of(quantizer(make(quantizer))))


@all_cases
@odd_batches
def test_g8_odd_batches_give_finite_outputs_losses_and_gradients_in_training(case, make):
    quantizer = trained(case)
    z = make(quantizer).requires_grad_()
    out = quantizer(z)
    assert all(tensor.isfinite().all() for tensor in tensors_of(out))
    (out.z_q.sum() + sum(out.losses.values(), torch.zeros(()))).backward()
    gradients = [leaf.grad for leaf in (z, *quantizer.parameters()) if leaf.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@all_cases
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_g8_a_method_trained_only_on_equal_latents_stays_finite(case, value):
    quantizer = fresh(case)
    z = torch.full((256, quantizer.in_dim), value)
    outs = [quantizer(z) for _ in range(TRAIN_STEPS)]
    quantizer.fit(z)
    outs.append(quantizer.eval()(z))
    assert all(tensor.isfinite().all() for out in outs for tensor in tensors_of(out))
    assert quantizer.codebook.isfinite().all()


# -- before and after fit -------------------------------------------------------------------------------------------


def only(condition: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Parametrizes a test by the cases that meet a condition."""
    return pytest.mark.parametrize("case", list(filter(condition, CASES)), ids=lambda case: case.label)


def calls_that_need_codes(quantizer: Quantizer) -> list[Callable[[], Tensor]]:
    z, index = latents(quantizer, 50), torch.zeros(3, *several(quantizer), dtype=torch.int64)
    return [
        lambda: quantizer.encode(z),
        lambda: quantizer.decode(index),
        lambda: quantizer.codebook,
        lambda: quantizer.code_shares(z),
    ]


@only(lambda case: case.method in ENCODES_UNTRAINED)
def test_fixed_codes_do_not_depend_on_the_seed(case):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        quantizer = fresh(case)
        results.append([call() for call in calls_that_need_codes(quantizer)])
    assert_same(*results)


@only(lambda case: case.method not in ENCODES_UNTRAINED)
def test_without_training_there_is_no_codebook(case):
    for call in calls_that_need_codes(fresh(case).eval()):
        with pytest.raises(CodebookMissing):
            call()


@only(lambda case: case.method in NEEDS_FIT)
def test_before_fit_there_is_no_codebook(case):
    for call in calls_that_need_codes(unfitted(case).eval()):
        with pytest.raises(CodebookMissing):
            call()


@only(lambda case: case.method not in NEEDS_FIT)
def test_codes_that_were_learned_or_fixed_are_the_same_before_and_after_fit(case):
    before, after = unfitted(case).eval(), trained(case).eval()
    assert_same([call() for call in calls_that_need_codes(before)], [call() for call in calls_that_need_codes(after)])


@all_cases
def test_a_method_states_whether_it_fits_any_size(case):
    assert fresh(case).fits_any_size == (case.method in FITS_ANY_SIZE)


@only(lambda case: case.method in FITS_ANY_SIZE)
@pytest.mark.parametrize("factor", [0.5, 2])
def test_fit_makes_another_number_of_codes(case, factor):
    quantizer = trained(case)
    size = int(factor * quantizer.codebook_size)
    quantizer.fit(latents(quantizer, 500), codebook_size=size)
    assert quantizer.codebook.shape[-2] == quantizer.codebook_size == size
    assert int(quantizer.encode(latents(quantizer, 500)).max()) < size


@only(lambda case: case.method not in FITS_ANY_SIZE)
def test_fit_refuses_another_number_of_codes_and_changes_nothing(case):
    quantizer = trained(case)
    size, before = quantizer.codebook_size, quantizer.codebook
    with pytest.raises(ValueError, match=f"codebook.size is {size // 2}, but .* was trained with {size} codes"):
        quantizer.fit(latents(quantizer, 500), codebook_size=size // 2)
    assert quantizer.codebook_size == size
    assert torch.equal(quantizer.codebook, before)


@all_cases
def test_fit_is_reproducible_from_its_seed(case):
    first, second = trained(case), trained(case)
    points = latents(first, 1000)
    assert first.fit(points, seed=3) == second.fit(points, seed=3)
    assert torch.equal(first.codebook, second.codebook)


# -- losses and reports ---------------------------------------------------------------------------------------------


@all_cases
def test_every_loss_has_a_default_weight_and_every_weight_a_loss(case):
    quantizer = trained(case)
    assert set(quantizer(latents(quantizer, 50)).losses) == set(quantizer.default_loss_weights)


@all_cases
def test_losses_are_scalars(case):
    quantizer = trained(case)
    assert all(loss.shape == () for loss in quantizer(latents(quantizer, 50)).losses.values())


@all_cases
@pytest.mark.parametrize("shape", [(1,), (500,), (2, 3, 5)])
def test_code_shares_are_a_distribution_over_the_codes(case, shape):
    quantizer = trained(case).eval()
    z, before = latents(quantizer, *shape), torch.get_rng_state()
    shares = quantizer.code_shares(z)
    assert shares.shape == (*several(quantizer), quantizer.codebook_size)
    assert shares.isfinite().all()
    assert shares.min() >= 0
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(several(quantizer)), rtol=0, atol=1e-5)
    assert torch.equal(quantizer.code_shares(z), shares)
    assert torch.equal(torch.get_rng_state(), before)


@all_cases
def test_levels_of_an_index_multiply_to_the_codebook_size(case):
    quantizer = fresh(case)
    assert math.prod(quantizer.index_levels) == (quantizer.codebook_size if quantizer.index_levels else 1)


@all_cases
def test_overwritten_rows_are_rows_of_parameters(case):
    quantizer, found = unfitted(case), []
    for step in range(3):
        quantizer(5 + step + latents(quantizer, 20))
        found += quantizer.overwritten_rows().items()
    for name, rows in found:
        assert rows.dtype == torch.int64
        assert 0 <= int(rows.min()) <= int(rows.max()) < len(quantizer.get_parameter(name))
    replaces = 0 < case.method_settings.get("replace_after", 0) <= TRAIN_STEPS
    assert bool(found) == replaces
