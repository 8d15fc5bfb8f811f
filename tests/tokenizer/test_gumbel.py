"""Gumbel-softmax VQ-VAE: tests U1 to U4 of the method."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.gumbel import Gumbel, GumbelConfig


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def started(**settings) -> Gumbel:
    quantizer = Gumbel(GumbelConfig(codebook_size=32, dim=8, **settings))
    quantizer(torch.randn(10, 8))
    return quantizer


def logits(quantizer: Gumbel, z: Tensor) -> Tensor:
    """In float64, computed from the weights."""
    return z.double() @ quantizer.projection.weight.double().T + quantizer.projection.bias.double()


def test_u1_eval_takes_the_likeliest_code_and_draws_nothing():
    quantizer, z = started().eval(), torch.randn(500, 8)
    before = torch.get_rng_state()
    out = quantizer(z)
    assert torch.equal(out.indices, logits(quantizer, z).argmax(dim=1))
    assert torch.equal(out.z_q, quantizer.embedding[out.indices])
    assert torch.equal(torch.get_rng_state(), before)


def test_u2_kl_is_zero_if_all_codes_are_as_likely():
    quantizer = started()
    for parameter in quantizer.projection.parameters():
        parameter.data.zero_()
    assert quantizer(torch.randn(200, 8)).losses["kl"].item() == pytest.approx(0, abs=1e-6)


def test_u2_kl_is_log_k_if_each_latent_is_sure_of_its_code():
    quantizer = started()
    quantizer.projection.weight.data.mul_(1e4)
    assert quantizer(torch.randn(200, 8)).losses["kl"].item() == pytest.approx(math.log(32), rel=1e-2)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_u2_kl_is_that_computed_directly_and_above_0(scale):
    quantizer, z = started(), scale * torch.randn(200, 8)
    q = logits(quantizer, z).softmax(dim=1)
    expected = (q * (32 * q).log()).sum(dim=1).mean().item()
    assert quantizer(z).losses["kl"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_u3_a_hard_choice_shows_the_decoder_codes_only():
    z = torch.randn(200, 8)
    for hard in (True, False):
        quantizer = started(hard=hard)
        is_code = (quantizer(z).z_q[:, None] == quantizer.embedding).all(dim=2).any(dim=1)
        assert is_code.float().mean() == float(hard)


def test_u3_the_gradient_of_a_hard_choice_to_the_latents_is_that_of_the_soft_one():
    hard, soft = started(hard=True), started(hard=False)
    soft.load_state_dict(hard.state_dict())
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    gradients = []
    for quantizer in (hard, soft):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(quantizer(z).z_q, z, upstream)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_u3_a_hard_choice_moves_chosen_codes_only_and_a_soft_one_all():
    z = torch.randn(5, 8)
    moved = []
    for hard in (True, False):
        quantizer = started(hard=hard)
        quantizer(z).z_q.sum().backward()
        moved.append(int((quantizer.embedding.grad.abs().sum(dim=1) > 0).sum()))
    assert moved[0] <= 5
    assert moved[1] == 32


def test_u3_codes_are_drawn_as_often_as_their_probabilities_say():
    quantizer = started(hard=True)
    z = torch.randn(1, 8)
    z_q = quantizer(z.expand(100_000, 8)).z_q.detach()
    drawn = torch.cdist(z_q, quantizer.embedding.detach()).argmin(dim=1)
    shares = torch.bincount(drawn, minlength=32) / len(drawn)
    torch.testing.assert_close(shares, logits(quantizer, z).softmax(dim=1)[0].float(), rtol=0, atol=0.005)


def test_u4_temperature_goes_from_1_to_a_sixteenth():
    quantizer = Gumbel(GumbelConfig(codebook_size=32, dim=8, anneal_steps=4))
    found = [quantizer(torch.randn(3, 8)).metrics["temperature"].item() for _ in range(6)]
    middle = 1 / 16 + 15 / 16 * math.sqrt(0.5)
    assert [found[0], found[2], *found[4:]] == pytest.approx([1.0, middle, 1 / 16, 1 / 16], abs=1e-6)


def test_shares_count_the_likeliest_codes_as_the_source_does():
    quantizer, z = started(), torch.randn(300, 8)
    expected = torch.bincount(logits(quantizer, z).argmax(dim=1), minlength=32) / 300
    assert torch.equal(quantizer.code_shares(z), expected)


def test_kl_stands_beside_the_squared_error_as_in_the_source():
    """karpathy: MSE / (2 * 0.0632704) + 5e-4 KL. Times 2 * 0.0632704: MSE + weight * KL."""
    mse, kl = 0.004, 3.0
    source = mse / (2 * 0.06327039811675479) + 5e-4 * kl
    ours = mse + Gumbel.default_loss_weights["kl"] * kl
    assert ours == pytest.approx(2 * 0.06327039811675479 * source)
    assert Gumbel.default_loss_weights["kl"] == pytest.approx(6.3e-5, rel=0.01)


def test_the_frozen_tokenizer_ships_the_projection_and_the_table():
    quantizer = started()
    quantizer.fit(torch.randn(10, 8))
    kept = {name for name in quantizer.state_dict() if not name.startswith(quantizer.training_state)}
    assert {"projection.weight", "projection.bias", "table"} <= kept


def test_temperatures_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match=r"temperature_start is 0.1 and temperature_end 1.0"):
        GumbelConfig(temperature_start=0.1, temperature_end=1.0)
