"""SQ-VAE (Gaussian I): tests S1 to S5 of the method."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.sq_vae import SQVAE, SQVAEConfig
from tokenizer.training.recipe import Recipe
from tokenizer.training.step import Trainer, known_losses


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def with_codes(codes: Tensor, **settings) -> SQVAE:
    """A quantizer with these codes, as if trained."""
    quantizer = SQVAE(SQVAEConfig(codebook_size=len(codes), dim=codes.shape[1], **settings))
    quantizer.embedding.data.copy_(codes)
    quantizer.initialised.fill_(True)
    return quantizer


def probabilities(z: Tensor, codes: Tensor, variance: float) -> Tensor:
    """softmax(-|z - e|^2 / (2 s)), computed directly in float64. Source: sony/sqvae, vision/quantizer.py."""
    squared = (z.double()[:, None] - codes.double()).square().sum(dim=2)
    return (-squared / (2 * variance)).softmax(dim=1)


def test_s1_a_cold_choice_among_codes_far_apart_is_the_nearest():
    codes, z = 100 * torch.randn(32, 8), 100 * torch.randn(500, 8)
    quantizer = with_codes(codes, temperature_start=1e-3)
    quantizer.theta.data.fill_(0.0)  # logits are in the hundreds, so noise of about 1 has no effect
    squared = torch.cdist(z, codes).square().sort(dim=1).values
    clear = squared[:, 1] - squared[:, 0] > 4 * 30
    nearest = codes[nearest_codeword(z, codes)]
    torch.testing.assert_close(quantizer(z).z_q.detach()[clear], nearest[clear], rtol=0, atol=1e-3)
    assert clear.float().mean() > 0.9


def test_s1_eval_is_the_nearest_code_whatever_the_variance():
    codes, z = torch.randn(32, 8), torch.randn(500, 8)
    quantizer = with_codes(codes).eval()
    quantizer.theta.data.fill_(10.0)
    assert torch.equal(quantizer(z).indices, nearest_codeword(z, codes))
    assert torch.equal(quantizer(z).z_q, codes[quantizer(z).indices])


@pytest.mark.parametrize(("spread", "expected"), [(0.0, -math.log(32)), (1000.0, 0.0)])
def test_s2_discrete_kl_is_minus_log_k_for_equal_codes_and_0_for_distant_codes(spread, expected):
    loss = with_codes(spread * torch.randn(32, 8))(torch.randn(500, 8)).losses["kl_discrete"].item()
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_s2_discrete_kl_lies_between_minus_log_k_and_0(spread):
    loss = with_codes(spread * torch.randn(32, 8))(torch.randn(500, 8)).losses["kl_discrete"].item()
    assert -math.log(32) < loss < 0


def test_s3_the_gradient_reaches_all_codes():
    quantizer = with_codes(torch.randn(64, 8))
    quantizer(torch.randn(200, 8)).z_q.square().sum().backward()
    assert (quantizer.embedding.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("theta", [-5.0, math.log(20), 5.0])
def test_s4_losses_are_those_computed_directly(theta):
    z, codes, variance = torch.randn(200, 8), torch.randn(32, 8), 1 + math.exp(theta)
    quantizer = with_codes(codes)
    quantizer.theta.data.fill_(theta)
    out = quantizer(z)
    p = probabilities(z, codes, variance)
    expected = {
        "kl_discrete": (p * p.log()).sum(dim=1).mean().item(),
        "kl_continuous": ((z - out.z_q.detach()).double().square().sum(dim=1) / (2 * variance)).mean().item(),
    }
    assert {name: loss.item() for name, loss in out.losses.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("multipliers", "tokens"), [([1, 1], 256), ([1, 1, 1], 64)])
def test_s4_default_weights_are_the_official_objective_over_half_of_the_pixels(multipliers, tokens):
    """D_x/2 ln(squared error) + (sum over T tokens) for a 32 x 32 picture at factors 2 and 4, up to a constant."""
    net = {"name": "vqgan", "width": 8, "multipliers": multipliers, "res_blocks": 1, "channels": 8, "attention": False}
    autoencoder = Autoencoder({"modality": "image", "net": net, "quantizer": {"name": "sq_vae", "dim": 4}})
    pixels, mse, discrete, continuous = 3 * 32 * 32, 0.01, -2.0, 3.0
    official = pixels / 2 * math.log(pixels * mse) + tokens * (discrete + continuous)
    weights = known_losses(autoencoder, build_modality("image", {}))
    ours = math.log(mse) + weights["kl_discrete"] * discrete + weights["kl_continuous"] * continuous
    assert official / (pixels / 2) - math.log(pixels) == pytest.approx(ours)


def test_s5_variance_starts_at_21_and_stays_above_1():
    quantizer = with_codes(torch.randn(4, 2))
    assert quantizer.variance.item() == pytest.approx(21, rel=1e-6)
    for theta in (-10.0, 0.0, 10.0):
        quantizer.theta.data.fill_(theta)
        assert quantizer.variance.item() > 1


def test_the_variance_shrinks_with_the_error_that_it_describes():
    """The paper calls this self-annealing: small errors lead to a small variance."""
    codes = 10 * torch.randn(32, 8)
    quantizer = with_codes(codes)
    z = codes[torch.randint(32, (500,))] + 0.01 * torch.randn(500, 8)
    optimizer = torch.optim.Adam([quantizer.theta], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        quantizer(z).z_q.sub(z).square().mean().backward()
        optimizer.step()
    assert quantizer.variance.item() < 10


def test_codes_start_as_normal_numbers_whatever_the_first_batch():
    quantizer = SQVAE(SQVAEConfig(codebook_size=1000, dim=8))
    before = quantizer.embedding.detach().clone()
    quantizer(50 + torch.randn(100, 8))
    assert torch.equal(quantizer.embedding, before)
    assert before.std().item() == pytest.approx(1, abs=0.05)


def test_shares_count_the_hard_codes_that_the_official_evaluation_counts():
    """With a variance of 21 the probabilities are nearly uniform, but the usage of hard codes is not."""
    z, codes = torch.randn(300, 8), torch.randn(16, 8)
    chosen = torch.cdist(z.double(), codes.double()).argmin(dim=1)
    expected = torch.bincount(chosen, minlength=16) / 300
    assert torch.equal(with_codes(codes).code_shares(z), expected)
    assert probabilities(z, codes, 21.0).mean(dim=0).max() < 0.5 * expected.max()


def test_theta_starts_and_moves_as_its_settings_say():
    """Adam's first step is as large as its learning rate, whatever the gradient."""
    net = {"name": "resnet32", "channels": 8, "res_blocks": 1}
    for theta_lr in (1.0, 30.0):
        quantizer = {"name": "sq_vae", "codebook_size": 16, "dim": 4, "theta_start": -2.0, "theta_lr": theta_lr}
        autoencoder = Autoencoder({"modality": "image", "net": net, "quantizer": quantizer})
        recipe = Recipe(steps=10, lr=1e-3, warmup_steps=0, weight_decay=0.0)
        trainer = Trainer(autoencoder, build_modality("image", {}), recipe, "cpu")
        trainer.update(torch.rand(2, 3, 16, 16), 0)
        assert abs(autoencoder.quantizer.theta.item() + 2.0) == pytest.approx(1e-3 * theta_lr, rel=0.02)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature_start", 0.0), ("temperature_decay", -1.0), ("theta_start", math.inf), ("theta_lr", 0.0)],
)
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ValueError, match=f"quantizer.{key} is {value}; it must be"):
        SQVAEConfig(**{key: value})
