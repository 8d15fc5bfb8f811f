"""Product quantization: each group alone; with plain and residual bases, and bases with more inputs than outputs."""

import copy

import pytest
import torch
from torch import Tensor

from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.base.quantizer import Quantizer, build_quantizer
from tokenizer.quantizers.product import Product, ProductConfig
from tokenizer.training.step import known_losses

BASES = {  # small enough to train here
    "vq_vae": {},
    "lfq": {},
    "gm_vq": {},
    "gumbel": {},
    "vp_vae": {"latents_per_code": 16, "update_probability": 0.5},
    "residual": {"base": {"name": "ema_vq"}, "num_quantizers": 3},
}
all_bases = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def built(base: str = "vq_vae", groups: int = 2, **settings) -> Product:
    return Product(ProductConfig({"name": base, **BASES[base], **settings}, groups, codebook_size=64, dim=4))


def normals(quantizer: Quantizer, count: int = 500, seed: int = 1) -> Tensor:
    return torch.randn(count, quantizer.in_dim, generator=torch.Generator().manual_seed(seed))


def trained(base: str = "vq_vae", **settings) -> Product:
    quantizer = built(base, **settings)
    for step in range(10):
        quantizer(normals(quantizer, seed=100 + step))
    quantizer.fit(normals(quantizer, 1000, seed=50))
    return quantizer.eval()


@all_bases
def test_each_group_is_its_base_on_its_own_channels(base):
    quantizer = trained(base)
    z, first = normals(quantizer), quantizer.layers[0]
    left, right = (layer(part) for layer, part in zip(quantizer.layers, z.chunk(2, dim=1), strict=True))
    out = quantizer(z)
    assert torch.equal(out.z_q, torch.cat([left.z_q, right.z_q], dim=1))
    assert out.indices.shape == (500, 2 * first.num_quantizers)
    assert torch.equal(out.indices, torch.cat([i.reshape(500, -1) for i in (left.indices, right.indices)], dim=1))
    assert torch.equal(quantizer.decode(quantizer.encode(z)), out.z_q)


@all_bases
def test_the_output_is_the_sum_of_codes_that_are_0_outside_their_group(base):
    quantizer = trained(base)
    out, codebook, size = quantizer(normals(quantizer)), quantizer.codebook, quantizer.layers[0].dim
    per_group = quantizer.layers[0].num_quantizers
    assert codebook.shape == (2 * per_group, quantizer.codebook_size, 2 * size)
    codes = [codes[index] for codes, index in zip(codebook, out.indices.T, strict=True)]
    torch.testing.assert_close(torch.stack(codes).sum(dim=0), out.z_q)
    assert (codebook[:per_group, :, size:] == 0).all()
    assert (codebook[per_group:, :, :size] == 0).all()


@all_bases
def test_shares_are_those_of_each_group(base):
    quantizer = trained(base)
    z = normals(quantizer)
    parts = z.chunk(2, dim=1)
    expected = [layer.code_shares(part).reshape(-1, 64) for layer, part in zip(quantizer.layers, parts, strict=True)]
    assert torch.equal(quantizer.code_shares(z), torch.cat(expected))


@all_bases
def test_losses_are_the_means_over_the_groups_under_the_weights_of_the_base(base):
    quantizer = trained(base).train()
    alone, z = copy.deepcopy(quantizer), normals(quantizer)
    torch.manual_seed(3)
    out = quantizer(z)
    torch.manual_seed(3)
    left, right = (layer(part).losses for layer, part in zip(alone.layers, z.chunk(2, dim=1), strict=True))
    assert set(out.losses) == set(quantizer.default_loss_weights) == set(quantizer.layers[0].default_loss_weights)
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, (left[name] + right[name]) / 2)


def test_a_group_has_the_codes_that_its_channels_alone_would_have():
    quantizer, alone = built("vp_vae"), built("vp_vae").layers
    latents = normals(quantizer, 2000)
    curve = quantizer.fit(latents, codebook_size=16, seed=3)
    left, right = (layer.fit(part, 16, seed=3) for layer, part in zip(alone, latents.chunk(2, dim=1), strict=True))
    assert curve == pytest.approx([*left, *right])
    assert quantizer.codebook_size == 16
    assert torch.equal(quantizer.codebook[0, :, :2], alone[0].codebook)
    assert torch.equal(quantizer.codebook[1, :, 2:], alone[1].codebook)


def test_the_gradient_of_a_group_stays_in_its_channels():
    quantizer = trained().train()
    z, upstream = normals(quantizer).requires_grad_(), torch.randn(500, 4)
    upstream[:, 2:] = 0
    (gradient,) = torch.autograd.grad(quantizer(z).z_q, z, upstream)
    assert torch.equal(gradient, upstream)


def test_a_dropped_quantizer_of_a_residual_group_decodes_to_zero():
    """By hand: of 3 quantizers in each of 2 groups, the last two of the first and all of the second are dropped."""
    quantizer = trained("residual")
    indices = quantizer.encode(normals(quantizer))
    indices[:, 1:] = -1
    first = quantizer.codebook[0][indices[:, 0]]
    torch.testing.assert_close(quantizer.decode(indices), first)
    assert (first[:, 2:] == 0).all()


def test_replaced_rows_are_named_by_group():
    quantizer = built(replace_after=1)
    quantizer(normals(quantizer))
    quantizer(normals(quantizer, 5))
    assert set(quantizer.overwritten_rows()) == {"layers.0.embedding", "layers.1.embedding"}


def test_dim_is_that_of_all_groups_and_the_size_of_each():
    assert ProductConfig({"name": "vq_vae"}, groups=4, codebook_size=64, dim=8).base_settings() == {
        "name": "vq_vae",
        "codebook_size": 64,
        "dim": 2,
    }
    by_size = build_quantizer({"name": "product", "base": {"name": "fsq"}, "groups": 3, "codebook_size": 64})
    assert (by_size.num_quantizers, by_size.in_dim, by_size.codebook_size) == (3, 6, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 1}, r"quantizer\.groups is 1; it must be 2 or more"),
        ({"groups": 3, "dim": 4}, r"quantizer\.dim is 4; it must be a multiple of quantizer\.groups, which is 3"),
        ({"base": {}}, "must name a quantizer"),
        ({"base": {"name": "product"}}, "raise quantizer.groups instead"),
        ({"base": {"name": "vq_va"}}, "did you mean 'vq_vae'"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer({"name": "product", **settings})


@pytest.mark.parametrize("settings", [{"name": "product", "groups": 4}, {"name": "residual", "num_quantizers": 3}])
def test_losses_that_a_paper_sums_over_tokens_are_summed_over_the_quantizers_too(settings):
    """A latent has one token per quantizer: D_x mse + the sum of the KL terms over all tokens."""
    count = settings.get("groups") or settings["num_quantizers"]
    quantizer = {**settings, "base": {"name": "sq_vae"}, "codebook_size": 16, "dim": 8}
    net = {"name": "resnet32", "channels": 8, "res_blocks": 1}
    autoencoder = Autoencoder({"modality": "image", "net": net, "quantizer": quantizer})
    alone = Autoencoder({"modality": "image", "net": net, "quantizer": {"name": "sq_vae", "dim": 8}})
    weights, of_one = (known_losses(one, build_modality("image", {})) for one in (autoencoder, alone))
    assert weights["kl_discrete"] == pytest.approx(count * of_one["kl_discrete"]) == pytest.approx(count / 24)
