"""GM-VQ: tests M3 to M6 of the method (M1 and M2 are in test_soft.py), its losses, noise and edges."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.tokenizer.ranks import RANKS, measured_by_ranks
from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.kmeans import kmeans
from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.gm_vq import GMVQ, GMVQConfig
from tokenizer.training.recipe import Recipe
from tokenizer.training.step import Trainer, known_losses

L = 8


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def with_codes(codes: Tensor, **settings) -> GMVQ:
    """A quantizer with these codes, as if trained."""
    quantizer = GMVQ(GMVQConfig(codebook_size=len(codes), dim=codes.shape[1], **settings))
    quantizer.embedding.data.copy_(codes)
    quantizer.initialised.fill_(True)
    return quantizer


def distances(z_hat: Tensor, codes: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Weighted squared distances [N, K], directly, in float64."""
    weights = weights.double()[:, None] if isinstance(weights, Tensor) else weights
    return (weights * (z_hat.double()[:, None] - codes.double()).square()).sum(dim=2)


# -- start ----------------------------------------------------------------------------------------------------------


def test_codes_start_from_k_means_over_the_first_half_of_the_channels():
    z = torch.randn(500, 2 * L)
    quantizer = GMVQ(GMVQConfig(codebook_size=16, dim=L))
    quantizer(z)
    assert torch.equal(quantizer.embedding, kmeans(z[:, :L].clone(), 16, max_iterations=20).centroids)
    quantizer(z + 5)  # only the first batch
    assert quantizer.embedding.abs().max() < 5


# -- M3 and M4 ------------------------------------------------------------------------------------------------------


def test_m3_every_code_has_a_finite_gradient_in_one_step():
    quantizer = with_codes(torch.randn(64, L))
    quantizer(torch.randn(200, 2 * L)).z_q.square().sum().backward()
    assert quantizer.embedding.grad.isfinite().all()
    assert (quantizer.embedding.grad.abs().sum(dim=1) > 0).all()


def test_m4_temperature_goes_from_start_to_end():
    quantizer = with_codes(torch.randn(16, L), anneal_steps=5)
    z = torch.randn(10, 2 * L)
    found = [quantizer(z).metrics["temperature"].item() for _ in range(7)]
    assert found[0] == pytest.approx(2.0, abs=1e-6)
    assert found[5:] == pytest.approx([0.1, 0.1], abs=1e-6)
    assert found[:6] == sorted(found[:6], reverse=True)


# -- M5: the index --------------------------------------------------------------------------------------------------


def test_m5_eval_gives_rows_of_the_codebook_without_noise():
    codes = torch.randn(64, L)
    out = with_codes(codes).eval()(torch.randn(200, 2 * L))
    assert torch.equal(out.z_q, codes[out.indices])


@pytest.mark.parametrize("raw", [-3.0, 0.0, 4.0])
def test_m5_constant_weights_give_the_nearest_code(raw):
    z_hat, codes = torch.randn(2000, L), torch.randn(64, L)
    z = torch.cat([z_hat, torch.full_like(z_hat, raw)], dim=1)
    assert torch.equal(with_codes(codes).encode(z), nearest_codeword(z_hat, codes))


def test_m5_the_index_is_the_least_weighted_distance():
    z, codes = 2 * torch.randn(2000, 2 * L), torch.randn(64, L)
    expected = distances(z[:, :L], codes, softplus(z[:, L:])).argmin(dim=1)
    found = with_codes(codes).encode(z)
    assert torch.equal(found, expected)
    assert (found != nearest_codeword(z[:, :L], codes)).float().mean() > 0.1  # the weights do matter


