"""BSQ: codes and indices by hand, the bound of its error, and its entropies compared to sums over all codes."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.bsq import BSQ, BSQConfig


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(codebook_size: int = 16, **settings) -> BSQ:
    return BSQ(BSQConfig(codebook_size=codebook_size, **settings))


def unit(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)


def brute_probabilities(z: Tensor, inverse_temperature: float) -> Tensor:
    """softmax over all codes of 2 inverse_temperature u.c. The first bit of a code is the least significant."""
    dim = z.shape[1]
    signs = torch.tensor([[2.0 * (code >> i & 1) - 1 for i in range(dim)] for code in range(2**dim)])
    return (2 * inverse_temperature * unit(z.double()) @ (signs / math.sqrt(dim)).double().T).softmax(dim=1)


def brute_entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(dim=-1)


# -- codes and indices ----------------------------------------------------------------------------------------------


def test_codes_are_signs_of_length_one_and_zero_is_minus():
    """By hand: with 4 dims each entry is 1/2."""
    z = torch.tensor([[3.0, -4.0, 0.0, 1e-9]])
    assert built()(z).z_q.tolist() == [[0.5, -0.5, -0.5, 0.5]]


def test_the_first_dimension_is_the_least_significant_bit():
    """By hand. In the official order the first of ten bits would be 512."""
    z = -torch.ones(4, 10)
    z[0, 0] = z[1, 9] = z[2, :] = 1.0
    assert built(1024).encode(z).tolist() == [1, 512, 1023, 0]


def test_all_codes_lie_on_the_unit_sphere():
    codebook = built(1024).codebook
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(1024))
    assert len(codebook.unique(dim=0)) == 1024


@pytest.mark.parametrize("dim", [1, 2, 5, 10, 18])
def test_the_distance_to_the_code_has_the_papers_bound_which_an_axis_reaches(dim):
    quantizer, bound = built(2**dim), math.sqrt(2 - 2 / math.sqrt(dim))
    u = unit(torch.randn(20_000, dim))
    assert float((quantizer(u).z_q - u).norm(dim=1).max()) <= bound + 1e-5
    axis = torch.eye(dim)[:1]
    assert float((quantizer(axis).z_q - axis).norm()) == pytest.approx(bound, abs=1e-6)


def test_the_length_of_a_latent_changes_nothing():
    quantizer, z = built(), torch.randn(50, 4)
    once, scaled = quantizer(z), quantizer(7 * z)
    assert torch.equal(once.indices, scaled.indices)
    for name, loss in once.losses.items():
        assert scaled.losses[name].item() == pytest.approx(loss.item(), rel=1e-4)


# -- entropies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [3, 4])
@pytest.mark.parametrize("inverse_temperature", [1.0, 10.0, 100.0])
def test_the_entropy_per_token_is_that_over_all_codes(dim, inverse_temperature):
    z = torch.randn(50, dim)
    expected = brute_entropy(brute_probabilities(z, inverse_temperature)).mean().item()
    found = built(2**dim, inverse_temperature=inverse_temperature)(z).losses["entropy_per_token"].item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("inverse_temperature", [1.0, 10.0])
def test_the_entropy_of_the_mean_is_the_sum_over_the_bits_of_the_mean_over_all_codes(inverse_temperature):
    z = 0.5 + torch.randn(50, 4)
    mean = brute_probabilities(z, inverse_temperature).mean(dim=0).reshape(2, 2, 2, 2)
    bits = [mean.sum(dim=tuple({0, 1, 2, 3} - {bit})) for bit in range(4)]
    found = built(inverse_temperature=inverse_temperature)(z).losses["entropy_of_mean"].item()
    assert found == pytest.approx(-sum(brute_entropy(bit).item() for bit in bits), rel=1e-4)


def test_the_entropy_of_the_mean_bounds_that_of_the_codes_and_is_equal_for_independent_bits():
    quantizer = built(inverse_temperature=100.0)
    collapsed = torch.tensor(
        [[1.0, 1, 1, 1], [-1, -1, -1, -1]]
    )  # two codes, whose bits are as balanced as those of all 16
    assert quantizer(collapsed).losses["entropy_of_mean"].item() == pytest.approx(-4 * math.log(2))
    assert quantizer(quantizer.codebook).losses["entropy_of_mean"].item() == pytest.approx(-4 * math.log(2))


def test_code_shares_count_hard_codes_however_unsure_the_bits_are():
    quantizer, z = built(inverse_temperature=0.01), torch.randn(500, 4)
    counts = torch.bincount(quantizer.encode(z), minlength=quantizer.codebook_size)
    assert torch.equal(quantizer.code_shares(z), counts / 500)


def test_descending_the_entropies_spreads_latents_that_agree():
    quantizer, z = built(), (1 + 0.1 * torch.randn(100, 4)).requires_grad_()
    for _ in range(200):
        losses = quantizer(z).losses
        (gradient,) = torch.autograd.grad(losses["entropy_per_token"] + losses["entropy_of_mean"], z)
        z = (z - 20 * gradient).detach().requires_grad_()
    assert unit(z.detach()).mean(dim=0).norm() < 0.1
    assert len(quantizer.encode(z).unique()) > 8


# -- the other gradients --------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_normalised_latent():
    """By hand: (g - u (u.g)) / |z|, at a right angle to z."""
    z, upstream = (3 * torch.randn(50, 4)).requires_grad_(), torch.randn(50, 4)
    (gradient,) = torch.autograd.grad(built()(z).z_q, z, upstream)
    u = unit(z.detach())
    expected = (upstream - u * (u * upstream).sum(dim=1, keepdim=True)) / z.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, expected)


def test_commitment_is_the_mean_squared_distance_on_the_sphere():
    """By hand: u = (.6, .8) and its code (.7071, .7071)."""
    expected = ((0.6 - math.sqrt(0.5)) ** 2 + (0.8 - math.sqrt(0.5)) ** 2) / 2
    assert built(4)(torch.tensor([[6.0, 8.0]])).losses["commitment"].item() == pytest.approx(expected, rel=1e-5)


def test_a_size_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="codebook_size is 1000; it must be a power of two: choose 512 or 1024"):
        BSQConfig(codebook_size=1000)
