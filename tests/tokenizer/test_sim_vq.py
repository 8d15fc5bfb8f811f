"""SimVQ: tests I1 to I3, and the decode of the official code, which omits the projection."""

import pytest
import torch
from torch import Tensor

from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.sim_vq import SimVQ, SimVQConfig


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(codebook_size: int = 32, dim: int = 8, **settings) -> SimVQ:
    return SimVQ(SimVQConfig(codebook_size=codebook_size, dim=dim, **settings))


def trained(z: Tensor, steps: int = 5) -> SimVQ:
    quantizer = built(dim=z.shape[1])
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(quantizer(z).losses.values()).backward()
        optimizer.step()
    return quantizer


def test_i1_decode_of_encode_is_the_eval_output():
    z = torch.randn(500, 8)
    quantizer = trained(z).eval()
    assert torch.equal(quantizer.decode(quantizer.encode(z)), quantizer(z).z_q)


def test_i1_decode_gives_the_projected_code_not_the_frozen_one():
    """Shows the bug of the official get_codebook_entry, whose error is as large as the codes."""
    z = torch.randn(500, 8)
    quantizer = trained(z).eval()
    indices = quantizer.encode(z)
    by_hand = quantizer.frozen[indices] @ quantizer.projection.weight.T + quantizer.projection.bias
    torch.testing.assert_close(quantizer.decode(indices), by_hand.detach(), rtol=0, atol=1e-6)
    assert (quantizer.decode(indices) - quantizer.frozen[indices]).abs().max() > 0.5


def test_i2_the_frozen_table_has_no_gradient_and_the_projection_has():
    quantizer = built()
    quantizer(torch.randn(50, 8)).losses["codebook"].backward()
    assert not quantizer.frozen.requires_grad
    assert {name for name, _ in quantizer.named_parameters()} == {"projection.weight", "projection.bias"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_i2_every_code_moves_in_a_step_that_chose_one():
    z = torch.randn(1, 8).repeat(20, 1)
    quantizer = trained(z, steps=1)
    before = quantizer.codebook.clone()
    assert len(quantizer.encode(z).unique()) == 1
    sum(quantizer(z).losses.values()).backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    assert ((quantizer.codebook - before).abs().sum(dim=1) > 0).all()


def test_i3_the_baked_codebook_is_the_projected_one():
    z = torch.randn(500, 8)
    quantizer = trained(z)
    indices, lazily = quantizer.encode(z), quantizer.codebook
    quantizer.fit(z)
    torch.testing.assert_close(quantizer.table, lazily, rtol=0, atol=1e-6)
    assert torch.equal(quantizer.encode(z), indices)


def test_a_baked_codebook_stays_when_the_projection_does_not():
    quantizer = trained(torch.randn(500, 8))
    quantizer.fit(torch.randn(10, 8))
    before = quantizer.codebook
    quantizer.projection.weight.data.zero_()
    assert torch.equal(quantizer.codebook, before)


def test_training_on_leaves_the_baked_codebook_behind():
    quantizer = trained(torch.randn(500, 8))
    quantizer.fit(torch.randn(10, 8))
    quantizer.projection.bias.data.add_(1.0)
    quantizer.train()(torch.randn(10, 8))
    torch.testing.assert_close(quantizer.codebook, quantizer.projection(quantizer.frozen).detach())


def test_frozen_codes_have_variance_one_over_dim():
    assert float(built(4096, 16).frozen.var()) == pytest.approx(1 / 16, rel=0.02)


def test_losses_are_mean_squared_distances_to_the_nearest_code():
    z = torch.randn(200, 8)
    quantizer = built()
    codes = quantizer.projection(quantizer.frozen).detach().double()
    expected = float((z.double()[:, None] - codes).square().sum(dim=2).min(dim=1).values.mean() / 8)
    losses = {name: loss.item() for name, loss in quantizer(z).losses.items()}
    assert losses == pytest.approx({"codebook": expected, "commitment": expected}, rel=1e-5)


def test_commitment_moves_latents_only():
    quantizer, z = built(), torch.randn(50, 8, requires_grad=True)
    quantizer(z).losses["commitment"].backward()
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_straight_through_gradient_is_the_upstream_gradient():
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    (gradient,) = torch.autograd.grad(built()(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_training_lowers_the_error_and_brings_codes_into_use():
    z = 1 + torch.randn(500, 4)
    first, last = trained(z, steps=1), trained(z, steps=100)
    assert last(z).losses["codebook"] < 0.7 * first(z).losses["codebook"]
    assert len(last.encode(z).unique()) > len(first.encode(z).unique())


def test_codes_that_were_never_trained_are_refused():
    with pytest.raises(CodebookMissing, match="never trained"):
        built().encode(torch.randn(3, 8))


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match="'gumbel'; choose one of: straight_through, rotation"):
        SimVQConfig(gradient="gumbel")
