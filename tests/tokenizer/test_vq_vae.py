"""VQ-VAE and its options: tests Q1 to Q7 of the method, compared to float64, and the initial codebook."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.clustering.kmeans import partial_sums
from tokenizer.clustering.latents import LatentBatch
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.vq_vae import MOMENTUM, VQVAE, VQVAEConfig

OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient": "rotation"},
    {"l2": True},
    {"affine": 10.0},
    {"l2": True, "affine": 10.0},
]
all_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def initialised(z: Tensor, codebook_size: int = 32, **settings) -> VQVAE:
    """Trained by one forward. An affine transformation, if any, is not the identity."""
    quantizer = VQVAE(VQVAEConfig(codebook_size=codebook_size, dim=z.shape[1], **settings))
    quantizer(z)
    if quantizer.config.affine:
        quantizer.scale.data.normal_(0, 0.02)
        quantizer.shift.data.normal_(0, 0.02)
    return quantizer


def reference(quantizer: VQVAE, z: Tensor, embedding: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Latents and codes as the search compares them: a simple float64 version."""
    points = z.detach().double().numpy()
    codes = (quantizer.embedding if embedding is None else embedding).detach().double().numpy()
    if quantizer.config.affine:
        scale, shift = quantizer.scale.detach().double().numpy(), quantizer.shift.detach().double().numpy()
        codes = (1 + quantizer.config.affine * scale) * codes + quantizer.config.affine * shift
    if quantizer.config.l2:
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
        codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    return points, codes


def brute_indices(points: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ((points[:, None] - codes[None]) ** 2).sum(axis=2).argmin(axis=1)


# -- Q1: gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": 10.0}, {"replace_after": 1}, {"alternating_lr": 1.0}])
def test_q1_straight_through_gradient_is_the_upstream_gradient(options):
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    (gradient,) = torch.autograd.grad(initialised(z.detach(), **options)(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_q1_on_the_sphere_the_gradient_passes_the_normalisation():
    z, upstream = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    (gradient,) = torch.autograd.grad(initialised(z.detach(), l2=True)(z).z_q, z, upstream)
    unit, length = z / z.norm(dim=1, keepdim=True), z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, (upstream - (upstream * unit).sum(dim=1, keepdim=True) * unit) / length)


@all_options
def test_q1_no_gradient_of_the_output_reaches_the_codes(options):
    z = torch.randn(200, 8, requires_grad=True)
    quantizer = initialised(z.detach(), **options)
    found = torch.autograd.grad(quantizer(z).z_q.sum(), list(quantizer.parameters()), allow_unused=True)
    assert set(found) == {None}


# -- Q2: losses -----------------------------------------------------------------------------------------------------


@all_options
def test_q2_losses_are_mean_squared_distances_to_the_nearest_code(options):
    z = torch.randn(200, 8)
    quantizer = initialised(z, **options)
    points, codes = reference(quantizer, z)
    expected = ((points - codes[brute_indices(points, codes)]) ** 2).mean()
    losses = quantizer(z).losses
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"codebook": expected, "commitment": expected}, rel=1e-5
    )


def test_q2_codebook_loss_moves_codes_only_and_commitment_latents_only():
    z = torch.randn(200, 8, requires_grad=True)
    quantizer = initialised(z.detach())
    difference = z.detach() - quantizer.embedding.detach()[quantizer.encode(z)]
    losses = quantizer(z).losses
    to_codes = torch.autograd.grad(losses["codebook"], (quantizer.embedding, z), allow_unused=True)
    to_latents = torch.autograd.grad(losses["commitment"], (quantizer.embedding, z), allow_unused=True)
    assert to_codes[1] is None
    assert to_latents[0] is None
    torch.testing.assert_close(to_codes[0].sum(dim=0), -2 * difference.sum(dim=0) / z.numel())
    torch.testing.assert_close(to_latents[1], 2 * difference / z.numel())


# -- Q3: indices ----------------------------------------------------------------------------------------------------


