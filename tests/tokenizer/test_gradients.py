"""Gradients through quantization: straight-through and the rotation trick."""

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.base.straight_through import GRADIENTS, MIN_LENGTH, rotate_to, straight_through


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def rotated_gradient(z: Tensor, e: Tensor, upstream: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(rotate_to(z, e), z, upstream)[0]


@pytest.mark.parametrize("gradient", GRADIENTS.values())
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_forward_is_the_code_bit_by_bit(gradient, scale):
    z, e = scale * torch.randn(500, 8), torch.randn(500, 8)
    assert torch.equal(gradient(z, e), e)


@pytest.mark.parametrize("gradient", GRADIENTS.values())
def test_no_gradient_reaches_the_code(gradient):
    z, e = torch.randn(50, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    assert torch.autograd.grad(gradient(z, e).sum(), e, allow_unused=True) == (None,)


def test_straight_through_gradient_is_the_upstream_gradient():
    z, upstream = torch.randn(50, 8, requires_grad=True), torch.randn(50, 8)
    (gradient,) = torch.autograd.grad(straight_through(z, torch.randn(50, 8)), z, upstream)
    assert torch.equal(gradient, upstream)


# -- the rotation trick ---------------------------------------------------------------------------------------------


def test_rotated_gradient_is_scaled_by_the_ratio_of_lengths():
    z, e, upstream = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 8)
    ratio = rotated_gradient(z, e, upstream).norm(dim=1) / upstream.norm(dim=1)
    torch.testing.assert_close(ratio, e.norm(dim=1) / z.norm(dim=1), rtol=1e-4, atol=0)


def test_rotated_gradient_keeps_its_angle_to_the_latent():
    z, e, upstream = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 8)
    found = cosines(rotated_gradient(z, e, upstream), z)
    torch.testing.assert_close(found, cosines(upstream, e), rtol=0, atol=1e-4)


def test_rotation_by_a_right_angle_solved_by_hand():
    """z = (2, 0) becomes e = (0, 1): a quarter turn to the left, halved. The gradient is turned to the right."""
    z, e = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(rotated_gradient(z, e, torch.tensor([[0.0, 1.0]])), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(rotated_gradient(z, e, torch.tensor([[1.0, 0.0]])), torch.tensor([[0.0, -0.5]]))


def test_rotation_of_a_latent_onto_itself_is_the_identity():
    z, upstream = torch.randn(50, 8), torch.randn(50, 8)
    torch.testing.assert_close(rotated_gradient(z, z, upstream), upstream)


# -- where no rotation is determined --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-2])
def test_a_latent_that_points_away_from_its_code_gets_no_larger_gradient(noise):
    """The rotation scales lengths by |e| / |z| = 1 / 1.3, even if the bisector is close to 0."""
    e, upstream = torch.randn(500, 8), torch.randn(500, 8)
    z = -1.3 * e + noise * torch.randn(500, 8)
    assert torch.equal(rotate_to(z, e), e)
    ratio = rotated_gradient(z, e, upstream).norm(dim=1) / upstream.norm(dim=1)
    assert 0.7 < ratio.min() <= ratio.max() < 1.01


def test_an_opposite_latent_gets_the_upstream_gradient():
    e, upstream = torch.randn(50, 8), torch.randn(50, 8)
    assert torch.equal(rotated_gradient(-1.3 * e, e, upstream), upstream)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-6, 0.99 * MIN_LENGTH])
def test_a_latent_too_short_to_have_a_direction_gets_the_upstream_gradient(length):
    z, e = torch.nn.functional.normalize(torch.randn(50, 8)), torch.nn.functional.normalize(torch.randn(50, 8))
    upstream = torch.randn(50, 8)
    assert torch.equal(rotated_gradient(length * z, e, upstream), upstream)


def test_no_gradient_is_scaled_by_more_than_the_shortest_length_allows():
    z, e, upstream = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 8)
    z *= 10 ** torch.linspace(-8, 1, 500)[:, None]
    ratio = rotated_gradient(z, e, upstream).norm(dim=1) / upstream.norm(dim=1)
    assert ratio.max() < 1.01 / MIN_LENGTH


def test_zero_codes_and_zero_latents_give_finite_gradients():
    zero, upstream = torch.zeros(5, 8), torch.randn(5, 8)
    assert torch.equal(rotated_gradient(zero, zero, upstream), upstream)
    assert torch.equal(rotated_gradient(torch.randn(5, 8), zero, upstream), zero)
