"""Latent norm losses: compared to float64 and to results by hand, and with very few rows."""

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.base.norm_loss import latent_norm_losses


def spread_out(mean: float, count: int = 500) -> Tensor:
    return mean + torch.randn(count, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 1, 1.5, 2])


@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0, -1000.0])
def test_losses_are_those_of_float64_also_far_from_zero(mean):
    z = spread_out(mean)
    exact = z.double()
    norm_mean = exact.mean(dim=0).square().mean()
    norm_var = (exact.var(dim=0, correction=0) - 0.8).square().mean()
    found = latent_norm_losses(z, variance=0.8)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(
        {"norm_mean": float(norm_mean), "norm_var": float(norm_var)}, rel=1e-5
    )


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_gradients_are_those_of_float64_also_far_from_zero(mean):
    z = spread_out(mean).requires_grad_()
    exact = z.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(sum(latent_norm_losses(z, variance=1.0).values()), z)
    loss = exact.mean(dim=0).square().mean() + (exact.var(dim=0, correction=0) - 1).square().mean()
    (expected,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-7)


def test_two_rows_solved_by_hand():
    """Columns (1, 3) and (0, 4): means 2 and 2, variances 1 and 4."""
    found = latent_norm_losses(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), variance=1.0)
    assert {name: loss.item() for name, loss in found.items()} == {"norm_mean": 4.0, "norm_var": 4.5}


def test_without_a_variance_only_the_mean_has_a_loss():
    assert latent_norm_losses(spread_out(1.0), variance=None)["norm_var"] == 0


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_give_finite_losses_and_gradients(count):
    z = spread_out(3.0, count).requires_grad_()
    losses = latent_norm_losses(z, variance=1.0)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert z.grad.isfinite().all()
