"""EMA VQ-VAE: test Q8, averages compared to numpy, codes without latents, their revival, and sums over ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.config import load_config
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers import ema_vq
from tokenizer.quantizers.base.quantizer import build_quantizer
from tokenizer.quantizers.ema_vq import EMAVQ, EMAVQConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def initialised(z: Tensor, codebook_size: int = 16, **settings) -> EMAVQ:
    quantizer = EMAVQ(EMAVQConfig(codebook_size=codebook_size, dim=z.shape[1], **settings))
    quantizer(z)
    return quantizer


def brute_indices(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ((z[:, None] - codes) ** 2).sum(axis=2).argmin(axis=1)


def test_q8_with_decay_0_codes_are_the_means_of_their_latents():
    z = torch.randn(500, 4)
    quantizer = initialised(torch.randn(500, 4), decay=0.0)
    indices = quantizer(z).indices
    for code in indices.unique():
        torch.testing.assert_close(quantizer.embedding[code], z[indices == code].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_two_updates_equal_a_numpy_reference():
    quantizer = initialised(torch.randn(300, 4), decay=0.9)
    codes, sums, sizes = (
        getattr(quantizer, name).double().numpy() for name in ("embedding", "embedding_sum", "cluster_size")
    )
    for _ in range(2):
        z = torch.randn(40, 4)
        quantizer(z)
        chosen = np.eye(16)[brute_indices(z.double().numpy(), codes)]
        sizes = 0.9 * sizes + 0.1 * chosen.sum(axis=0)
        sums = 0.9 * sums + 0.1 * chosen.T @ z.double().numpy()
        smoothed = (sizes + 1e-5) / (sizes.sum() + 16e-5) * sizes.sum()
        codes = np.where(chosen.sum(axis=0)[:, None] > 0, sums / smoothed[:, None], codes)
    np.testing.assert_allclose(quantizer.embedding.numpy(), codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantizer.cluster_size.numpy(), sizes, rtol=1e-5)


def test_a_batch_sees_the_codes_that_it_chose_not_those_it_makes():
    z = torch.randn(300, 4)
    quantizer = initialised(z, decay=0.5)
    before = quantizer.embedding.clone()
    out = quantizer(torch.randn(300, 4))
    assert torch.equal(out.z_q, before[out.indices])
    assert not torch.equal(quantizer.embedding, before)


def test_a_code_that_no_latent_chose_stays_where_it_is_and_counts_less():
    z = torch.cat([torch.randn(100, 4) - 9, torch.randn(100, 4) + 9])
    quantizer = initialised(z)
    codes, sizes = quantizer.embedding.clone(), quantizer.cluster_size.clone()
    near_minus_9 = codes[:, 0] < 0
    for _ in range(2000):  # .99^2000 of 1 is far below the smoothing
        quantizer(z[100:])
    assert torch.equal(quantizer.embedding[near_minus_9], codes[near_minus_9])
    assert not torch.equal(quantizer.embedding[~near_minus_9], codes[~near_minus_9])
    torch.testing.assert_close(
        quantizer.cluster_size[near_minus_9], sizes[near_minus_9] * 0.99**2000, rtol=1e-3, atol=0
    )


def test_codes_follow_latents_that_move():
    z = torch.randn(500, 4)
    quantizer = initialised(z, decay=0.9)
    for _ in range(100):
        quantizer(z + 0.5)
    assert quantizer(z + 0.5).losses["commitment"] < 1.05 * initialised(z).train()(z).losses["commitment"]


def test_straight_through_gradient_is_the_upstream_gradient():
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    (gradient,) = torch.autograd.grad(initialised(z.detach())(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_rotation_scales_the_gradient_by_the_ratio_of_lengths():
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    out = initialised(z.detach(), gradient="rotation")(z)
    (gradient,) = torch.autograd.grad(out.z_q, z, upstream)
    ratio = out.z_q.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(gradient.norm(dim=1) / upstream.norm(dim=1), ratio.detach(), rtol=1e-4, atol=0)


def test_no_parameter_is_left_for_the_optimizer():
    assert list(initialised(torch.randn(100, 4)).parameters()) == []


def test_the_first_batch_initialises_with_kmeans():
    z = 3 + 0.5 * torch.randn(2000, 8)
    drawn = brute_indices(z.numpy(), z[:16].numpy())
    error = (z - z[:16][drawn]).square().mean()
    assert initialised(z)(z).losses["commitment"] < 0.9 * error


def test_the_average_counts_start_as_those_of_the_first_batch():
    quantizer = initialised(torch.randn(500, 4))
    assert float(quantizer.cluster_size.sum()) == pytest.approx(500)


def test_an_empty_first_batch_does_not_count():
    quantizer = initialised(torch.empty(0, 4))
    assert not quantizer.initialised
    with pytest.raises(CodebookMissing, match="never trained"):
        quantizer.encode(torch.randn(3, 4))


def test_counts_and_sums_are_those_of_all_ranks(monkeypatch):
    """Two simulated ranks: the other has (1, 1) twice, for code 0. By hand: code 0 is (2 + 1 + 1) / 3."""
    quantizer = initialised(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), codebook_size=2, decay=0.0)
    quantizer.embedding.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    monkeypatch.setattr(ema_vq, "world_size", lambda: 2)
    monkeypatch.setattr(
        ema_vq, "mean_across_ranks", lambda x: (x + torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])) / 2
    )
    quantizer(torch.tensor([[2.0, 2.0]]))
    assert quantizer.cluster_size.tolist() == [3, 0]
    torch.testing.assert_close(quantizer.embedding, torch.tensor([[4 / 3, 4 / 3], [9.0, 9.0]]), rtol=1e-4, atol=0)


# -- reviving codes -------------------------------------------------------------------------------------------------


def two_places(**settings) -> tuple[EMAVQ, Tensor, Tensor]:
    """16 codes over latents around -9 and +9, those latents near +9, and which codes lie near -9."""
    z = torch.cat([torch.randn(100, 4) - 9, torch.randn(100, 4) + 9])
    quantizer = initialised(z, **settings)
    return quantizer, z[100:], quantizer.embedding[:, 0] < 0


def test_dead_codes_become_latents_of_the_batch_and_are_chosen_from_then_on():
    quantizer, z, dead = two_places(decay=0.5, revive_below=2.0)
    revived = sum(int(quantizer(z).metrics["revived"]) for _ in range(6))
    assert revived >= int(dead.sum())
    assert (quantizer.embedding > 0).all()
    assert set(quantizer(z).indices.tolist()) == set(range(16))


def test_without_revival_dead_codes_stay_dead():
    """Shows that the test above can fail."""
    quantizer, z, dead = two_places(decay=0.5)
    for _ in range(6):
        assert quantizer(z).metrics == {}
    assert torch.equal(quantizer.embedding[:, 0] < 0, dead)
    assert dead.any()


def test_a_revived_code_starts_with_the_averages_of_its_latent_used_a_fair_share_of_times():
    """By hand: 8 latents for 2 codes are 4 each. The average of code 1 falls from 4 to 2, then to 1, below 1.5."""
    quantizer = initialised(torch.tensor([[0.0], [9.0]]).repeat(4, 1), codebook_size=2, decay=0.5, revive_below=1.5)
    quantizer.embedding.copy_(torch.tensor([[0.0], [9.0]]))
    quantizer.cluster_size.fill_(4.0)
    near_0 = torch.linspace(-1, 1, 8)[:, None]
    assert [float(quantizer(near_0).metrics["revived"]) for _ in range(2)] == [0, 1]
    assert (quantizer.embedding[1] == near_0).any()
    assert quantizer.cluster_size[1] == 4
    assert torch.equal(quantizer.embedding_sum[1], 4 * quantizer.embedding[1])


def test_the_averages_of_the_next_steps_keep_a_revived_code():
    """EnCodec's code only sets the codebook, so the next average moves the dead code back."""
    quantizer, z, dead = two_places(decay=0.9, revive_below=2.0)
    while not quantizer(z).metrics["revived"]:
        pass
    revived = dead & (quantizer.embedding[:, 0] > 0)
    assert revived.any()
    quantizer.config.revive_below = 0.0  # so that only the averages move them
    quantizer(z)
    assert (quantizer.embedding[revived] > 0).all()


