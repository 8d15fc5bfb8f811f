"""Residual quantization: sums of codes, prefixes, dropout, scales, gradients, and every possible base."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.base.quantizer import build_quantizer
from tokenizer.quantizers.residual import Residual, ResidualConfig

BASES = {  # small enough to train here
    "vq_vae": {},
    "ema_vq": {},
    "sim_vq": {},
    "fsq": {},
    "fsp": {},
    "vp_vae": {"latents_per_code": 16, "update_probability": 0.5},
    "lfq": {},
}
all_bases = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(base: str = "vq_vae", num_quantizers: int = 4, dropout: bool = False, **settings) -> Residual:
    config = {"name": base, **BASES.get(base, {}), **settings}
    return Residual(ResidualConfig(config, num_quantizers, codebook_size=64, dim=4, dropout=dropout))


def normals(quantizer: Residual, count: int = 1000, seed: int = 1) -> Tensor:
    return torch.randn(count, quantizer.dim, generator=torch.Generator().manual_seed(seed))


def trained(base: str = "vq_vae", steps: int = 20, **settings) -> Residual:
    quantizer = built(base, **settings)
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    for step in range(steps):
        losses = quantizer(normals(quantizer, 500, seed=100 + step)).losses
        if optimizer:
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    quantizer.fit(normals(quantizer, 2000, seed=50))
    return quantizer.eval()


def prefix(indices: Tensor, count: int) -> Tensor:
    """The indices with only the first `count` quantizers; the others are dropped."""
    return torch.where(torch.arange(indices.shape[-1]) < count, indices, -1)


def errors(quantizer: Residual, z: Tensor) -> list[float]:
    indices = quantizer.encode(z)
    return [
        float((quantizer.decode(prefix(indices, n)) - z).square().mean()) for n in range(quantizer.num_quantizers + 1)
    ]


# -- every base -----------------------------------------------------------------------------------------------------


@all_bases
def test_more_quantizers_err_less(base):
    quantizer = trained(base)
    found = errors(quantizer, normals(quantizer))
    assert all(after < before for before, after in pairwise(found))


@all_bases
def test_decode_of_encode_is_the_eval_output_with_indices_of_every_layer(base):
    quantizer = trained(base)
    z = normals(quantizer, 60).reshape(3, 20, -1)
    out = quantizer(z)
    assert out.indices.shape == (3, 20, 4)
    assert torch.equal(out.indices, quantizer.encode(z))
    assert torch.equal(out.z_q, quantizer.decode(out.indices))
    assert 0 <= int(out.indices.min()) <= int(out.indices.max()) < quantizer.codebook_size


@all_bases
def test_the_output_is_the_sum_of_the_codes(base):
    quantizer = trained(base)
    out = quantizer(normals(quantizer))
    codes = [codes[index] for codes, index in zip(quantizer.codebook, out.indices.T, strict=True)]
    assert quantizer.codebook.shape == (4, quantizer.codebook_size, quantizer.dim)
    torch.testing.assert_close(torch.stack(codes).sum(dim=0), out.z_q)


@all_bases
def test_a_state_dict_gives_the_same_tokens_and_the_same_next_step(base):
    quantizer, loaded = trained(base), built(base)
    loaded.load_state_dict(quantizer.state_dict())
    z, outs = normals(quantizer), []
    assert torch.equal(loaded.encode(z), quantizer.encode(z))
    for either in (quantizer, loaded):
        torch.manual_seed(3)
        outs.append(either.train()(z))
    assert torch.equal(outs[0].z_q, outs[1].z_q)
    assert torch.equal(quantizer.scales, loaded.scales)


@all_bases
def test_inference_needs_nothing_of_the_training_state(base):
    quantizer, frozen = trained(base), built(base).eval()
    kept = {
        name: value for name, value in quantizer.state_dict().items() if not name.startswith(quantizer.training_state)
    }
    missing, unexpected = frozen.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(name.startswith(quantizer.training_state) for name in missing)
    assert torch.equal(frozen.encode(normals(quantizer)), quantizer.encode(normals(quantizer)))


@all_bases
def test_losses_are_those_of_the_base(base):
    quantizer = trained(base)
    weights = quantizer.layers[0].default_loss_weights
    assert quantizer.default_loss_weights == weights
    assert quantizer.per_token_losses == quantizer.layers[0].per_token_losses
    assert set(quantizer.train()(normals(quantizer)).losses) == set(weights)


def test_dead_codes_of_every_layer_are_revived():
    """The latents move away from half of the codes. The metric is the mean over the layers."""
    quantizer, revived = built("ema_vq", decay=0.5, revive_below=2.0), 0.0
    for step in range(12):
        z = normals(quantizer, 500, seed=step)
        revived += float(quantizer(z if step < 2 else z.abs()).metrics["revived"])
    assert revived > 16
    indices = quantizer(normals(quantizer, 2000).abs()).indices
    assert [len(layer.unique()) for layer in indices.T] == [64] * 4


def test_vp_vae_layers_fill_their_queues_one_after_the_other():
    quantizer = built("vp_vae")
    filled = []
    for step in range(12):
        quantizer(normals(quantizer, 500, seed=step))
        filled.append([float(layer.queue.filled_share) for layer in quantizer.layers])
    assert filled[1][1:] == [0, 0, 0]
    assert filled[-1] == [1, 1, 1, 1]
    assert quantizer.measured.all()


def test_before_fit_vp_vae_hands_latents_through():
    quantizer = built("vp_vae").eval()
    z = normals(quantizer)
    assert torch.equal(quantizer(z).z_q, z)
    assert quantizer(z).indices is None


def test_fit_gives_any_size_where_the_base_does():
    quantizer = trained("vp_vae", balance=0.0)  # otherwise the errors are weighted
    curve = quantizer.fit(normals(quantizer, 2000), codebook_size=16)
    assert quantizer.codebook_size == 16
    assert quantizer.codebook.shape == (4, 16, 4)
    assert curve[-1] == pytest.approx(
        float((quantizer(normals(quantizer, 2000)).z_q - normals(quantizer, 2000)).square().sum(dim=1).mean()), rel=0.05
    )


# -- indices --------------------------------------------------------------------------------------------------------


def test_all_dropped_decodes_to_zero():
    assert torch.equal(trained().decode(torch.full((5, 4), -1)), torch.zeros(5, 4))


def test_a_prefix_decodes_to_what_fewer_quantizers_would_have_given():
    quantizer = trained()
    indices = quantizer.encode(normals(quantizer))
    by_hand = sum(quantizer.codebook[q][indices[:, q]] for q in range(2))
    torch.testing.assert_close(quantizer.decode(prefix(indices, 2)), by_hand)


def test_a_latent_costs_q_times_log2_k_bits():
    quantizer = trained(num_quantizers=3)
    indices = quantizer.encode(normals(quantizer, 10))
    assert indices.numel() * math.log2(quantizer.codebook_size) == 10 * 3 * 6


def test_code_shares_are_those_of_each_layer():
    quantizer = trained()
    z = normals(quantizer)
    counts = [torch.bincount(index, minlength=64) for index in quantizer.encode(z).T]
    torch.testing.assert_close(quantizer.code_shares(z), torch.stack(counts) / len(z))


# -- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_uses_every_prefix_and_the_same_for_all_tokens_of_a_step():
    quantizer = trained(dropout=True).train()
    used = [(quantizer(normals(quantizer, 50)).indices >= 0).sum(dim=1) for _ in range(60)]
    assert all(len(counts.unique()) == 1 for counts in used)
    assert {int(counts[0]) for counts in used} == {1, 2, 3, 4}


def test_dropout_makes_an_output_of_the_prefix_alone():
    quantizer = trained("fsq", dropout=True).train()  # its codes and scales hardly change in a step
    for seed in range(6):
        torch.manual_seed(seed)
        out = quantizer(normals(quantizer, 50))
        torch.testing.assert_close(out.z_q, quantizer.decode(out.indices))


def test_dropped_layers_are_in_the_graph_with_no_gradient():
    quantizer = trained(dropout=True).train()
    quantizer._draw = lambda: 2
    quantizer.zero_grad()
    sum(quantizer(normals(quantizer)).losses.values()).backward()
    gradients = [float(layer.embedding.grad.abs().sum()) for layer in quantizer.layers]
    assert gradients[0] > 0 < gradients[1]
    assert gradients[2:] == [0, 0]


def test_eval_drops_nothing():
    quantizer = trained(dropout=True)
    assert (quantizer(normals(quantizer)).indices >= 0).all()


# -- gradients and losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["vq_vae", "ema_vq", "sim_vq", "lfq", "vp_vae"])
def test_the_gradient_of_a_straight_through_base_is_the_upstream_gradient(base):
    quantizer = trained(base).train()
    z, upstream = normals(quantizer).requires_grad_(), normals(quantizer, seed=2)
    (gradient,) = torch.autograd.grad(quantizer(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_the_gradient_of_a_bounded_base_is_that_of_its_first_layer():
    quantizer = trained("fsq").train()
    z = normals(quantizer).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(z).z_q.sum(), z)
    (alone,) = torch.autograd.grad(quantizer.layers[0](z).z_q.sum(), z)
    torch.testing.assert_close(gradient, alone)


def test_commitment_reaches_latents_in_the_unit_of_the_latents():
    """As in SoundStream: mean over layers of |r_q - c_q|^2, independent of the layer's scale."""
    quantizer = trained("ema_vq").train()
    z = normals(quantizer).requires_grad_()
    before = quantizer.codebook / quantizer.scales[:, None, None]
    out = quantizer(z)
    (gradient,) = torch.autograd.grad(out.losses["commitment"], z)
    left, expected = z.detach(), torch.zeros_like(z)
    for q, scale in enumerate(quantizer.scales):
        left = left - scale * before[q][out.indices[:, q]]
        expected += 2 * left / z.numel() / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_losses_are_means_over_the_layers_in_use():
    quantizer = trained("lfq").train()
    z = normals(quantizer)
    quantizer._draw_num_layers = lambda: 1
    first = quantizer(z).losses
    for name, loss in quantizer.layers[0](z).losses.items():
        torch.testing.assert_close(first[name], loss)