def test_a_dimension_of_no_weight_has_no_say():
    """By hand: the first dimension is closest to code 0. The second one, which has all the weight, to code 1."""
    quantizer = with_codes(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert quantizer.encode(torch.tensor([[0.0, 1.0, -50.0, 0.0]])).tolist() == [1]
    assert quantizer.encode(torch.tensor([[0.0, 1.0, 0.0, -50.0]])).tolist() == [0]


def test_shares_are_the_mean_of_the_weighted_probabilities():
    z, codes = torch.randn(300, 2 * L), torch.randn(16, L)
    expected = (-distances(z[:, :L], codes, softplus(z[:, L:])) / 2).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(with_codes(codes).code_shares(z), expected.float())


# -- the noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.25, 0.5, 2.0])
def test_noise_has_the_variance_of_eq_18(variance):
    """With one code the choice is certain: z is normal around it, with variance |z_hat - mu|^2 / (2 sigma^2 L)."""
    code, z_hat = torch.randn(1, L), torch.randn(1, L)
    z = torch.cat([z_hat, torch.zeros(1, L)], dim=1).expand(100_000, 2 * L)
    noise = with_codes(code, variance=variance)(z).z_q.detach() - code
    expected = (z_hat - code).square().sum() / (2 * variance * L)
    assert noise.mean().abs() < 0.02
    torch.testing.assert_close(noise.var(dim=0), expected.expand(L), rtol=0.03, atol=0)


def test_a_soft_choice_mixes_codes_and_their_variances():
    """At a high temperature y is uniform: z has the mean of all codes, and as variance the mean of eq. 18."""
    codes, z_hat = torch.randn(16, L), torch.randn(1, L)
    quantizer = with_codes(codes, temperature_start=1e6, temperature_end=1e6)
    z_q = quantizer(torch.cat([z_hat, torch.zeros(1, L)], dim=1).expand(50_000, 2 * L)).z_q.detach()
    expected = (distances(z_hat, codes).mean() / L).float()  # variance 1/2
    torch.testing.assert_close(z_q.mean(dim=0), codes.mean(dim=0), rtol=0, atol=0.03)
    torch.testing.assert_close(z_q.var(dim=0), expected.expand(L), rtol=0.05, atol=0)


def test_a_latent_that_is_a_code_has_almost_no_noise_and_a_finite_gradient():
    codes = 100 * torch.eye(L)
    z = torch.cat([codes, torch.full_like(codes, 10.0)], dim=1).requires_grad_()
    quantizer = with_codes(codes)
    out = quantizer(z)
    (out.z_q.square().sum() + sum(out.losses.values())).backward()
    torch.testing.assert_close(out.z_q, codes, rtol=0, atol=0.05)
    assert z.grad.isfinite().all()
    assert quantizer.embedding.grad.isfinite().all()


# -- losses ---------------------------------------------------------------------------------------------------------


def reference_losses(z: Tensor, codes: Tensor, variance: float) -> dict[str, float]:
    """Eq. 10 to 18, computed directly in float64 with all distances."""
    q = (-distances(z[:, :L], codes, softplus(z[:, L:])) / 2).softmax(dim=1)
    latent = (q * distances(z[:, :L], codes)).sum(dim=1) / (2 * variance) / L
    mean = q.mean(dim=0)
    return {"latent": latent.mean().item(), "prior": (mean * (mean * len(codes)).log()).sum().item()}


@pytest.mark.parametrize("variance", [0.25, 0.5])
def test_losses_are_those_computed_directly(variance):
    z, codes = torch.randn(300, 2 * L), torch.randn(16, L)
    losses = with_codes(codes, variance=variance)(z).losses
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(reference_losses(z, codes, variance), rel=1e-5)


def test_latent_loss_is_the_expected_distance_of_noisy_codes():
    """Monte Carlo: c ~ q(c|x), z ~ N(mu_c, sigma_c^2(x)), E |z - mu_c|^2 / L."""
    z, codes = torch.randn(1, 2 * L), torch.randn(16, L)
    q = (-distances(z[:, :L], codes, softplus(z[:, L:])) / 2).softmax(dim=1)[0]
    drawn = torch.multinomial(q, 200_000, replacement=True)
    sigma2 = distances(z[:, :L], codes)[0, drawn] / (2 * 0.5 * L)
    measured = (sigma2[:, None] * torch.randn(len(drawn), L).square()).mean().item()
    assert with_codes(codes)(z).losses["latent"].item() == pytest.approx(measured, rel=0.01)


def test_latent_loss_draws_latents_and_codes_to_each_other():
    z, codes = torch.randn(1, 2 * L, requires_grad=True), torch.randn(1, L)
    quantizer = with_codes(codes)
    quantizer(z).losses["latent"].backward()
    expected = 2 * (z[:, :L].detach() - codes) / L  # one code, variance 1/2
    torch.testing.assert_close(z.grad[:, :L], expected)
    torch.testing.assert_close(quantizer.embedding.grad, -expected)


def test_prior_is_zero_if_all_codes_are_alike_and_log_k_if_one_has_all():
    z = torch.randn(100, 2 * L)
    assert with_codes(torch.zeros(16, L))(z).losses["prior"].item() == pytest.approx(0, abs=1e-6)
    codes = torch.cat([torch.zeros(1, L), torch.full((15, L), 100.0)])
    assert with_codes(codes)(z).losses["prior"].item() == pytest.approx(math.log(16), abs=1e-5)


def test_minimising_the_prior_alone_evens_out_the_codes():
    z = torch.randn(300, 2 * L)
    quantizer = with_codes(3 * torch.randn(16, L))
    optimizer = torch.optim.Adam([quantizer.embedding], lr=0.05)
    before = quantizer(z).metrics["soft_perplexity"]
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(z).losses["prior"].backward()
        optimizer.step()
    assert quantizer(z).metrics["soft_perplexity"] > max(14, before + 2)


def test_the_weights_learn_from_the_reconstruction_and_from_both_losses():
    quantizer = with_codes(torch.randn(16, L))
    z = torch.randn(100, 2 * L, requires_grad=True)
    out = quantizer(z)
    for value in (out.z_q.square().sum(), *out.losses.values()):
        (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
        assert (gradient[:, L:].abs().sum(dim=0) > 0).all()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan])
