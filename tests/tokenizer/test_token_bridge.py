"""TokenBridge: tests T1 to T5, training as a KL autoencoder, and the measurements of `fit`."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.token_bridge import TokenBridge, TokenBridgeConfig, bin_values


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(**settings) -> TokenBridge:
    return TokenBridge(TokenBridgeConfig(**settings))


def posterior(means: Tensor, log_variance: float = -4.0) -> Tensor:
    return torch.cat([means, torch.full_like(means, log_variance)], dim=1)


def fitted(means: Tensor, **settings) -> TokenBridge:
    quantizer = built(dim=means.shape[1], **settings).eval()
    quantizer.fit(posterior(means))
    return quantizer


def rms_error(bins: int, x: Tensor) -> float:
    values = bin_values(bins)
    return float((x[:, None] - values).abs().min(dim=1).values.square().mean().sqrt())


# -- T1 to T5: the grid ---------------------------------------------------------------------------------------------


def test_t1_values_of_four_bins_are_the_conditional_means_cut_off_at_3():
    torch.testing.assert_close(bin_values(4), torch.tensor([-1.2602, -0.3247, 0.3247, 1.2602]), rtol=0, atol=1e-4)


def test_t1_values_are_the_means_of_normal_draws_in_equally_likely_bins():
    x = torch.randn(1_000_000)
    x = x[x.abs() < 3]
    bins = (8 * torch.special.ndtr(x)).long()
    means = torch.bincount(bins, weights=x) / torch.bincount(bins)
    torch.testing.assert_close(bin_values(8), means, rtol=0, atol=0.01)


@pytest.mark.parametrize("bins", [2, 3, 4, 64, 512])
def test_t2_values_are_antisymmetric_and_ascend(bins):
    values = bin_values(bins)
    assert torch.equal(values, -values.flip(0))
    assert (values.diff() > 0).all()
    assert values.abs().max() < 3


def test_t3_nearest_values_are_not_equally_likely_bins():
    z = posterior(torch.randn(200_000, 1))
    quantizer = fitted(z[:, :1])
    shares = quantizer.code_shares(z)
    torch.testing.assert_close(shares, torch.tensor([0.2135, 0.2865, 0.2865, 0.2135]), rtol=0, atol=0.004)


def test_t4_the_error_falls_as_one_over_the_number_of_bins():
    x = torch.linspace(-1, 1, 10_000)  # in the tails the error falls more slowly
    assert rms_error(16, x) / rms_error(64, x) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("bins", "dim"), [(4, 5), (3, 4), (64, 3)])
def test_t5_every_index_survives_decode_and_encode(bins, dim):
    quantizer = fitted(3 + 2 * torch.randn(1000, dim), bins=bins)
    indices = torch.arange(0, quantizer.codebook_size, 7)
    assert torch.equal(quantizer.encode(posterior(quantizer.decode(indices))), indices)


def test_encode_takes_the_nearest_code():
    means = torch.tensor([5.0, -1.0, 0.0]) + torch.tensor([0.1, 3.0, 1.0]) * torch.randn(500, 3)
    quantizer = fitted(means)
    apart = (means - quantizer.latent_mean) / quantizer.latent_std
    codes = (quantizer.codebook - quantizer.latent_mean) / quantizer.latent_std
    assert torch.equal(quantizer.encode(posterior(means)), (apart[:, None] - codes).square().sum(dim=2).argmin(dim=1))


def test_the_first_dimension_is_the_least_significant():
    """By hand, with four bins: the highest value in the first of two dims and the lowest in the second is 3 + 4 * 0."""
    quantizer = fitted(torch.randn(1000, 2))
    assert quantizer.encode(posterior(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))).tolist() == [3, 12]
    assert quantizer.index_levels == (4, 4)


# -- training -------------------------------------------------------------------------------------------------------


def test_kl_equals_that_of_torch_distributions():
    z = torch.randn(50, 10)
    standard = torch.distributions.Normal(0.0, 1.0)
    law = torch.distributions.Normal(z[:, :5], (z[:, 5:] / 2).exp())
    expected = torch.distributions.kl_divergence(law, standard).mean()
    torch.testing.assert_close(built()(z).losses["kl"], expected)


def test_kl_of_the_prior_is_zero():
    assert built()(torch.zeros(50, 10)).losses["kl"] == 0


def test_training_samples_the_posterior():
    z = posterior(torch.full((20_000, 5), 2.0), math.log(0.25))
    out = built()(z)
    assert float(out.z_q.mean()) == pytest.approx(2.0, abs=0.01)
    assert float(out.z_q.std()) == pytest.approx(0.5, abs=0.01)
    assert float(out.metrics["posterior_std"]) == pytest.approx(0.5)
    assert out.indices is None


def test_gradient_reaches_mean_and_log_variance():
    z = torch.randn(50, 10, requires_grad=True)
    built()(z).z_q.sum().backward()
    assert torch.equal(z.grad[:, :5], torch.ones(50, 5))
    assert (z.grad[:, 5:] != 0).all()


def test_extreme_log_variances_stay_finite():
    z = torch.tensor([[0.0, 1e6], [0.0, -1e6]], requires_grad=True)
    out = built(dim=1)(z)
    (out.z_q.sum() + out.losses["kl"]).backward()
    assert out.z_q.isfinite().all()
    assert z.grad.isfinite().all()


# -- before and after fit -------------------------------------------------------------------------------------------


def test_before_fit_eval_hands_on_the_mean():
    z = torch.randn(50, 10)
    out = built().eval()(z)
    assert torch.equal(out.z_q, z[:, :5])
    assert out.indices is None


@pytest.mark.parametrize("ask", [lambda q: q.encode(torch.randn(3, 10)), lambda q: q.decode(torch.arange(3))])
def test_before_fit_indices_are_refused(ask):
    with pytest.raises(CodebookMissing, match="tokenmill codebook"):
        ask(built())


def test_fit_measures_the_means_not_the_samples():
    means = torch.tensor([5.0, -1.0]) + torch.tensor([0.1, 3.0]) * torch.randn(5000, 2)
    quantizer = fitted(means)
    torch.testing.assert_close(quantizer.latent_mean, means.mean(dim=0))
    torch.testing.assert_close(quantizer.latent_std, means.std(dim=0, correction=0))


def test_the_error_does_not_depend_on_the_scale_of_the_latents():
    means = torch.randn(5000, 3)
    errors = [(fitted(a * means)(posterior(a * means)).z_q / a - means).square().mean() for a in (0.01, 1.0, 100.0)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(errors[2], errors[1], rtol=1e-4, atol=0)


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="at least one latent"):
        built().fit(torch.empty(0, 10))


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "dim"), [(256, 4), (1024, 5), (4096, 6), (16384, 7)])
def test_four_bins_have_the_dims_of_the_papers_baseline(asked, dim):
    quantizer = built(codebook_size=asked)
    assert (quantizer.dim, quantizer.in_dim, quantizer.codebook_size) == (dim, 2 * dim, asked)


def test_a_size_that_is_no_power_of_bins_is_approximated():
    quantizer = built(codebook_size=1000, bins=4)
    assert (quantizer.codebook_size, quantizer.target_size) == (1024, 1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 1}, r"quantizer\.bins is 1; it must lie in 2\.\.512"),
        ({"bins": 1000}, r"quantizer\.bins is 1000"),
        ({"codebook_size": 1}, r"quantizer\.codebook_size is 1"),
        ({"bins": 64, "dim": 16}, "at most 2147483648 are possible"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenBridgeConfig(**settings)