# -- scales ---------------------------------------------------------------------------------------------------------


def test_scales_are_the_spread_of_the_residuals_relative_to_the_latents():
    quantizer = built("fsq")
    z = normals(quantizer)
    quantizer(z)
    residual = z - quantizer.decode(prefix(quantizer.encode(z), 1))
    assert quantizer.scales[0] == 1
    torch.testing.assert_close(quantizer.scales[1], residual.square().mean().sqrt() / z.square().mean().sqrt())
    assert (quantizer.scales.diff() < 0).all()


def test_scales_follow_slowly_and_stay_in_eval():
    quantizer = built("fsq")
    quantizer(normals(quantizer))
    before = quantizer.scales.clone()
    quantizer.eval()(0.1 * normals(quantizer))
    assert torch.equal(quantizer.scales, before)
    quantizer.train()(0.1 * normals(quantizer))
    assert 0 < float((quantizer.scales - before).abs().max()) < 0.02


def test_latents_shorter_than_the_codes_never_make_a_coarser_layer():
    quantizer = built("lfq")
    quantizer(0.01 * normals(quantizer))
    assert quantizer.scales.max() == 1


# -- settings -------------------------------------------------------------------------------------------------------


def test_replaced_rows_are_named_by_layer():
    quantizer = built(replace_after=1)
    quantizer(normals(quantizer))
    quantizer(normals(quantizer, 5))
    names = set(quantizer.overwritten_rows())
    assert names == {f"layers.{q}.embedding" for q in range(4)}
    assert all(quantizer.get_parameter(name).shape == (64, 4) for name in names)


