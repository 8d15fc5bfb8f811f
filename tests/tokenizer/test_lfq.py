"""LFQ: signs and indices by hand, its entropies compared to sums over all codes, and their limits."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers import lfq
from tokenizer.quantizers.lfq import LFQ, LFQConfig, binary_entropy, entropy_of_mean_bits, joint_sums


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(codebook_size: int = 16, **settings) -> LFQ:
    return LFQ(LFQConfig(codebook_size=codebook_size, **settings))


def brute_probabilities(z: Tensor, inverse_temperature: float) -> Tensor:
    """softmax over all codes of 2 inverse_temperature z.c. The first bit of a code is the least significant."""
    dim = z.shape[1]
    codes = torch.tensor([[2.0 * (code >> i & 1) - 1 for i in range(dim)] for code in range(2**dim)])
    return (2 * inverse_temperature * z.double() @ codes.double().T).softmax(dim=1)


def brute_entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(dim=-1)


def entropies(quantizer: LFQ, z: Tensor) -> tuple[float, float]:
    losses = quantizer(z).losses
    return losses["entropy_per_token"].item(), losses["entropy_of_mean"].item()


# -- codes and indices ----------------------------------------------------------------------------------------------


def test_codes_are_signs_and_zero_is_minus_one():
    z = torch.tensor([[0.3, -2.0, 0.0, 1e-9]])
    assert built()(z).z_q.tolist() == [[1.0, -1.0, -1.0, 1.0]]


def test_the_first_dimension_is_the_least_significant_bit():
    """By hand. In the official order the first of ten bits would be 512."""
    z = -torch.ones(4, 10)
    z[0, 0] = z[1, 9] = z[2, :] = 1.0
    assert built(1024).encode(z).tolist() == [1, 512, 1023, 0]


def test_the_codebook_is_all_corners_of_the_cube():
    codebook = built(16).codebook
    assert (codebook.abs() == 1).all()
    assert len(codebook.unique(dim=0)) == 16


def test_dims_are_the_bits_of_the_size():
    quantizer = built(1024)
    assert (quantizer.dim, quantizer.in_dim, quantizer.codebook_size) == (10, 10, 1024)
    assert quantizer.index_levels == (2,) * 10


@pytest.mark.parametrize(
    ("size", "near"), [(1000, "512 or 1024"), (1025, "1024 or 2048"), (1, "2 or 4"), (-5, "2 or 4")]
)
def test_a_size_that_is_no_power_of_two_is_refused_with_its_neighbours(size, near):
    with pytest.raises(ValueError, match=f"codebook_size is {size}; .*choose {near}"):
        LFQConfig(codebook_size=size)


def test_a_bad_temperature_is_named():
    with pytest.raises(ValueError, match=r"quantizer\.inverse_temperature is 0"):
        LFQConfig(inverse_temperature=0.0)


# -- entropies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [3, 4])
@pytest.mark.parametrize("inverse_temperature", [0.3, 2.0, 100.0])
def test_entropies_equal_those_over_all_codes_written_out(dim, inverse_temperature):
    z = torch.randn(50, dim)
    p = brute_probabilities(z, inverse_temperature)
    found = entropies(built(2**dim, inverse_temperature=inverse_temperature), z)
    assert found == pytest.approx(
        (brute_entropy(p).mean().item(), -brute_entropy(p.mean(dim=0)).item()), rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_joint_sums_are_those_over_all_codes_in_the_order_of_the_indices(dim):
    z = torch.randn(50, dim)
    expected = brute_probabilities(z, 1.0).sum(dim=0)
    torch.testing.assert_close(joint_sums((4 * z).sigmoid()).double(), expected, rtol=1e-4, atol=1e-6)


def test_code_shares_count_hard_codes_however_unsure_the_bits_are():
    quantizer, z = built(inverse_temperature=0.01), torch.randn(500, 4)
    counts = torch.bincount(quantizer.encode(z), minlength=quantizer.codebook_size)
    assert torch.equal(quantizer.code_shares(z), counts / 500)


def test_undecided_tokens_have_entropies_that_cancel():
    per_token, of_mean = entropies(built(), torch.zeros(100, 4))
    assert per_token == pytest.approx(4 * math.log(2))
    assert of_mean == pytest.approx(-4 * math.log(2))


def test_all_tokens_on_one_code_have_no_entropy_at_all():
    assert entropies(built(), torch.ones(100, 4)) == pytest.approx((0, 0), abs=1e-6)


def test_sure_tokens_on_all_codes_alike_are_the_best_there_is():
    quantizer = built()
    assert entropies(quantizer, quantizer.codebook) == pytest.approx((0, -4 * math.log(2)), abs=1e-6)


def test_descending_the_entropy_per_token_makes_tokens_surer():
    z = (0.2 * torch.randn(100, 4)).requires_grad_()
    quantizer = built(inverse_temperature=1.0)
    quantizer(z).losses["entropy_per_token"].backward()
    assert (z.grad * z <= 0).all()


def test_descending_the_entropy_of_the_mean_spreads_collapsed_tokens():
    z = torch.full((100, 4), 0.2, requires_grad=True)
    built(inverse_temperature=1.0)(z).losses["entropy_of_mean"].backward()
    assert (z.grad > 0).all()


def test_above_the_limit_the_entropy_of_the_mean_is_bounded_by_its_bits(monkeypatch):
    z = torch.randn(50, 1).repeat(1, 4)  # identical bits, for which the bound is far from tight
    quantizer = built()
    exact = entropies(quantizer, z)[1]
    monkeypatch.setattr(lfq, "MAX_JOINT_DIM", 3)
    bound = entropies(quantizer, z)[1]
    share = (400 * z[:, 0].double()).sigmoid().mean()
    assert bound == pytest.approx(-4 * brute_entropy(torch.stack([share, 1 - share])).item(), rel=1e-4)
    assert bound < 0.5 * exact < 0


def test_entropy_of_the_mean_bits_is_the_sum_over_bits():
    """By hand: bits with shares 1/2, 0 and 1/4 have the entropies ln 2, 0 and 2 ln 2 - 3/4 ln 3."""
    p = torch.tensor([[1.0, 0, 0.5], [0, 0, 0]])
    assert entropy_of_mean_bits(p).item() == pytest.approx(3 * math.log(2) - 0.75 * math.log(3), rel=1e-5)


def test_above_the_limit_a_step_takes_little_memory_and_is_finite():
    z = torch.randn(64, 30, requires_grad=True)
    out = built(2**30)(z)
    sum(out.losses.values()).backward()
    assert z.grad.isfinite().all()
    assert int(out.indices.max()) > 2**24


@pytest.mark.parametrize("logit", [0.0, 3.0, -3.0, 1e4, -1e4])
def test_binary_entropy_is_right_and_its_gradient_finite(logit):
    x = torch.tensor(logit, requires_grad=True)
    binary_entropy(x).backward()
    p = torch.tensor(logit).double().sigmoid()
    assert binary_entropy(x).item() == pytest.approx(brute_entropy(torch.stack([p, 1 - p])).item(), abs=1e-6)
    assert x.grad.item() == pytest.approx(-logit * (p * (1 - p)).item(), abs=1e-6)


# -- the other gradients --------------------------------------------------------------------------------------------


def test_straight_through_gradient_is_the_upstream_gradient():
    z, upstream = torch.randn(50, 4, requires_grad=True), torch.randn(50, 4)
    (gradient,) = torch.autograd.grad(built()(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_commitment_is_the_mean_squared_distance_to_the_code():
    z = torch.tensor([[0.5, -3.0]])
    assert built(4)(z).losses["commitment"].item() == pytest.approx((0.25 + 4) / 2)