@all_options
@pytest.mark.parametrize("dim", [4, 16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_q3_indices_are_the_float64_argmin(options, dim, mode):
    z = torch.randn(1000, dim)
    quantizer = initialised(z, 64, **options).train(mode == "train")
    assert np.array_equal(quantizer(z).indices.numpy(), brute_indices(*reference(quantizer, z)))


@pytest.mark.parametrize("options", [*OPTIONS, {"replace_after": 2}, {"alternating_lr": 1.0}])
def test_output_is_a_row_of_the_codebook_bitwise(options):
    z = torch.randn(300, 8)
    quantizer = initialised(z, **options)
    out = quantizer(z)
    assert torch.equal(out.z_q, quantizer.codebook[out.indices])


# -- Q4: unused codes are replaced ----------------------------------------------------------------------------------

replacing = pytest.mark.parametrize(
    "options", [{}, {"l2": True}, {"affine": 10.0}, {"l2": True, "affine": 10.0}, {"alternating_lr": 1.0}]
)


@pytest.mark.parametrize(("steps", "expected"), [(1, [3] * 7), (3, [0, 0, 3, 0, 0, 3, 0]), (0, [0] * 7)])
def test_q4_unused_codes_change_exactly_at_the_step_that_was_set(steps, expected):
    """Equal latents use one code of four: all codes start equal, and the first of equal codes is chosen."""
    quantizer = VQVAE(VQVAEConfig(codebook_size=4, dim=8, replace_after=steps))
    changed = []
    for _ in expected:
        before = quantizer.embedding.detach().clone() if quantizer.initialised else torch.full((4, 8), 7.0)
        quantizer(torch.full((10, 8), 7.0))
        changed.append(int((quantizer.embedding != before).any(dim=1).sum()))
    assert changed == expected


def test_q4_a_code_in_use_is_never_replaced():
    quantizer = initialised(torch.randn(500, 8), replace_after=2)
    for step in range(6):
        before = quantizer.embedding.detach().clone()
        used = quantizer(torch.randn(20, 8) + step).indices.unique()
        assert torch.equal(quantizer.embedding[used], before[used])


@replacing
def test_q4_a_new_code_is_as_searched_a_latent_of_the_batch_with_little_noise(options):
    quantizer = initialised(torch.randn(500, 8), replace_after=1, **options)
    z = 5 + torch.randn(20, 8)
    quantizer(z)
    rows = quantizer.overwritten_rows()["embedding"]
    points, codes = reference(quantizer, z)
    distances = np.linalg.norm(codes[rows][:, None] - points, axis=2) / np.linalg.norm(points, axis=1)
    assert len(rows) > 10
    assert distances.min(axis=1).max() < 0.05
    assert len(np.unique(distances.argmin(axis=1))) > 5  # not all from one latent
    np.testing.assert_allclose(quantizer.codebook.numpy(), codes, atol=2e-6)


def test_q4_noise_of_a_new_code_is_one_percent_of_its_length_in_each_dimension_as_in_vqtorch():
    """With a single latent every new code is that latent plus noise. In 64 dims the noise is 8 % of its length."""
    quantizer = VQVAE(VQVAEConfig(codebook_size=1024, dim=64, replace_after=1))
    z = torch.full((10, 64), 0.5)  # of length 4
    quantizer(z)
    rows = quantizer.overwritten_rows()["embedding"]
    noise = quantizer.embedding.detach()[rows] - z[0]
    assert len(rows) == 1023
    assert noise.std().item() == pytest.approx(0.04, rel=0.02)
    assert (noise.norm(dim=1) / 4).mean().item() == pytest.approx(0.08, rel=0.02)


def test_q4_no_latent_is_taken_twice_while_there_are_others():
    quantizer = initialised(torch.randn(500, 8), replace_after=1)
    z = 5 + 100 * torch.randn(31, 8)
    quantizer(z)
    rows = quantizer.overwritten_rows()["embedding"]
    nearest = torch.cdist(quantizer.embedding.detach()[rows], z).argmin(dim=1)
    assert len(nearest.unique()) == len(rows) > 10


@replacing
def test_q4_overwritten_rows_are_those_that_the_batch_left_unused(options):
    quantizer = initialised(torch.randn(500, 8), replace_after=1, **options)
    used = quantizer(5 + torch.randn(20, 8)).indices.unique().tolist()
    rows = quantizer.overwritten_rows()["embedding"].tolist()
    assert sorted(rows + used) == list(range(32))


def test_q4_no_row_is_overwritten_where_none_is_due():
    quantizer = initialised(torch.randn(500, 8), replace_after=2)
    seen = [quantizer(torch.full((5, 8), 9.0)) and len(quantizer.overwritten_rows()) for _ in range(3)]
    assert seen in ([0, 1, 0], [1, 0, 1])  # the first batch may also have left codes unused
    assert initialised(torch.randn(500, 8)).overwritten_rows() == {}


def test_q4_on_the_sphere_new_codes_are_too():
    quantizer = initialised(torch.randn(500, 8), replace_after=1, l2=True)
    quantizer(5 + torch.randn(20, 8))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(32))


def test_q4_a_new_code_has_no_velocity():
    quantizer = initialised(torch.randn(500, 8), replace_after=2, alternating_lr=1.0)
    rows = []
    while not len(rows):
        assert quantizer.velocity.any(dim=1).any()
        quantizer(5 + torch.randn(20, 8))
        rows = quantizer.overwritten_rows().get("embedding", [])
    assert not quantizer.velocity[rows].any()
    assert quantizer.velocity.any()


def test_q4_an_affine_scale_that_passes_zero_gives_finite_codes():
    quantizer = initialised(torch.randn(20, 8), affine=10.0, replace_after=1)
    quantizer.scale.data[:2] = torch.tensor([-0.1, -0.1 - 1e-6])
    quantizer(torch.randn(4, 8))
    assert len(quantizer.overwritten_rows()["embedding"])
    assert quantizer.embedding.abs().max() < 1000
    assert all(loss.isfinite() for loss in quantizer(torch.randn(4, 8)).losses.values())


def test_q4_eval_replaces_nothing():
    quantizer = initialised(torch.randn(500, 8), replace_after=1).eval()
    before = quantizer.embedding.detach().clone()
    quantizer(torch.full((5, 8), 9.0))
    assert torch.equal(quantizer.embedding, before)


# -- Q5: on the sphere ----------------------------------------------------------------------------------------------


def test_q5_the_nearest_code_is_the_one_of_largest_cosine():
    z = torch.randn(500, 8)
    quantizer = initialised(z, l2=True)
    codes = quantizer.embedding.detach().double()
    cosines = torch.nn.functional.cosine_similarity(z.double()[:, None], codes[None], dim=2)
    assert torch.equal(quantizer.encode(z), cosines.argmax(dim=1))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_q5_outputs_have_length_1(mode):
    quantizer = initialised(10 * torch.randn(500, 8), l2=True).train(mode == "train")
    torch.testing.assert_close(quantizer(3 * torch.randn(50, 8)).z_q.norm(dim=1), torch.ones(50))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 7.0, 1e4])
