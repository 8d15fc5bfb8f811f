"""VQ-VAE: tests Q1 to Q3 of the method, its initialisation, and the rotation trick."""

import pytest
import torch
from torch import Tensor

from tokenizer.gradients import rotate_to
from tokenizer.kmeans import partial_sums
from tokenizer.quantizers.vq_vae import VQVAE, VQVAEConfig


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def initialised(z: Tensor, codebook_size: int = 32, **settings) -> VQVAE:
    quantizer = VQVAE(VQVAEConfig(codebook_size=codebook_size, dim=z.shape[1], **settings))
    quantizer(z)
    return quantizer


def brute_indices(z: Tensor, codes: Tensor) -> Tensor:
    return (z.double()[:, None] - codes.detach().double()).square().sum(dim=2).argmin(dim=1)


# -- Q1 to Q3 -------------------------------------------------------------------------------------------------------


def test_q1_straight_through_gradient_is_the_upstream_gradient():
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    (gradient,) = torch.autograd.grad(initialised(z.detach())(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_q1_no_gradient_of_the_output_reaches_the_codes():
    z = torch.randn(200, 8, requires_grad=True)
    quantizer = initialised(z.detach())
    assert torch.autograd.grad(quantizer(z).z_q.sum(), quantizer.embedding, allow_unused=True) == (None,)


def test_q2_losses_are_mean_squared_distances_to_the_nearest_code():
    z = torch.randn(200, 8)
    quantizer = initialised(z)
    nearest = quantizer.embedding.detach().double()[brute_indices(z, quantizer.embedding)]
    expected = float((z.double() - nearest).square().mean())
    losses = quantizer(z).losses
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"codebook": expected, "commitment": expected}, rel=1e-6
    )


def test_q2_codebook_loss_moves_codes_only_and_commitment_latents_only():
    z = torch.randn(200, 8, requires_grad=True)
    quantizer = initialised(z.detach())
    difference = z.detach() - quantizer.embedding.detach()[brute_indices(z.detach(), quantizer.embedding)]
    losses = quantizer(z).losses
    to_codes = torch.autograd.grad(losses["codebook"], (quantizer.embedding, z), allow_unused=True)
    to_latents = torch.autograd.grad(losses["commitment"], (quantizer.embedding, z), allow_unused=True)
    assert to_codes[1] is None
    assert to_latents[0] is None
    torch.testing.assert_close(to_codes[0].sum(dim=0), -2 * difference.sum(dim=0) / z.numel())
    torch.testing.assert_close(to_latents[1], 2 * difference / z.numel())


