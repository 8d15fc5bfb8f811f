"""VP-VAE: tests V1 to V6 and V8 of the method (V7, the queue, is in test_queue.py), and its eta rule.

Legend: S the queue's latents, M its latents per code, D_m(z) the distance from z to its m-th nearest in S.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.clustering.kmeans import kmeans
from tokenizer.clustering.latents import LatentBatch
from tokenizer.clustering.neighbors import build_index, nearest_codeword
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.norm_loss import latent_norm_losses
from tokenizer.quantizers.base.quantizer import build_quantizer
from tokenizer.quantizers.vp_vae import VPVAE, BalancingWeights, VPVAEConfig, quantization_error
from tokenizer.usage import usage

DENSITY_K = 8


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def with_queue(samples: Tensor, codebook_size: int, **settings) -> VPVAE:
    """A VP-VAE in train mode whose queue is exactly `samples`."""
    dim = samples.shape[1]
    per_code = len(samples) // codebook_size
    config = VPVAEConfig(codebook_size=codebook_size, dim=dim, latents_per_code=per_code, **settings)
    quantizer = VPVAE(config)
    quantizer.queue.add(samples)
    assert quantizer.queue.full
    return quantizer


def normals(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def uniforms(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, dim: int, seed: int = 0) -> Tensor:
    centers = 6 * uniforms(12, dim, seed=99)
    which = torch.randint(12, (count,), generator=torch.Generator().manual_seed(seed))
    return centers[which] + 0.15 * normals(count, dim, seed)


def brute_kth(z: Tensor, samples: Tensor, ks: list[int]) -> Tensor:
    """Independent of our neighbour search: the whole distance matrix in float64, sorted."""
    distances = torch.cdist(z.double(), samples.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sort(dim=1).values[:, [k - 1 for k in ks]]


def reference_perturb(z: Tensor, samples: Tensor, per_code: int, eta: float, steps: int) -> tuple[Tensor, Tensor]:
    """The training step of docs/methods.md in float64. Each step draws randn(N, d), rand(N), rand(N)."""
    d = z.shape[1]
    here, ever = z.double(), torch.zeros(len(z), dtype=torch.bool)
    for _ in range(steps):
        v, rho, u = torch.randn(z.shape).double(), torch.rand(len(z)).double(), torch.rand(len(z)).double()
        radius = eta * brute_kth(here, samples, [per_code])[:, 0]
        proposal = here + (radius * rho ** (1 / d) / v.norm(dim=1))[:, None] * v
        near, far = brute_kth(here, samples, [DENSITY_K, per_code]).T
        near_there, far_there = brute_kth(proposal, samples, [DENSITY_K, per_code]).T
        alpha = (near * far / (near_there * far_there)) ** d
        accept = (u < alpha) & ((proposal - here).norm(dim=1) < eta * far_there)
        here, ever = torch.where(accept[:, None], proposal, here), ever | accept
    return here, ever


def energy(quantizer: VPVAE, z: Tensor) -> float:
    """Mean squared length of the perturbation over all tokens, including those that do not move."""
    return float((quantizer(z).z_q - z).square().sum(dim=1).mean())


# -- V1: the perturbation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["kdtree", "gemm"])
@pytest.mark.parametrize(("dim", "eta", "steps"), [(3, 1.0, 1), (4, 1.3, 1), (4, 1.0, 2), (5, 0.7, 3)])
def test_v1_equals_an_independent_float64_reference(backend, dim, eta, steps):
    samples, z = normals(64 * 48, dim), normals(500, dim, seed=1)
    quantizer = with_queue(samples, 64, eta=eta, mh_steps=steps, backend=backend, update_probability=1.0)
    torch.manual_seed(7)
    moved = quantizer(z).z_q
    torch.manual_seed(7)
    expected, accepted = reference_perturb(z, samples, 48, eta, steps)
    assert torch.equal((moved != z).any(dim=1), accepted)
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=1e-5)


def test_v1_acceptance_metric_is_the_share_of_moved_tokens():
    quantizer, z = with_queue(normals(64 * 64, 4), 64, eta=1.0), normals(500, 4, seed=1)
    out = quantizer(z)
    assert float(out.metrics["accepted"]) == pytest.approx(float((out.z_q != z).any(dim=1).float().mean()))


# -- V2 to V6 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.8, 1.0, 1.6])
def test_v2_no_token_moves_farther_than_either_radius(eta):
    samples, z = normals(64 * 64, 4), normals(1000, 4, seed=1)
    moved = with_queue(samples, 64, eta=eta)(z).z_q
    radius = eta * torch.minimum(brute_kth(z, samples, [64]), brute_kth(moved, samples, [64]))[:, 0]
    distance = (moved.double() - z.double()).norm(dim=1)
    assert (distance <= radius * (1 + 1e-5)).all()
    assert (distance / radius).max() > 0.95  # the maximum is close to the bound, so the bound is tight


def test_v2_a_rejected_token_stays_bitwise():
    quantizer, z = with_queue(normals(64 * 64, 4), 64, eta=1.0), normals(1000, 4, seed=1)
    moved = quantizer(z)
    unmoved = (moved.z_q - z).norm(dim=1) < 1e-6
    assert 0.2 < float(unmoved.float().mean()) < 0.6
    assert torch.equal(moved.z_q[unmoved], z[unmoved])


@pytest.mark.parametrize("make", [normals, lambda n, d, seed=0: math.sqrt(12) * uniforms(n, d, seed)])
def test_v3_ten_moves_keep_the_variance_of_the_latents(make):
    quantizer, z = with_queue(make(1024 * 64, 4), 1024, eta=1.0), make(4096, 4, seed=1)
    moved = z
    for _ in range(10):
        moved = quantizer._perturb(moved)[0]
    assert abs(float(moved.var(dim=0).mean() - z.var(dim=0).mean())) < 0.05


def test_v3_without_acceptance_the_variance_grows():
    index, z = build_index(normals(1024 * 64, 4)), normals(4096, 4, seed=1)
    moved = z
    for _ in range(10):
        step = torch.nn.functional.normalize(torch.randn_like(z), dim=1) * torch.rand(len(z), 1) ** 0.25
        moved = moved + index.kth_distances(moved, [64]) * step
    assert float(moved.var(dim=0).mean() - z.var(dim=0).mean()) > 1.0  # 1.4 measured, which shows that V3 can fail


def test_v4_acceptance_at_eta_1_is_as_measured_on_the_official_code():
    quantizer = with_queue(normals(1024 * 64, 4), 1024, eta=1.0)
    assert 0.58 <= float(quantizer(normals(8192, 4, seed=1)).metrics["accepted"]) <= 0.66


@pytest.mark.parametrize("scale", [1e-3, 250.0])
def test_v5_scaling_latents_and_queue_scales_the_output(scale):
    samples, z = normals(64 * 64, 4), normals(500, 4, seed=1)
    torch.manual_seed(3)
    moved = with_queue(samples, 64, eta=1.0)(z).z_q
    torch.manual_seed(3)
    scaled = with_queue(scale * samples, 64, eta=1.0)(scale * z).z_q
    torch.testing.assert_close(scaled, scale * moved, rtol=1e-4, atol=1e-4 * scale)


def test_v6_the_radius_holds_one_codes_share_of_the_queue():
    samples, z = normals(64 * 48, 3), normals(200, 3, seed=1)
    quantizer = with_queue(samples, 64)
    radius = quantizer._distances(z)[:, 1:].double()
    distances = torch.cdist(z.double(), samples.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert ((distances <= radius * (1 + 1e-6)).sum(dim=1) == 48).all()


def test_queue_holds_16_latents_per_code_and_dimension_by_default():
    assert [VPVAE(VPVAEConfig(codebook_size=32, dim=d)).queue.capacity for d in (3, 4, 5)] == [
        32 * 48,
        32 * 64,
        32 * 80,
    ]


# -- V8: the codebook -----------------------------------------------------------------------------------------------


def test_v8_codebook_usage_is_that_of_the_best_quantizer_of_normals():
    quantizer = VPVAE(VPVAEConfig(codebook_size=256, dim=3, balance=0.0))
    quantizer.fit(normals(256 * 48, 3), seed=0)
    counts = torch.bincount(quantizer.eval().encode(normals(100_000, 3, seed=1)), minlength=256).double()
    usage = float(torch.special.entr(counts / counts.sum()).sum().exp()) / 256
    bound = math.exp(-1.5 * (math.log(1 + 2 / 3) - 2 / 5))  # asymptotic, density of codes ~ f^(d/(d+2)): .847
    assert usage == pytest.approx(bound, abs=0.04)


def test_any_codebook_size_can_be_fitted_after_training():
    quantizer = with_queue(normals(64 * 64, 4), 64)
    errors = [quantizer.fit(normals(4000, 4), codebook_size=size)[-1] for size in (32, 128, 500)]
    assert quantizer.codebook.shape == (500, 4)
    assert errors == sorted(errors, reverse=True)


def test_a_state_with_another_codebook_size_loads():
    quantizer, loaded = (VPVAE(VPVAEConfig(codebook_size=64, dim=4)) for _ in range(2))
    quantizer.fit(normals(2000, 4), codebook_size=100)
    loaded.load_state_dict(quantizer.state_dict())
    assert loaded.codebook_size == 100
    assert torch.equal(loaded.codebook, quantizer.codebook)


def test_before_fit_encode_and_decode_name_the_command_that_makes_the_codebook():
    quantizer = with_queue(normals(64 * 64, 4), 64).eval()
    for ask in (
        lambda: quantizer.encode(normals(3, 4)),
        lambda: quantizer.decode(torch.tensor([0])),
        lambda: quantizer.codebook,
    ):
        with pytest.raises(CodebookMissing, match="tokenmill codebook"):
            ask()


def test_eval_before_fit_shows_the_decoder_the_latent_itself():
    out = with_queue(normals(64 * 64, 4), 64).eval()(normals(30, 4))
    assert torch.equal(out.z_q, normals(30, 4))
    assert out.indices is None


# -- queue and perturbation -----------------------------------------------------------------------------------------


def test_nothing_is_perturbed_before_the_queue_holds_16_latents_a_code():
    quantizer = VPVAE(VPVAEConfig(codebook_size=64, dim=4))
    for step in range(4):  # 1,000 of 1,024
        z = normals(250, 4, seed=step)
        out = quantizer(z)
        assert torch.equal(out.z_q, z)
        assert out.indices is None
    quantizer(z)
    assert not torch.equal(quantizer(z).z_q, z)


def test_while_the_queue_fills_the_radius_is_that_of_one_code_of_what_it_holds():
    """2,000 of 4,096 latents. The searched part grows in steps of a quarter: 1,024, 1,280, 1,600, 2,000."""
    quantizer, samples, z = VPVAE(VPVAEConfig(codebook_size=64, dim=4)), normals(2000, 4), normals(100, 4, seed=1)
    for part in samples.split(100):
        quantizer(part)
    distances = torch.cdist(z.double(), samples.double()).sort(dim=1).values
    expected = distances[:, [7, 2000 // 64 - 1]].float()
    torch.testing.assert_close(quantizer._distances(z), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batches", [7, 12, 30, 45])  # of 100 latents: too few, filling, filling, full
def test_training_from_a_state_dict_goes_the_same_way_whatever_the_queue_holds(batches):
    quantizer, loaded = (VPVAE(VPVAEConfig(codebook_size=64, dim=4, latents_per_code=64)) for _ in range(2))
    for step in range(batches):
        quantizer(normals(100, 4, seed=step))
    loaded.load_state_dict(quantizer.state_dict())
    for step in range(4):
        found = []
        for one in (quantizer, loaded):
            torch.manual_seed(step)
            found.append(one(normals(100, 4, seed=100 + step)).z_q)
        assert torch.equal(*found)


def test_while_it_fills_the_queue_takes_every_latent_and_then_a_share():
    quantizer = VPVAE(VPVAEConfig(codebook_size=64, dim=4, update_probability=0.05))
    quantizer(normals(3000, 4))
    assert int(quantizer.queue.filled) == 3000
    quantizer(normals(1096, 4))
    before = quantizer.queue.samples.clone()
    quantizer(normals(1000, 4, seed=2))
    assert int((quantizer.queue.samples != before).any(dim=1).sum()) == 50


def test_the_share_that_enters_is_drawn_from_the_whole_batch():
    quantizer = with_queue(normals(64 * 64, 4), 64, update_probability=0.05)
    z = torch.arange(1000.0)[:, None].repeat(1, 4) + 1000
    quantizer(z)
    entered = quantizer.queue.samples[quantizer.queue.samples[:, 0] >= 1000, 0] - 1000
    assert len(entered.unique()) == 50
    assert 350 < float(entered.mean()) < 650


@pytest.mark.parametrize(
    ("steps", "entering"),
    [
        (0, 655),  # 65,536 latents / 50 steps, of two ranks
        (500, 655),
        (2_000, 164),  # renewed in 200 steps, a tenth of those so far
        (10_000, 33),
        (100_000, 20),  # the official 1 %
    ],
)
def test_the_queue_renews_itself_within_a_tenth_of_the_steps_so_far(steps, entering):
    quantizer = VPVAE(VPVAEConfig(codebook_size=1024, dim=4))
    quantizer.steps.fill_(steps)
    assert quantizer._num_entering(2048, ranks=2) == entering


def test_a_short_run_renews_its_queue_without_any_setting():
    """100 batches after the queue is full, it contains none of its first latents."""
    quantizer = VPVAE(VPVAEConfig(codebook_size=64, dim=4))
    while not quantizer.queue.full:
        quantizer(normals(512, 4))
    for step in range(100):
        quantizer(100 + normals(512, 4, seed=step))
    assert quantizer.queue.samples.min() > 50


def test_a_queue_smaller_than_a_batch_takes_no_more_than_the_batch():
    quantizer = VPVAE(VPVAEConfig(codebook_size=1024, dim=4))
    assert quantizer._num_entering(10, ranks=1) == 10
    assert quantizer._num_entering(0, ranks=1) == 0


def test_a_checkpoint_that_counts_no_steps_trains_on_at_the_official_rate():
    quantizer, loaded = (VPVAE(VPVAEConfig(codebook_size=1024, dim=4)) for _ in range(2))
    state = quantizer.state_dict()
    del state["steps"]
    loaded.load_state_dict(state)
    assert loaded._num_entering(2048, ranks=1) == 20


def test_gradient_to_z_is_the_upstream_gradient_bitwise():
    quantizer = with_queue(normals(64 * 64, 4), 64)
    z, upstream = normals(300, 4, seed=1).requires_grad_(), normals(300, 4, seed=2)
    (gradient,) = torch.autograd.grad(quantizer(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_queue_with_waiting_latents_survives_a_state_dict():
    config = VPVAEConfig(codebook_size=64, dim=4, eta="auto", update_probability=0.01)
    quantizer, loaded = VPVAE(config), VPVAE(config)
    for step in range(6):
        quantizer(normals(1000, 4, seed=step))
    loaded.load_state_dict(quantizer.state_dict())
    assert (loaded.queue.full, int(loaded.queue.num_waiting)) == (True, 10)
    assert torch.equal(loaded.queue.samples, quantizer.queue.samples)
    assert torch.equal(loaded.queue.waiting, quantizer.queue.waiting)
    assert float(loaded.log_eta) == float(quantizer.log_eta) != 0


def test_loading_a_state_forgets_the_index_of_the_old_queue():
    quantizer, other = with_queue(normals(64 * 64, 4), 64), with_queue(9 + normals(64 * 64, 4), 64)
    z = normals(100, 4, seed=1)
    quantizer(z)
    quantizer.load_state_dict(other.state_dict())
    assert torch.equal(quantizer._distances(z), other._distances(z))


# -- many equal latents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["kdtree", "gemm", "subsample"])
@pytest.mark.parametrize("steps", [1, 2])
def test_an_atom_is_never_moved_and_never_nan(backend, steps):
    atom = torch.tensor([0.3, -0.1, 0.7, 0.2]).repeat(64 * 64, 1)
    quantizer = with_queue(atom, 64, backend=backend, mh_steps=steps)
    z = atom[:100].clone().requires_grad_()
    out = quantizer(z)
    (out.z_q.sum() + sum(out.losses.values())).backward()
    assert torch.equal(out.z_q, z)
    assert all(value.isfinite() for value in (*out.losses.values(), *out.metrics.values()))
    assert z.grad.isfinite().all()


def test_tokens_beside_an_atom_still_move():
    samples = normals(64 * 64, 4)
    samples[::2] = 0.5
    z = torch.cat([torch.full((200, 4), 0.5), normals(200, 4, seed=1)])
    moved = (with_queue(samples, 64, eta=1.0)(z).z_q != z).any(dim=1)
    assert not moved[:200].any()
    assert moved[200:].float().mean() > 0.3


def test_an_atom_leaves_eta_where_it_is():
    quantizer = with_queue(torch.full((64 * 64, 4), 0.5), 64, eta="auto")
    for _ in range(5):
        quantizer(torch.full((100, 4), 0.5))
    assert float(quantizer.log_eta) == 0


# -- eta ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [normals, uniforms, clusters])
def test_quantization_error_is_that_of_a_real_kmeans(make):
    samples = make(256 * 64, 4)
    expected = kmeans(make(2 * 256 * 64, 4, seed=2), 256, tolerance=2e-3).mse[-1]
    radius = build_index(samples).kth_distances(make(4096, 4, seed=1), [64])[:, 0]
    assert float(quantization_error(radius, 4)) == pytest.approx(expected, rel=0.12)


def test_quantization_error_of_equal_cells_is_that_of_balls():
    """By hand: a uniform point in a d-ball of radius r has the mean squared distance r^2 d / (d + 2) to the centre."""
    assert float(quantization_error(torch.full((10,), 0.5), 3)) == pytest.approx(0.25 * 3 / 5)


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_quantization_error_is_zadors_law(dim):
    """c K^(-2/d) (E f^(-2/(d+2)))^((d+2)/d) for the density f, with the constant of ball-shaped cells."""
    size, radius = 100, torch.tensor([0.2, 0.5, 2.0]).double()
    ball = math.pi ** (dim / 2) / math.gamma(dim / 2 + 1)
    density = 1 / (size * ball * radius**dim)
    constant = dim / (dim + 2) * ball ** (-2 / dim)
    expected = constant * size ** (-2 / dim) * (density ** (-2 / (dim + 2))).mean() ** ((dim + 2) / dim)
    assert float(quantization_error(radius, dim)) == pytest.approx(float(expected))


@pytest.mark.parametrize("steps", [1, 2])
def test_auto_eta_matches_the_energy_of_the_perturbation_to_real_quantization(steps):
    samples = normals(256 * 64, 4)
    quantizer = with_queue(samples, 256, mh_steps=steps, eta="auto")
    energies = [energy(quantizer, normals(256, 4, seed=step)) for step in range(1, 161 // steps)]
    assert sum(energies[-40:]) / 40 == pytest.approx(kmeans(samples, 256, tolerance=1e-3).mse[-1], rel=0.1)


def test_eta_1_trains_with_about_half_of_the_energy_of_quantization():
    """The calibration in docs/methods.md: eta 1 gives .45 to .48 of the energy, and two moves give .88 to .90."""
    samples, z = normals(256 * 64, 4), normals(8192, 4, seed=1)
    once, twice = (energy(with_queue(samples, 256, eta=1.0, mh_steps=steps), z) for steps in (1, 2))
    error = kmeans(samples, 256, tolerance=1e-3).mse[-1]
    assert 0.4 < once / error < 0.65
    assert 1.4 < twice / once < 2.1


def test_a_set_eta_stays():
    quantizer = with_queue(normals(64 * 64, 4), 64, eta=1.25)
    quantizer(normals(300, 4))
    assert float(quantizer.log_eta.exp()) == pytest.approx(1.25)


# -- settings and losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": "automatic"}, "quantizer.eta is 'automatic'"),
        ({"mh_steps": 0}, "quantizer.mh_steps is 0"),
        ({"update_probability": 0.0}, "quantizer.update_probability is 0.0"),
        ({"update_probability": 1.5}, "quantizer.update_probability is 1.5"),
        ({"update_probability": "often"}, "quantizer.update_probability is 'often'"),
        ({"backend": "faiss"}, "choose one of: auto, kdtree, gemm, subsample"),
        ({"codebook_size": 2, "latents_per_code": 3}, "quantizer.density_k is 8"),
        ({"eta": 0.0}, "quantizer.eta is 0.0"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VPVAE(VPVAEConfig(**settings))


def test_l_norm_is_the_mean_of_squares_of_mean_and_variance_off_target():
    """Solved by hand: column means 1 and 0, biased variances 1 and 4; against 1: (0 + 9) / 2."""
    losses = latent_norm_losses(torch.tensor([[0.0, 2.0], [2.0, -2.0]]), variance=1.0)
    assert float(losses["norm_mean"]) == pytest.approx(0.5)
    assert float(losses["norm_var"]) == pytest.approx(4.5)


def test_l_norm_is_part_of_training_from_the_first_step():
    quantizer, z = VPVAE(VPVAEConfig(codebook_size=64, dim=4)), 2 + 3 * normals(200, 4)
    filling = quantizer(z).losses
    full = with_queue(normals(64 * 64, 4), 64)(z).losses
    assert filling == full == latent_norm_losses(z, 1.0)
    assert float(filling["norm_var"]) > 10


def test_the_queue_index_follows_what_enters():
    quantizer = with_queue(normals(64 * 64, 4), 64, update_probability=1.0)
    z = 50 + normals(4096, 4, seed=1)
    far = quantizer._distances(z).mean()
    quantizer(z)  # the whole queue is replaced
    assert quantizer._distances(z).mean() < 0.1 * far
    torch.testing.assert_close(copy.deepcopy(quantizer)._distances(z), quantizer._distances(z), rtol=0, atol=0)


def test_a_pickle_leaves_the_index_out():
    quantizer = with_queue(normals(64 * 64, 4), 64)
    before = len(pickle.dumps(quantizer))
    quantizer._distances(normals(10, 4))
    assert len(pickle.dumps(quantizer)) == before


def test_encode_is_the_nearest_code():
    quantizer = VPVAE(VPVAEConfig(codebook_size=64, dim=4))
    quantizer.fit(normals(2000, 4))
    z = normals(100, 4, seed=1)
    assert torch.equal(quantizer.encode(z), nearest_codeword(z, quantizer.codebook))


# -- balanced codebooks ---------------------------------------------------------------------------------------------


def usage_of(balance: float, z: Tensor, unseen: Tensor) -> tuple[float, float]:
    """CVU and squared error on latents that the codebook was not made from."""
    quantizer = build_quantizer({"name": "vp_vae", "codebook_size": 64, "dim": 3, "balance": balance})
    quantizer.fit(z)
    indices = quantizer.encode(unseen)
    error = (quantizer.decode(indices) - unseen).square().sum(dim=1).mean()
    return usage(np.bincount(indices.numpy(), minlength=64))["cvu"], float(error)


def cubes_of_normals(*shape: int) -> Tensor:
    """Heavy tails, and a density without bound on the axes."""
    return torch.randn(*shape).pow(3)


@pytest.mark.parametrize(("make", "expected"), [(torch.randn, 0.97), (cubes_of_normals, 0.9)])
def test_a_balanced_codebook_is_used_evenly_at_some_cost_in_error(make, expected):
    z, unseen = make(20_000, 3), make(20_000, 3)
    plain, half, full = (usage_of(balance, z, unseen) for balance in (0.0, 0.5, 1.0))
    assert plain[0] < half[0] < full[0]
    assert full[0] > expected
    assert plain[1] < half[1] < full[1]


def test_half_balance_of_a_normal_costs_little():
    z, unseen = torch.randn(20_000, 3), torch.randn(20_000, 3)
    plain, half = (usage_of(balance, z, unseen) for balance in (0.0, 0.5))
    assert half[0] > plain[0] + 0.04
    assert half[1] < 1.06 * plain[1]


def test_balancing_weights_do_not_depend_on_the_unit_of_the_latents():
    z = torch.randn(5000, 3)
    larger, weights = (BalancingWeights.of(unit * z, 64, 1.0)(LatentBatch(unit * z)).weights for unit in (7, 1))
    torch.testing.assert_close(larger, weights, rtol=1e-3, atol=1e-5)


def test_many_equal_latents_do_not_take_all_codes():
    """Half of the latents are equal (silence), but the others get most of the codes."""
    z = torch.cat([torch.zeros(5000, 3), 1 + torch.randn(5000, 3)])
    quantizer = build_quantizer({"name": "vp_vae", "codebook_size": 64, "dim": 3, "balance": 1.0})
    quantizer.fit(z)
    assert len(quantizer.encode(z[5000:]).unique()) > 50


def test_a_balance_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"quantizer.balance is 1.5; it must lie in 0..1"):
        build_quantizer({"name": "vp_vae", "balance": 1.5})


@pytest.mark.parametrize(("eta", "low", "high"), [(1.0, 0.35, 0.65), ("auto", 0.8, 1.2)])
def test_perturbation_ratio_is_below_1_at_eta_1_and_about_1_where_it_follows(eta, low, high):
    """docs/methods.md: half of the error's energy at eta 1. State and outer random numbers do not change."""
    z = normals(64 * 64 + 4096, 3)
    quantizer = build_quantizer({"name": "vp_vae", "codebook_size": 64, "dim": 3, "eta": eta, "balance": 0.0})
    quantizer.fit(z)
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in quantizer.state_dict().items()}
    ratio = quantizer.perturbation_ratio(z)
    assert low < ratio < high
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(quantizer.state_dict()[name], tensor) for name, tensor in state.items())


def test_perturbation_ratio_of_too_few_latents_is_not_known():
    quantizer = build_quantizer({"name": "vp_vae", "codebook_size": 64, "dim": 3})
    quantizer.fit(normals(100, 3))
    assert quantizer.perturbation_ratio(normals(100, 3)) is None