def test_q5_a_scaled_latent_has_the_same_index(scale):
    z = torch.randn(500, 8)
    quantizer = initialised(z, l2=True)
    assert torch.equal(quantizer.encode(scale * z), quantizer.encode(z))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_q5_gradient_is_finite_at_zero(gradient):
    quantizer = initialised(torch.randn(500, 8), l2=True, gradient=gradient)
    z = torch.zeros(3, 8, requires_grad=True)
    out = quantizer(z)
    (out.z_q.sum() + sum(out.losses.values())).backward()
    assert z.grad.isfinite().all()
    assert quantizer.embedding.grad.isfinite().all()


# -- Q6: affine codes -----------------------------------------------------------------------------------------------


def untouched(affine: float) -> VQVAE:
    torch.manual_seed(0)
    quantizer = VQVAE(VQVAEConfig(codebook_size=32, dim=8, affine=affine))
    quantizer(torch.randn(300, 8))
    return quantizer


def test_q6_it_starts_as_the_identity_bitwise():
    plain, affine, z = untouched(0.0), untouched(10.0), torch.randn(100, 8)
    first, second = plain(z), affine(z)
    assert torch.equal(first.z_q, second.z_q)
    assert torch.equal(first.indices, second.indices)
    assert all(torch.equal(first.losses[name], second.losses[name]) for name in first.losses)


def test_q6_scale_and_shift_have_gradient_although_few_codes_are_selected():
    quantizer = untouched(10.0)
    out = quantizer(torch.randn(3, 8))
    out.losses["codebook"].backward()
    assert quantizer.embedding.grad.any(dim=1).sum() == len(out.indices.unique()) <= 3
    assert quantizer.scale.grad.all()
    assert quantizer.shift.grad.all()