def test_a_variance_that_is_none_is_refused(variance):
    with pytest.raises(ValueError, match=f"variance is {variance}; it must be a number above 0"):
        GMVQConfig(variance=variance)


# -- M6: two ranks --------------------------------------------------------------------------------------------------


def batch(rank: int) -> Tensor:
    """The ranks' latents differ in mean, spread and number."""
    return rank + (1 + rank) * torch.randn(200 + 100 * rank, 2 * L, generator=torch.Generator().manual_seed(rank))


def prior_and_gradient(z: Tensor) -> dict[str, Any]:
    quantizer = with_codes(torch.randn(16, L, generator=torch.Generator().manual_seed(9)))
    z = z.clone().requires_grad_()
    out = quantizer(z)
    out.losses["prior"].backward()
    values = {"prior": out.losses["prior"].detach(), "perplexity": out.metrics["soft_perplexity"]}
    return {**values, "z": z.grad, "codes": quantizer.embedding.grad}


def measure(rank: int) -> dict[str, Any]:
    return prior_and_gradient(batch(rank))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return measured_by_ranks(measure, tmp_path_factory.mktemp("gm_vq_ranks"))


def test_m6_prior_of_two_ranks_is_that_of_the_whole_batch(ranks):
    whole = prior_and_gradient(torch.cat([batch(rank) for rank in range(RANKS)]))
    for found in ranks:
        assert found["prior"].item() == pytest.approx(whole["prior"].item(), abs=1e-6)
        assert found["perplexity"].item() == pytest.approx(whole["perplexity"].item(), rel=1e-5)
    assert abs(prior_and_gradient(batch(0))["prior"] - whole["prior"]) > 0.01  # one rank alone has another value


def test_m6_gradients_averaged_as_ddp_does_are_those_of_the_whole_batch(ranks):
    whole = prior_and_gradient(torch.cat([batch(rank) for rank in range(RANKS)]))
    torch.testing.assert_close(torch.cat([found["z"] for found in ranks]) / RANKS, whole["z"], rtol=1e-4, atol=1e-7)
    codes = torch.stack([found["codes"] for found in ranks]).mean(dim=0)
    torch.testing.assert_close(codes, whole["codes"], rtol=1e-4, atol=1e-6)


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "size", "beta"), [("resnet32", 32, 1.0), ("resnet32", 64, 5.0), ("vqgan", 32, 1.0)])
def test_the_prior_weighs_beside_the_squared_error_as_where_both_are_sums(net, size, beta):
    """Eq. 13 and 14: squared error summed over the D_x values of a picture + beta KL summed over its T tokens."""
    settings = {"resnet32": {"channels": 8, "res_blocks": 1}, "vqgan": {"width": 8, "multipliers": [1], "channels": 8}}
    quantizer = {"name": "gm_vq", "codebook_size": 16, "dim": 4, "beta": beta}
    autoencoder = Autoencoder({"modality": "image", "net": {"name": net, **settings[net]}, "quantizer": quantizer})
    x = torch.rand(2, 3, size, size)
    z = autoencoder(x).z
    num_values, num_tokens = x[0].numel(), z[0, ..., 0].numel()
    weights = known_losses(autoencoder, build_modality("image", {}))
    mse, kl = 0.01, 2.0
    sums = num_values * mse + beta * num_tokens * kl
    assert num_values * (mse + weights["prior"] * kl) == pytest.approx(sums)


def test_the_prior_weighs_1_48th_at_factor_4_whatever_the_picture_size():
    autoencoder = Autoencoder({"modality": "image", "net": {"name": "resnet32"}, "quantizer": {"name": "gm_vq"}})
    assert known_losses(autoencoder, build_modality("image", {}))["prior"] == pytest.approx(1 / 48)
    recipe = Recipe(loss_weights={"prior": 0.5})
    assert Trainer(autoencoder, build_modality("image", {}), recipe, "cpu").loss_weights["prior"] == 0.5


@pytest.mark.parametrize("beta", [-1.0, math.inf])
def test_a_bad_beta_is_named(beta):
    with pytest.raises(ValueError, match=f"quantizer.beta is {beta}; it must be"):
        GMVQConfig(beta=beta)