def test_sizes_are_handed_to_the_base_unless_it_sets_or_lacks_them():
    assert ResidualConfig({"name": "vq_vae"}, codebook_size=64, dim=4).base_settings() == {
        "name": "vq_vae",
        "codebook_size": 64,
        "dim": 4,
    }
    assert ResidualConfig({"name": "vq_vae", "dim": 8}, dim=4).base_settings() == {"name": "vq_vae", "dim": 8}
    assert ResidualConfig({"name": "fsq"}, codebook_size=64, dim=4).base_settings() == {
        "name": "fsq",
        "codebook_size": 64,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_quantizers": 1}, r"num_quantizers is 1; it must be 2 or more"),
        ({"base": {}}, r"must name a quantizer"),
        ({"base": {"name": "residual"}}, "raise quantizer.num_quantizers instead"),
        ({"base": {"name": "product"}}, "use quantizer.name=product with base residual instead"),
        ({"base": {"name": "gumbel"}}, "no useful residual"),
        ({"base": {"name": "gm_vq"}}, "gm_vq, which reads 128 channels but outputs 64"),
        ({"base": {"name": "token_bridge"}}, "token_bridge, which reads 10 channels but outputs 5"),
        ({"base": {"name": "vq_va"}}, "did you mean 'vq_vae'"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer({"name": "residual", **settings})


def test_every_layer_of_sq_vae_has_its_theta_trained_as_fast_as_its_setting_says():
    quantizer = build_quantizer({"name": "residual", "base": {"name": "sq_vae", "theta_lr": 7.0}, "num_quantizers": 2})
    assert quantizer.lr_scales() == {"layers.0.theta": 7.0, "layers.1.theta": 7.0}
    assert all(quantizer.get_parameter(name).ndim == 0 for name in quantizer.lr_scales())