def test_q6_scale_and_shift_have_the_gradient_of_float64():
    z = torch.randn(50, 8)
    quantizer = initialised(z, affine=10.0)
    found = torch.autograd.grad(quantizer(z).losses["codebook"], (quantizer.scale, quantizer.shift))
    points, codes = reference(quantizer, z)
    q = brute_indices(points, codes)
    off = 2 * (codes[q] - points) / points.size
    np.testing.assert_allclose(found[1].numpy(), 10 * off.sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(found[0].numpy(), 10 * (off * quantizer.embedding.detach().numpy()[q]).sum(0), atol=1e-5)


@pytest.mark.parametrize("l2", [False, True])
def test_q6_the_baked_table_gives_the_same_indices(l2):
    z = torch.randn(500, 8)
    quantizer = initialised(z, affine=10.0, l2=l2)
    before = quantizer.encode(z)
    quantizer.fit(z)
    assert torch.equal(quantizer.encode(z), before)
    np.testing.assert_allclose(quantizer.table.numpy(), reference(quantizer, z)[1], atol=1e-6)


def test_q6_all_codes_follow_a_shift_of_all_latents():
    """Latents move by 3 in each dim. Without affine, codes that no latent selects do not move."""
    moved = {}
    for affine in (0.0, 10.0):
        quantizer = untouched(affine)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            quantizer(3 + torch.randn(64, 8)).losses["codebook"].backward()
            optimizer.step()
        moved[affine] = (quantizer.codebook - untouched(affine).codebook).mean(dim=1)
    assert moved[10.0].min() > 0.5
    assert moved[10.0].median() > 1.5
    assert (moved[0.0] == 0).any()
    assert moved[0.0].max() < 0.5


# -- Q7: alternating ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"l2": True}, {"affine": 10.0}, {"l2": True, "affine": 10.0}])
def test_q7_one_step_lowers_the_error_of_the_chosen_codes(options):
    quantizer = initialised(torch.randn(200, 8), alternating_lr=20.0, **options)
    quantizer.velocity.zero_()
    z, embedding = torch.randn(200, 8), quantizer.embedding.detach().clone()
    q = quantizer(z).indices.numpy()
    points, before = reference(quantizer, z, embedding)
    _, after = reference(quantizer, z)
    assert ((after[q] - points) ** 2).mean() < 0.99 * ((before[q] - points) ** 2).mean()


def test_q7_steps_are_those_of_sgd_with_momentum_in_float64():
    quantizer = initialised(torch.randn(200, 8), alternating_lr=2.0)
    velocity, codes = quantizer.velocity.double().numpy().copy(), quantizer.embedding.detach().double().numpy()
    for _ in range(3):
        z = torch.randn(200, 8)
        points, q = z.double().numpy(), brute_indices(z.double().numpy(), codes)
        gradient = np.zeros_like(codes)
        np.add.at(gradient, q, 2 * (codes[q] - points) / points.size)
        velocity = MOMENTUM * velocity + gradient
        codes = codes - 2.0 * velocity
        quantizer(z)
    np.testing.assert_allclose(quantizer.velocity.numpy(), velocity, atol=1e-6)
    np.testing.assert_allclose(quantizer.embedding.detach().numpy(), codes, atol=1e-5)


def test_q7_the_model_sees_the_codes_after_the_step_that_were_nearest_before_it():
    quantizer, z = initialised(torch.randn(200, 8), alternating_lr=5.0), torch.randn(200, 8)
    before = brute_indices(*reference(quantizer, z))
    out = quantizer(z)
    assert np.array_equal(out.indices.numpy(), before)
    assert torch.equal(out.z_q, quantizer.embedding[out.indices])


def test_q7_the_outer_loss_has_no_gradient_for_the_codes_but_for_scale_and_shift():
    quantizer = initialised(torch.randn(200, 8), alternating_lr=1.0, affine=10.0)
    assert not quantizer.embedding.requires_grad
    out = quantizer(torch.randn(200, 8))
    (out.z_q.sum() + sum(out.losses.values())).backward()
    assert quantizer.embedding.grad is None
    assert quantizer.scale.grad.any()
    assert quantizer.shift.grad.any()


def test_q7_velocity_is_in_the_state():
    first = initialised(torch.randn(200, 8), alternating_lr=1.0)
    second = VQVAE(first.config)
    second.load_state_dict(first.state_dict())
    z = torch.randn(200, 8)
    assert torch.equal(first(z).z_q, second(z).z_q)
    assert first.velocity.any()
    assert torch.equal(first.velocity, second.velocity)


def test_q7_no_latents_no_step():
    quantizer = initialised(torch.randn(200, 8), alternating_lr=1.0)
    before = quantizer.embedding.clone()
    quantizer(torch.empty(0, 8))
    assert torch.equal(quantizer.embedding, before)


# -- initialisation -------------------------------------------------------------------------------------------------


def test_kmeans_init_errs_less_than_random_codes():
    z = 3 + 0.5 * torch.randn(2000, 8)
    quantizer = VQVAE(VQVAEConfig(codebook_size=32, dim=8))
    random, drawn = (
        partial_sums(LatentBatch(z), codes).squared_error for codes in (quantizer.embedding.detach(), z[:32])
    )
    quantizer(z)
    fitted = partial_sums(LatentBatch(z), quantizer.embedding.detach()).squared_error
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


def test_eval_does_not_initialise_but_says_that_nothing_was_trained():
    quantizer = VQVAE(VQVAEConfig(codebook_size=4, dim=8)).eval()
    before = quantizer.embedding.detach().clone()
    with pytest.raises(CodebookMissing, match="this VQ-VAE was never trained"):
        quantizer(torch.randn(100, 8))
    assert torch.equal(quantizer.embedding, before)
    assert not quantizer.initialised


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


# -- synchronized commitment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gradient": "rotation"}, {"affine": 10.0}])
def test_sync_nu_gives_the_chosen_codes_that_share_of_the_gradient_at_the_output(options):
    """arXiv 2305.08842, section 4.3: a code gets nu times the sum of its latents' upstream gradients."""
    z, upstream = torch.randn(300, 8), torch.randn(300, 8)
    with_sync, without = (initialised(z, sync_nu=nu, **options) for nu in (0.3, 0.0))
    without.load_state_dict(with_sync.state_dict())
    out, plain = with_sync(z), without(z)
    assert torch.equal(out.z_q, plain.z_q)
    (gradient,) = torch.autograd.grad(out.z_q, with_sync.embedding, upstream)
    expected = torch.zeros(32, 8).index_add_(0, out.indices, 0.3 * upstream)
    if "affine" in options:  # the searched codes are (1 + 10 scale) times the embedding, plus a shift
        expected *= 1 + 10.0 * with_sync.scale.detach()
    torch.testing.assert_close(gradient, expected)


def test_sync_nu_leaves_the_gradient_of_the_latents_alone():
    z, upstream = torch.randn(300, 8, requires_grad=True), torch.randn(300, 8)
    (gradient,) = torch.autograd.grad(initialised(z.detach(), sync_nu=2.0)(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


# -- settings -------------------------------------------------------------------------------------------------------


def test_a_bad_gradient_is_named():
    with pytest.raises(ValueError, match="'gumbel'; choose one of: straight_through, rotation"):
        VQVAEConfig(gradient="gumbel")


@pytest.mark.parametrize("name", ["replace_after", "affine", "alternating_lr", "sync_nu"])
def test_a_negative_setting_is_named(name):
    with pytest.raises(ValueError, match=rf"quantizer.{name} is -1; it must be 0 \(off\) or more"):
        VQVAEConfig(**{name: -1})


def test_all_options_at_once_keep_the_codebook_in_use():
    options = {"l2": True, "affine": 10.0, "replace_after": 2, "alternating_lr": 1.0, "gradient": "rotation"}
    quantizer = initialised(torch.randn(300, 8), **options)
    for step in range(10):
        quantizer(0.3 * step + torch.randn(300, 8))
    shares = quantizer.code_shares(3 + torch.randn(2000, 8))
    assert quantizer.codebook.isfinite().all()
    assert (shares > 0).float().mean() > 0.8


def test_sync_nu_is_refused_where_it_would_do_nothing():
    with pytest.raises(ValueError, match=r"sync_nu is 0.5 and alternating_lr 50.0; .* set one of them to 0"):
        VQVAEConfig(sync_nu=0.5, alternating_lr=50.0)