@pytest.mark.parametrize("dim", [4, 16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_q3_indices_are_the_float64_argmin(dim, mode):
    z = torch.randn(1000, dim)
    quantizer = initialised(z, 64).train(mode == "train")
    assert torch.equal(quantizer(z).indices, brute_indices(z, quantizer.embedding))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_output_is_the_nearest_code(gradient):
    z = torch.randn(300, 8)
    quantizer = initialised(z, gradient=gradient)
    out = quantizer(z)
    torch.testing.assert_close(out.z_q, quantizer.embedding[out.indices], rtol=0, atol=5e-6)


def test_output_is_a_row_of_the_codebook_bitwise():
    z = torch.randn(300, 8)
    quantizer = initialised(z)
    out = quantizer(z)
    assert torch.equal(out.z_q, quantizer.embedding[out.indices])


# -- initialisation -------------------------------------------------------------------------------------------------


def test_kmeans_init_errs_less_than_random_codes():
    z = 3 + 0.5 * torch.randn(2000, 8)
    quantizer = VQVAE(VQVAEConfig(codebook_size=32, dim=8))
    random, drawn = (partial_sums(z, codes).squared_error for codes in (quantizer.embedding.detach(), z[:32]))
    quantizer(z)
    fitted = partial_sums(z, quantizer.embedding.detach()).squared_error
    assert fitted < 0.9 * drawn
    assert fitted < 0.1 * random


def test_only_the_first_batch_initialises():
    z = torch.randn(500, 8)
    quantizer = initialised(z)
    before = quantizer.embedding.detach().clone()
    quantizer(5 + z)
    assert torch.equal(quantizer.embedding, before)


def test_an_empty_first_batch_does_not_count():
    quantizer = VQVAE(VQVAEConfig(codebook_size=4, dim=8))
    quantizer(torch.empty(0, 8))
    assert not quantizer.initialised
    quantizer(torch.full((10, 8), 7.0))
    assert (quantizer.embedding == 7).all()


@pytest.mark.parametrize("count", [1, 3, 20, 31])
def test_fewer_latents_than_codes_give_all_codes_finite(count):
    z = torch.randn(count, 8)
    quantizer = initialised(z, 32)
    assert quantizer.embedding.shape == (32, 8)
    assert quantizer.embedding.isfinite().all()
    assert quantizer(z).losses["codebook"].item() == pytest.approx(0, abs=1e-10)


def test_eval_does_not_initialise():
    quantizer = VQVAE(VQVAEConfig(codebook_size=4, dim=8)).eval()
    before = quantizer.embedding.detach().clone()
    quantizer(torch.randn(100, 8))
    assert torch.equal(quantizer.embedding, before)


def test_training_lowers_the_error():
    z = 1 + torch.randn(2000, 4)
    quantizer = initialised(torch.randn(50, 4))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=50.0)
    errors = []
    for _ in range(20):
        loss = quantizer(z).losses["codebook"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.8 * errors[0]


# -- the rotation trick ---------------------------------------------------------------------------------------------


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def rotated_gradient(z: Tensor, e: Tensor, upstream: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(rotate_to(z, e), z, upstream)[0]


def test_rotation_gives_the_code():
    z, e = torch.randn(500, 8), torch.randn(500, 8)
    torch.testing.assert_close(rotate_to(z, e), e, rtol=0, atol=1e-5)


def test_rotated_gradient_is_scaled_by_the_ratio_of_lengths():
    z, e, upstream = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 8)
    ratio = rotated_gradient(z, e, upstream).norm(dim=1) / upstream.norm(dim=1)
    torch.testing.assert_close(ratio, e.norm(dim=1) / z.norm(dim=1), rtol=1e-4, atol=0)


def test_rotated_gradient_keeps_its_angle_to_the_latent():
    z, e, upstream = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 8)
    found = cosines(rotated_gradient(z, e, upstream), z)
    torch.testing.assert_close(found, cosines(upstream, e), rtol=0, atol=1e-4)


def test_rotation_by_a_right_angle_solved_by_hand():
    """z = (2, 0) becomes e = (0, 1): a quarter turn to the left, halved; back, the gradient turns to the right."""
    z, e = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(rotated_gradient(z, e, torch.tensor([[0.0, 1.0]])), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(rotated_gradient(z, e, torch.tensor([[1.0, 0.0]])), torch.tensor([[0.0, -0.5]]))


def test_rotation_of_a_latent_onto_itself_is_the_identity():
    z, upstream = torch.randn(50, 8), torch.randn(50, 8)
    torch.testing.assert_close(rotated_gradient(z, z, upstream), upstream)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4])
def test_rotation_gives_the_code_also_where_it_points_the_other_way(noise):
    e = torch.randn(500, 8)
    z = -1.3 * e + noise * torch.randn(500, 8)
    torch.testing.assert_close(rotate_to(z, e), e, rtol=0, atol=1e-5)


def test_rotation_of_a_zero_latent_gives_the_code_and_a_gradient_of_the_upstreams_size():
    z, e, upstream = torch.zeros(50, 8), torch.randn(50, 8), torch.randn(50, 8)
    assert rotated_gradient(z, e, upstream).norm() < 10 * upstream.norm()
    torch.testing.assert_close(rotate_to(z, e), e)


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match="'gumbel'; choose one of: straight_through, rotation"):
        VQVAEConfig(gradient="gumbel")