def test_a_batch_too_small_for_the_threshold_leaves_codes_of_fair_use_alone():
    """64 clusters, each in every second batch: half a latent per step for each code, below the threshold of 2."""
    z = 10.0 * torch.arange(64.0)[:, None]
    quantizer = initialised(z, codebook_size=64, revive_below=2.0)
    assert sum(float(quantizer(z[step % 2 :: 2]).metrics["revived"]) for step in range(300)) == 0


def test_one_short_batch_revives_nothing():
    quantizer = initialised(torch.randn(500, 4), revive_below=2.0)
    before = quantizer.cluster_size.clone()
    assert quantizer(torch.randn(1, 4)).metrics["revived"] == 0
    assert quantizer(torch.empty(0, 4)).metrics["revived"] == 0
    assert (quantizer.cluster_size >= 0.98 * before).all()


def test_no_two_codes_are_revived_from_one_latent():
    quantizer = initialised(torch.randn(200, 4), decay=0.0, revive_below=2.0)
    z = torch.randn(5, 4) + 50
    assert quantizer(z).metrics["revived"] == 5  # out of the 15 codes that no latent chose
    assert (quantizer.embedding[:, None] == z).all(dim=2).sum(dim=0).tolist() == [1] * 5


def test_a_state_from_before_codes_were_revived_goes_on_with_it():
    quantizer, z, _ = two_places(decay=0.5)
    later = EMAVQ(EMAVQConfig(codebook_size=16, dim=4, decay=0.5, revive_below=2.0))
    later.load_state_dict(quantizer.state_dict())
    assert sum(float(later(z).metrics["revived"]) for _ in range(6)) > 0


def test_the_24_khz_codec_revives_codes():
    settings = load_config([str(ROOT / "configs/sound_24khz.yaml")]).quantizer
    quantizer = build_quantizer({**settings, "codebook_size": 16, "dim": 4})
    assert "revived" in quantizer(torch.randn(100, 4)).metrics


def test_without_revival_training_draws_no_random_number():
    quantizer, z, _ = two_places()
    before = torch.get_rng_state()
    quantizer(z)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings",
    [
        *({"decay": 1.0}, {"decay": -0.1}, {"gradient": "gumbel"}, {"codebook_size": 0}),
        *({"revive_below": -1.0}, {"revive_below": float("nan")}),
    ],
)
def test_a_bad_setting_is_named(settings):
    with pytest.raises(ValueError, match=rf"quantizer\.{next(iter(settings))} is "):
        EMAVQConfig(**settings)
