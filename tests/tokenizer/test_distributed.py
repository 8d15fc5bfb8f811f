"""Two real processes over gloo, compared to one process with the concatenated batch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tokenizer.ranks import RANKS, measured_by_ranks
from tokenizer.distributed import gather_rows, mean_across_ranks, world_size
from tokenizer.quantizers.base.norm_loss import latent_norm_losses
from tokenizer.quantizers.ema_vq import EMAVQ, EMAVQConfig
from tokenizer.quantizers.vp_vae import VPVAE, VPVAEConfig
from tokenizer.quantizers.vq_vae import VQVAE, VQVAEConfig

ROWS = 300


def batch(rank: int, step: int = 0) -> Tensor:
    """The latents of the ranks differ, including their mean and standard deviation."""
    z = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1000 * step + rank))
    return rank + (1 + rank) * z


def whole(step: int = 0) -> Tensor:
    return torch.cat([batch(rank, step) for rank in range(RANKS)])


def vp_vae() -> VPVAE:
    # a queue of 1,024. A tenth of the 2 * 30 latents per step wait, and enter the queue once 5 are waiting
    return VPVAE(VPVAEConfig(codebook_size=16, dim=4, eta="auto", update_probability=0.1))


VQ_OPTIONS: dict[str, dict[str, Any]] = {
    "replace": {"replace_after": 2},
    "replace_l2_affine": {"replace_after": 2, "l2": True, "affine": 10.0},
    "alternating": {"alternating_lr": 20.0},
    "alternating_l2_affine": {"alternating_lr": 20.0, "l2": True, "affine": 10.0},
    "both": {"replace_after": 2, "alternating_lr": 20.0},
}


def vq_steps(settings: dict[str, Any], batches: list[Tensor]) -> dict[str, Any]:
    """The state of a VQ-VAE with more codes than the latents keep in use, and the rows replaced in each step."""
    quantizer, rows = VQVAE(VQVAEConfig(codebook_size=200, dim=4, **settings)), []
    for z in batches:
        quantizer(z)
        rows.append(quantizer.overwritten_rows().get("embedding", torch.zeros(0, dtype=torch.int64)))
    return {"state": quantizer.state_dict(), "rows": rows, "codebook": quantizer.codebook}


def ema_steps(batches: list[Tensor]) -> dict[str, Any]:
    """The state of an EMA VQ-VAE after these steps, and how many codes each of them revived."""
    quantizer = EMAVQ(EMAVQConfig(codebook_size=100, dim=4, decay=0.5, revive_below=2.0))
    revived = [float(quantizer(z).metrics["revived"]) for z in batches]
    return {"state": quantizer.state_dict(), "revived": revived}


def measure(rank: int) -> dict[str, Any]:
    """All results of one rank for the tests below."""
    found: dict[str, Any] = {"world_size": world_size(), "rows": gather_rows(batch(rank))}

    x = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    mean = mean_across_ranks(x)
    mean.square().sum().backward()
    found["mean"], found["mean_gradient"] = mean.detach(), x.grad

    z = batch(rank).requires_grad_()
    losses = latent_norm_losses(z, variance=1.0)
    sum(losses.values()).backward()
    found["losses"], found["loss_gradient"] = {k: v.detach() for k, v in losses.items()}, z.grad

    vq = VQVAE(VQVAEConfig(codebook_size=16, dim=4))
    vq(batch(rank))
    found["vq_codes"] = vq.embedding.detach()

    for name, settings in VQ_OPTIONS.items():
        torch.manual_seed(rank)
        found[f"vq_{name}"] = vq_steps(settings, [batch(rank, step) for step in range(4)])

    torch.manual_seed(rank)
    found["ema"] = ema_steps([batch(rank), batch(rank), batch(rank) + 20, batch(rank) + 20])

    vp = vp_vae()
    torch.manual_seed(rank)  # as in training: each rank draws its own noise
    outs = [vp(batch(rank, step)) for step in range(8)]
    found["vp_state"] = vp.state_dict()
    found["vp_metrics"] = outs[-1].metrics
    found["vp_perturbation"] = outs[-1].z_q - batch(rank, 7)
    found["vp_losses"] = outs[-1].losses
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both ranks."""
    return measured_by_ranks(measure, tmp_path_factory.mktemp("ranks"))


def test_world_size_is_not_cached(ranks):
    assert [found["world_size"] for found in ranks] == [2, 2]
    assert world_size() == 1


def test_one_process_is_its_own_mean_and_its_own_rows():
    x = torch.randn(3, 2, requires_grad=True)
    assert mean_across_ranks(x) is x
    assert torch.equal(gather_rows(x), x)
    assert not gather_rows(x).requires_grad


def test_rows_come_in_rank_order(ranks):
    for found in ranks:
        assert torch.equal(found["rows"], whole())


def test_mean_is_that_of_both_ranks(ranks):
    """Solved by hand: (1 + 2) / 2 and (10 + 10) / 2."""
    for found in ranks:
        assert found["mean"].tolist() == [1.5, 10.0]


def test_gradient_of_the_mean_reaches_every_rank(ranks):
    """By hand: each rank has the loss |m|^2, so the sum of both is 2 |m|^2 and its gradient 2 * 2 m / 2 = 2 m.

    DDP then takes the mean of the ranks' gradients, which is what one process would have had.
    """
    for found in ranks:
        assert found["mean_gradient"].tolist() == [3.0, 20.0]


