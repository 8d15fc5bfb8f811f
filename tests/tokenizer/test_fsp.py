"""FSP: tests P1 to P6 of the method, its five activations and its two ways of mixing.

Legend: a latents, p = cdf(a) in (0, 1), L levels of a dimension; the decoder sees (p - 1/2) * sqrt(12).
"""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from tokenizer.quantizers.base.quantizer import build_quantizer
from tokenizer.quantizers.fsp import ACTIVATIONS, FSP, FSPConfig
from tokenizer.quantizers.fsq import FSQ, FSQConfig

PAPER = [8, 5, 5, 5]
LAWS = {
    "tanh": stats.logistic(scale=0.5),
    "sigmoid": stats.logistic(),
    "normal": stats.norm(),
    "laplace": stats.laplace(),
    "cauchy": stats.cauchy(),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(levels: list[int] = PAPER, **settings) -> FSP:
    return FSP(FSPConfig(levels=levels, **settings))


def latents_of(p: Tensor) -> Tensor:
    """The latents that tanh, the default activation, maps to p. Computed in float64."""
    return torch.atanh(2 * p.double() - 1).float()


def seen_p(quantizer: FSP, a: Tensor) -> Tensor:
    """p at the decoder's input, in the current mode of the quantizer."""
    return quantizer(a).z_q / math.sqrt(12) + 0.5


def even_p(count: int = 120_000) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def reference_eval(a: np.ndarray, levels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.3 of the paper in float64 numpy: index and output of each latent, for tanh."""
    p = (np.tanh(a.astype(np.float64)) + 1) / 2
    cell = np.clip(np.floor(np.array(levels) * p), 0, np.array(levels) - 1)
    index = np.ravel_multi_index(tuple(cell.astype(int).T), levels, order="F")
    return index, ((cell + 0.5) / np.array(levels) - 0.5) / np.sqrt(1 / 12)


# -- P1 to P6 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 5, 8, 16])
def test_p1_error_on_uniform_p_is_that_of_equal_cells(levels):
    error = (seen_p(make([levels]).eval(), latents_of(even_p())[:, None])[:, 0] - even_p()).square().mean()
    assert float(error) == pytest.approx(1 / (12 * levels**2), rel=0.005)


def test_p1_uniform_p_uses_all_codes_equally():
    quantizer = make([8, 6, 5])
    counts = torch.bincount(quantizer.encode(latents_of(torch.rand(400_000, 3))), minlength=240).double()
    usage = torch.special.entr(counts / counts.sum()).sum().exp() / 240
    assert float(usage) > 0.999  # a perfect quantizer has 1 - 239 / 800,000


@pytest.mark.parametrize("levels", range(3, 9))
def test_p2_symmetric_fsq_errs_more_by_l_over_l_minus_1_squared(levels):
    """2.25, 1.78, 1.56, 1.44, 1.36, 1.31 for L = 3..8."""
    a = latents_of(even_p())[:, None]
    fsp = (seen_p(make([levels]).eval(), a)[:, 0] - even_p()).square().mean()
    fsq = ((FSQ(FSQConfig(levels=[levels])).eval()(a).z_q[:, 0] + 1) / 2 - even_p()).square().mean()
    assert float(fsq / fsp) == pytest.approx((levels / (levels - 1)) ** 2, rel=0.005)


@pytest.mark.parametrize("mixing", ["element", "vector"])
@pytest.mark.parametrize("quantize_rate", [0.0, 0.5, 1.0])
def test_p3_training_moves_p_by_at_most_half_a_cell(mixing, quantize_rate):
    p, levels = torch.rand(50_000, 4), torch.tensor(PAPER)
    moved = seen_p(make(mixing=mixing, quantize_rate=quantize_rate), latents_of(p))
    ratio = (moved - p).abs() * 2 * levels
    assert 0.99 < float(ratio.max()) < 1 + 1e-4
    assert moved.min() > 0
    assert moved.max() < 1


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_eta_scales_the_perturbation(eta):
    p = 0.3 + 0.4 * torch.rand(50_000, 4)
    moved = seen_p(make(quantize_rate=0.0, eta=eta), latents_of(p))
    ratio = (moved - p).abs() * 2 * torch.tensor(PAPER)
    assert float(ratio.max()) == pytest.approx(eta, rel=0.01)
    assert float(ratio.mean()) == pytest.approx(eta / 2, rel=0.01)


@pytest.mark.parametrize("levels", [PAPER, [8, 6, 5]])
def test_p3_acceptance_of_normal_latents_is_that_of_theory(levels):
    """Compared to numeric integration: at p < 1/2L a step leaves (0, 1) with probability 1/2 - L p. .938 and .943."""
    law = stats.norm(loc=0, scale=1)

    def rejected(level: int) -> float:
        edge = np.arctanh(1 / level - 1)
        return 2 * integrate.quad(lambda a: (0.5 - level * (np.tanh(a) + 1) / 2) * law.pdf(a), -8, edge)[0]

    found = make(levels)(torch.randn(100_000, len(levels))).metrics["accepted"]
    assert float(found) == pytest.approx(1 - np.mean([rejected(level) for level in levels]), abs=0.002)


@pytest.mark.parametrize("levels", [PAPER, [3, 16]])
def test_p4_codes_have_mean_0_and_variance_1_minus_1_over_l_squared(levels):
    codebook = make(levels).codebook.double()
    expected = 1 - 1 / torch.tensor(levels).double().square()
    torch.testing.assert_close(codebook.var(dim=0, unbiased=False), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(codebook.mean(dim=0), torch.zeros(len(levels)).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [PAPER, [8] * 9, [16] * 8])
def test_p5_corners_have_the_first_and_the_last_index(levels):
    a = torch.full((1, len(levels)), 30.0)
    assert make(levels).encode(torch.cat([-a, a])).tolist() == [0, math.prod(levels) - 1]


@pytest.mark.parametrize("levels", [PAPER, [8, 8, 8, 6, 5], [8] * 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_p5_half_precision_latents_have_the_indices_of_the_same_values_in_float32(levels, dtype):
    a = torch.randn(5000, len(levels)).to(dtype)
    expected, _ = reference_eval(a.double().numpy(), levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(levels).encode(a).tolist() == expected.tolist()


@pytest.mark.parametrize("levels", [[8, 6, 5], PAPER, [8, 8, 8, 6, 5], [8] * 9, [16] * 8])
def test_p6_equals_an_independent_numpy_reference(levels):
    a = 1.5 * torch.randn(5000, len(levels))
    index, output = reference_eval(a.numpy(), levels)
    found = make(levels).eval()(a)
    assert found.indices.tolist() == index.tolist()
    np.testing.assert_allclose(found.z_q.numpy(), output, atol=1e-6)


@pytest.mark.parametrize("levels", [[8] * 9, [16] * 8])
def test_indices_of_large_codebooks_are_exact(levels):
    """134 M and 4.3 G codes, too many for float32 and int32. Cell centres must survive encode and decode."""
    quantizer = make(levels)
    indices = quantizer.codebook_size - 1 - 7919 * torch.arange(5000)
    a = latents_of((quantizer.decode(indices) / math.sqrt(12) + 0.5).double())
    assert torch.equal(quantizer.encode(a), indices)


# -- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_distribution_function_of_its_law(name):
    a = np.linspace(-6, 6, 401)
    found = ACTIVATIONS[name].cdf(torch.from_numpy(a)).numpy()
    np.testing.assert_allclose(found, LAWS[name].cdf(a), atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_variance_held_to_is_that_of_the_law(name):
    expected = LAWS[name].var()
    assert ACTIVATIONS[name].variance == (pytest.approx(expected) if np.isfinite(expected) else None)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_latents_of_the_law_use_all_codes_equally(name):
    a = torch.from_numpy(LAWS[name].rvs(size=(100_000, 2), random_state=0))
    counts = torch.bincount(make([8, 5], activation=name).encode(a), minlength=40).double()
    assert counts.min() / counts.max() > 0.9


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "normal", "laplace"])
def test_l_norm_is_least_at_the_laws_own_variance(name):
    a = torch.from_numpy(LAWS[name].ppf(even_p().numpy()))[:, None].float()
    losses = [float(make([8], activation=name)(scale * a).losses["norm_var"]) for scale in (0.8, 1.0, 1.2)]
    assert losses[1] < 0.01 * min(losses[0], losses[2])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("quantize_rate", [0.0, 1.0])
def test_gradient_is_sqrt_12_times_the_density_of_the_law(name, quantize_rate):
    a = torch.linspace(-3, 3, 101).repeat(2, 1).T.contiguous().requires_grad_()
    make([8, 5], activation=name, quantize_rate=quantize_rate)(a).z_q.sum().backward()
    np.testing.assert_allclose(a.grad.numpy(), math.sqrt(12) * LAWS[name].pdf(a.detach().numpy()), rtol=1e-4)


def test_saturated_latents_stay_finite_and_in_range():
    a = torch.tensor([[1e4, -1e4, 100.0, -100.0]], requires_grad=True)
    for name in ACTIVATIONS:
        out = make(activation=name)(a)
        (gradient,) = torch.autograd.grad(out.z_q.sum() + sum(out.losses.values()), a)
        assert gradient.isfinite().all()
        assert make(activation=name).encode(a).tolist() == [7 + 0 * 8 + 4 * 40 + 0 * 200]


# -- inverse activation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_inverse_of_an_activation_is_the_quantile_function_of_its_law(name):
    p = np.linspace(1e-4, 1 - 1e-4, 401)
    found = ACTIVATIONS[name].inverse(torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(found, LAWS[name].ppf(p), rtol=1e-9, atol=1e-9)


def test_the_decoder_sees_the_inverse_of_the_middle_of_the_cell():
    """By hand: three cells have the centres 1/6, 1/2 and 5/6, and artanh(2/3) = ln(5) / 2."""
    codes = make([3, 3], inverse_activation=True).decode(torch.arange(3))
    half = math.log(5) / 2
    torch.testing.assert_close(codes, torch.tensor([[-half, -half], [0.0, -half], [half, -half]]))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_inverse_codes_are_the_quantiles_of_the_law_at_the_middles_of_the_cells(name):
    found = make([16], activation=name, inverse_activation=True).codebook[:, 0].numpy()
    np.testing.assert_allclose(found, LAWS[name].ppf((np.arange(16) + 0.5) / 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("quantize_rate", [0.0, 0.5, 1.0])
def test_the_gradient_through_the_inverse_is_the_upstream_gradient(name, quantize_rate):
    quantizer = make(activation=name, quantize_rate=quantize_rate, inverse_activation=True)
    a, upstream = torch.randn(500, 4, requires_grad=True), torch.randn(500, 4)
    (gradient,) = torch.autograd.grad(quantizer(a).z_q, a, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_inverse_changes_no_index(name):
    a = 2 * torch.randn(5000, 4)
    plain, inverse = (make(activation=name, inverse_activation=on) for on in (False, True))
    assert torch.equal(plain.encode(a), inverse.encode(a))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_training_shows_the_inverse_of_p_moved_by_at_most_half_a_cell(name):
    a = torch.randn(20_000, 4)
    shown = make(activation=name, inverse_activation=True)(a).z_q
    p, moved = (ACTIVATIONS[name].cdf(x.double()) for x in (a, shown))
    ratio = (moved - p).abs() * 2 * torch.tensor(PAPER)
    assert 0.99 < float(ratio.max()) < 1 + 1e-3


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("quantize_rate", [0.0, 1.0])
def test_saturated_latents_have_finite_inverses(name, quantize_rate):
    quantizer = make(activation=name, quantize_rate=quantize_rate, inverse_activation=True)
    a = torch.tensor([[1e4, -1e4, 1e30, -1e30]], requires_grad=True)
    shown = quantizer(a).z_q
    assert shown.isfinite().all()
    assert (shown.sign() == a.sign()).all()
    assert quantizer.codebook.isfinite().all()


@pytest.mark.parametrize("name", ["tanh", "normal", "laplace"])
def test_perturbation_ratio_of_the_inverse_is_measured_on_what_the_decoder_sees(name):
    quantizer = make(activation=name, inverse_activation=True)
    a = torch.randn(20_000, 4)
    ratio = quantizer.perturbation_ratio(a)
    torch.manual_seed(0)  # seeds the noise of the ratio
    energy, error = ((shown.z_q - a).square().sum() for shown in (quantizer(a), quantizer.eval()(a)))
    assert ratio == pytest.approx(float(energy / error), rel=1e-3)


# -- mixing ---------------------------------------------------------------------------------------------------------


def rounded_mask(quantizer: FSP, p: Tensor) -> Tensor:
    """Which scalars training rounded to the cell centre."""
    middle = (torch.floor(p * torch.tensor(PAPER)) + 0.5) / torch.tensor(PAPER)
    return (seen_p(quantizer, latents_of(p)) - middle).abs() < 1e-6


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_element_mixing_rounds_each_scalar_by_itself(rate):
    rounded = rounded_mask(make(mixing="element", quantize_rate=rate), torch.rand(20_000, 4))
    assert float(rounded.float().mean()) == pytest.approx(rate, abs=0.02)
    assert float(rounded.all(dim=1).float().mean()) == pytest.approx(rate**4, abs=0.02)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_vector_mixing_rounds_a_latent_whole_or_not_at_all(rate):
    rounded = rounded_mask(make(mixing="vector", quantize_rate=rate), torch.rand(20_000, 4))
    assert float(rounded.all(dim=1).float().mean()) == pytest.approx(rate, abs=0.02)
    assert float((rounded.any(dim=1) & ~rounded.all(dim=1)).float().mean()) < 0.001  # a random step can be almost 0


def moved_mask(mixing: str) -> Tensor:
    """Which latents moved. All are close to an edge, where half of the steps leave (0, 1)."""
    p = torch.full((20_000, 4), 1e-3)
    a = latents_of(p)
    return (seen_p(make(mixing=mixing, quantize_rate=0.0), a) - p).abs() > 1e-5


def test_element_acceptance_moves_scalars_by_themselves():
    moved = moved_mask("element")
    assert float(moved.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(moved.all(dim=1).float().mean()) == pytest.approx(1 / 16, abs=0.02)


def test_vector_acceptance_moves_a_latent_whole_or_not_at_all():
    moved = moved_mask("vector")
    assert float(moved.float().mean()) == pytest.approx(1 / 16, abs=0.01)
    assert float(moved.all(dim=1).float().mean()) == pytest.approx(1 / 16, abs=0.01)


def test_acceptance_counts_scalars_or_latents():
    a = torch.randn(50_000, 4)
    element, vector = (float(make(mixing=mixing)(a).metrics["accepted"]) for mixing in ("element", "vector"))
    assert vector == pytest.approx(element**4, abs=0.01)


def test_training_at_quantize_rate_1_is_what_eval_gives():
    quantizer, a = make(quantize_rate=1.0), torch.randn(500, 4)
    torch.testing.assert_close(quantizer(a).z_q, quantizer.eval()(a).z_q, rtol=0, atol=1e-6)


# -- settings -------------------------------------------------------------------------------------------------------


def test_levels_follow_from_the_codebook_size():
    assert FSP(FSPConfig(codebook_size=4096)).codebook_size == 4375
    assert FSP(FSPConfig(codebook_size=4096)).in_dim == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "quantizer.activation is 'relu'; choose one of: tanh, sigmoid, normal"),
        ({"mixing": "batch"}, "quantizer.mixing is 'batch'"),
        ({"quantize_rate": 1.5}, "quantizer.quantize_rate is 1.5"),
        ({"levels": [8, 0]}, "levels"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FSP(FSPConfig(**settings))


@pytest.mark.parametrize(
    ("eta", "rate", "expected"), [(1.0, 0.0, 1.0), (2.0, 1.0, 1.0), (0.5, 0.0, 0.25), (0.5, 0.5, 0.625)]
)
def test_perturbation_ratio_of_uniform_scalars(eta, rate, expected):
    """U(-eta/2L, eta/2L) has variance eta^2 / 12 L^2, rounding 1 / 12 L^2. Few of the 64 cells are at an end."""
    quantizer = build_quantizer({"name": "fsp", "levels": [64, 64], "eta": eta, "quantize_rate": rate})
    p = torch.rand(50_000, 2, generator=torch.Generator().manual_seed(5))
    assert quantizer.perturbation_ratio(torch.atanh(2 * p - 1)) == pytest.approx(expected, rel=0.03)
