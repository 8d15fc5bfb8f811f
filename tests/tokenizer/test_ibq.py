"""IBQ: forward, losses and gradients, compared to the official formula with an explicit one-hot, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenizer.quantizers.ibq import IBQ, IBQConfig

K, D = 32, 8


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(**settings) -> IBQ:
    return IBQ(IBQConfig(codebook_size=K, dim=D, **settings))


def reference(z: Tensor, e: Tensor, entropy_temperature: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """z_q, q and the losses of arXiv 2412.02692, as in its official code."""
    logits = z @ e.T
    p = logits.softmax(dim=1)
    q = logits.argmax(dim=1)
    hard = one_hot(q, len(e)).to(z)
    z_q, code = (hard - p.detach() + p) @ e, hard @ e
    sharp = (logits / entropy_temperature).softmax(dim=1)
    losses = {
        "quantization": (z_q - z).square().mean(),
        "commitment": (code.detach() - z).square().mean(),
        "codebook": (code - z.detach()).square().mean(),
        "entropy_per_token": -torch.special.xlogy(sharp, sharp).sum(dim=1).mean(),
        "entropy_of_mean": torch.special.xlogy(sharp.mean(dim=0), sharp.mean(dim=0)).sum(),
    }
    return z_q, q, losses


def gradients(total: Tensor, z: Tensor, e: Tensor) -> list[Tensor]:
    return [
        gradient.double() for gradient in torch.autograd.grad(total, (z, e), retain_graph=True, materialize_grads=True)
    ]


@pytest.mark.parametrize("entropy_temperature", [0.3, 2.0])
def test_output_losses_and_their_gradients_are_those_of_the_official_formula(entropy_temperature):
    quantizer, upstream = built(entropy_temperature=entropy_temperature), torch.randn(200, D)
    z, e = 0.5 * torch.randn(200, D), quantizer.embedding
    z64, e64 = z.double().requires_grad_(), e.detach().double().requires_grad_()
    out = quantizer(z.requires_grad_())
    z_q, q, losses = reference(z64, e64, entropy_temperature)
    assert torch.equal(out.indices, q)
    assert set(out.losses) == set(losses)
    torch.testing.assert_close(out.z_q.double(), z_q, rtol=1e-5, atol=1e-5)
    found, expected = [(out.z_q * upstream).sum()], [(z_q * upstream.double()).sum()]
    for name in losses:
        torch.testing.assert_close(out.losses[name].double(), losses[name], rtol=1e-4, atol=1e-6)
        found.append(out.losses[name])
        expected.append(losses[name])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(gradients(ours, z, e), gradients(theirs, z64, e64), rtol=1e-3, atol=1e-6)


def test_the_output_of_training_is_a_code_bit_by_bit():
    quantizer, z = built(), torch.randn(200, D)
    out = quantizer(z)
    assert torch.equal(out.z_q, quantizer.embedding[out.indices])


def test_every_code_gets_a_gradient_from_a_single_latent():
    quantizer = built()
    quantizer(torch.randn(1, D)).z_q.sum().backward()
    assert (quantizer.embedding.grad.abs().sum(dim=1) > 0).all()


def test_the_index_is_that_of_the_largest_dot_product_and_not_of_the_nearest_code():
    """By hand: z = (1, 0) equals the first code, but its dot product with the second one is 3."""
    quantizer = IBQ(IBQConfig(codebook_size=3, dim=2))
    quantizer(torch.randn(5, 2))
    quantizer.embedding.data = torch.tensor([[1.0, 0.0], [3.0, 1.0], [3.0, -1.0]])
    assert quantizer.encode(torch.tensor([[1.0, 0.0], [1.0, -1.0], [-1.0, 0.0]])).tolist() == [1, 2, 0]


def test_of_equal_products_the_first_code_is_taken():
    quantizer = built()
    quantizer(torch.randn(5, D))
    quantizer.embedding.data[:] = quantizer.embedding.data[:1].clone()
    z = torch.randn(50, D)
    assert (quantizer.encode(z) == 0).all()
    assert (quantizer.train()(z).indices == 0).all()


def test_shares_count_the_codes_of_largest_product():
    quantizer, z = built(), torch.randn(300, D)
    quantizer(z)
    chosen = (z.double() @ quantizer.embedding.detach().double().T).argmax(dim=1)
    assert torch.equal(quantizer.code_shares(z), torch.bincount(chosen, minlength=quantizer.codebook_size) / 300)


def test_descending_the_entropy_of_the_mean_spreads_collapsed_latents():
    quantizer = built(entropy_temperature=1.0)
    z = torch.randn(1, D).expand(100, D).clone().requires_grad_()
    before = quantizer(z).losses["entropy_of_mean"]
    step_z, step_e = torch.autograd.grad(before, (z, quantizer.embedding))
    quantizer.embedding.data -= 0.1 * step_e
    assert quantizer(z - 0.1 * step_z).losses["entropy_of_mean"] < before


@pytest.mark.parametrize("scale", [1e-20, 1e6])
def test_the_default_temperature_is_finite_on_extreme_latents(scale):
    quantizer, z = built(), (scale * torch.randn(100, D)).requires_grad_()
    losses = quantizer(z).losses
    sum(losses.values()).backward()
    assert all(tensor.isfinite().all() for tensor in (*losses.values(), z.grad, quantizer.embedding.grad))


def test_a_bad_temperature_is_named():
    with pytest.raises(ValueError, match=r"quantizer\.entropy_temperature is 0"):
        IBQConfig(entropy_temperature=0.0)