@pytest.mark.parametrize("name", ["norm_mean", "norm_var"])
def test_latent_norm_losses_are_those_of_the_whole_batch(ranks, name):
    expected = latent_norm_losses(whole(), variance=1.0)[name]
    alone = latent_norm_losses(batch(0), variance=1.0)[name]
    for found in ranks:
        torch.testing.assert_close(found["losses"][name], expected)
    assert not math.isclose(expected, alone, rel_tol=0.1)


def test_latent_norm_gradients_averaged_by_ddp_are_those_of_the_whole_batch(ranks):
    z = whole().requires_grad_()
    sum(latent_norm_losses(z, variance=1.0).values()).backward()
    torch.testing.assert_close(torch.cat([found["loss_gradient"] for found in ranks]) / RANKS, z.grad)


def test_vq_vae_starts_with_the_same_codes_on_every_rank(ranks):
    assert torch.equal(ranks[0]["vq_codes"], ranks[1]["vq_codes"])


def test_vq_vae_starts_from_the_latents_of_all_ranks(ranks):
    alone = VQVAE(VQVAEConfig(codebook_size=16, dim=4))
    alone(whole())
    torch.testing.assert_close(ranks[0]["vq_codes"], alone.embedding.detach())


@pytest.mark.parametrize("name", VQ_OPTIONS)
def test_vq_vae_replaced_codes_are_the_same_on_every_rank(ranks, name):
    """The ranks draw different random numbers, and rank 0's decide."""
    first, second = (found[f"vq_{name}"] for found in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first["rows"], second["rows"], strict=True))
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])


@pytest.mark.parametrize("name", ["alternating", "alternating_l2_affine"])
def test_vq_vae_alternating_steps_are_those_of_the_whole_batch(ranks, name):
    alone = vq_steps(VQ_OPTIONS[name], [whole(step) for step in range(4)])
    for key in ("embedding", "velocity"):
        torch.testing.assert_close(ranks[0][f"vq_{name}"]["state"][key], alone["state"][key], rtol=1e-4, atol=1e-5)
    assert alone["state"]["velocity"].any()


@pytest.mark.parametrize("name", ["replace", "replace_l2_affine", "both"])
def test_vq_vae_first_replaces_the_codes_that_the_whole_batch_left_unused(ranks, name):
    """k-means leaves no code unused in the first batch, so the first replacement happens in the third step."""
    alone = vq_steps(VQ_OPTIONS[name], [whole(step) for step in range(3)])
    found = ranks[0][f"vq_{name}"]["rows"]
    assert len(found[2]) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, alone["rows"], strict=False))


@pytest.mark.parametrize("name", ["replace", "both"])
def test_vq_vae_new_codes_are_latents_of_either_rank(ranks, name):
    found = ranks[0][f"vq_{name}"]
    last = whole(3)
    distances = torch.cdist(found["codebook"][found["rows"][3]], last) / last.norm(dim=1)
    assert distances.min(dim=1).values.max() < 0.05
    assert {int(index) // ROWS for index in distances.argmin(dim=1)} == {0, 1}


def test_ema_vq_codes_revived_are_the_same_on_every_rank(ranks):
    """The ranks draw different random numbers, and rank 0's decide."""
    first, second = (found["ema"] for found in ranks)
    assert first["revived"] == second["revived"]
    assert first["revived"][-1] > 10
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])


def test_ema_vq_codes_are_revived_from_latents_of_either_rank(ranks):
    found = ranks[0]["ema"]
    last = whole() + 20
    same = (found["state"]["embedding"][:, None] == last).all(dim=2)
    assert int(same.any(dim=1).sum()) >= found["revived"][-1]
    assert {int(index) // ROWS for index in same.nonzero()[:, 1]} == {0, 1}


def test_ema_vq_use_is_counted_over_both_ranks(ranks):
    """A revived code counts as one of 100 codes for 2 * 300 latents."""
    codes = ranks[0]["ema"]["state"]
    same = (codes["embedding"][:, None] == whole() + 20).all(dim=2).any(dim=1)
    assert (codes["cluster_size"][same] == 6).sum() == ranks[0]["ema"]["revived"][-1]


@pytest.mark.parametrize("name", ["queue.samples", "queue.filled", "queue.head", "queue.waiting", "queue.num_waiting"])
def test_vp_vae_queues_stay_equal(ranks, name):
    assert torch.equal(ranks[0]["vp_state"][name], ranks[1]["vp_state"][name])


def test_vp_vae_queue_holds_latents_of_both_ranks(ranks):
    assert int(ranks[0]["vp_state"]["queue.filled"]) == 1024
    samples = ranks[0]["vp_state"]["queue.samples"]
    for rank in range(RANKS):
        known = torch.cat([batch(rank, step) for step in range(8)])
        share = (samples[:, None] == known).all(dim=2).any(dim=1).float().mean()
        assert share == pytest.approx(0.5, abs=0.1)


def test_vp_vae_eta_follows_the_mean_over_ranks_and_stays_equal(ranks):
    assert torch.equal(ranks[0]["vp_state"]["log_eta"], ranks[1]["vp_state"]["log_eta"])
    assert float(ranks[0]["vp_state"]["log_eta"]) != 0
    assert ranks[0]["vp_metrics"] == ranks[1]["vp_metrics"]


def test_vp_vae_noise_differs_between_ranks(ranks):
    first, second = (found["vp_perturbation"] for found in ranks)
    both = (first != 0).any(dim=1) & (second != 0).any(dim=1)
    assert both.any()
    assert torch.nn.functional.cosine_similarity(first[both], second[both]).mean().abs() < 0.2


def test_vp_vae_losses_are_those_of_the_whole_batch(ranks):
    expected = latent_norm_losses(whole(7), variance=1.0)
    for found in ranks:
        torch.testing.assert_close(found["vp_losses"], expected)
