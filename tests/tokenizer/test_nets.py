"""Encoders and decoders: shapes, layers and sizes of the papers, and a gradient for every weight."""

from typing import Any

import pytest
import torch
from torch import nn

from tokenizer.nets.base.net import NETS, Net, build_net
from tokenizer.nets.resnet32 import ResBlock as ResNetBlock
from tokenizer.nets.vqgan import Attention, _norm


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """For small nets, synchronising threads costs much more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VQGANS: list[tuple[dict[str, Any], int]] = [  # settings, factor
    ({"multipliers": [1]}, 1),
    ({"multipliers": [1, 2]}, 2),
    ({"multipliers": [1, 2, 2], "attention": False}, 4),
    ({"multipliers": [1, 2, 2], "patch_size": 2, "res_blocks": 1, "attention": False}, 8),
    ({"multipliers": [1, 1, 2, 4]}, 8),
    ({"multipliers": [1, 2], "patch_size": 8}, 16),
]


def vqgan(**settings) -> Net:
    torch.manual_seed(0)
    return build_net({"name": "vqgan", "width": 8, "channels": 12, **settings})


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def conv(width_in: int, width_out: int, side: int) -> int:
    return width_in * width_out * side**2 + width_out


# -- all nets -----------------------------------------------------------------------------------------------------

ALL = [{"name": "resnet32", "channels": 8}, *({"name": "vqgan", "width": 8, "channels": 12, **s} for s, _ in VQGANS)]


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_features_are_smaller_by_the_factor_and_pictures_come_back(settings: dict[str, Any], grid: tuple[int, int]):
    net = build_net(settings).eval()
    x = torch.rand(2, 3, grid[0] * net.factor, grid[1] * net.factor)
    h = net.encode(x)
    assert h.shape == (2, net.channels, *grid)
    assert x.numel() == net.values_per_token * h[:, 0].numel()
    assert net.decode(h).shape == x.shape


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_every_weight_takes_part(settings: dict[str, Any]):
    net = build_net(settings)
    x = torch.rand(4, 3, 4 * net.factor, 4 * net.factor)
    (net.decode(net.encode(x)) - x).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_papers_nets_are_in_the_registry():
    assert {"resnet32", "vqgan"} <= set(NETS.names())


def test_an_unknown_net_is_reported_with_its_neighbour():
    with pytest.raises(ValueError, match="unknown net 'resnet23'; did you mean 'resnet32'"):
        build_net({"name": "resnet23"})


# -- VQGAN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "factor"), VQGANS, ids=str)
def test_vqgan_factor_is_patch_times_halvings(settings: dict[str, Any], factor: int):
    assert vqgan(**settings).factor == factor


@pytest.mark.parametrize("attention", [False, True])
def test_attention_stands_once_in_each_half(attention: bool):
    net = vqgan(multipliers=[1, 2], attention=attention)
    for half in (net.encoder, net.decoder):
        assert sum(isinstance(m, Attention) for m in half.modules()) == int(attention)


def test_attention_is_softmax_of_scaled_products():
    """Compared to the formula of arXiv 1706.03762, eq. 1, in float64."""
    torch.manual_seed(0)
    layer = Attention(8).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    rows = layer.norm(x).flatten(2).transpose(1, 2) @ layer.qkv.weight.flatten(1).T + layer.qkv.bias
    q, k, v = rows[..., :8], rows[..., 8:16], rows[..., 16:]
    mixed = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=2) @ v
    expected = x + (mixed @ layer.out.weight.flatten(1).T + layer.out.bias).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), expected)


def test_without_attention_a_far_pixel_moves_a_feature_only_through_the_norms():
    net = vqgan(multipliers=[1, 1], res_blocks=1, attention=False).eval()
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    x = torch.rand(1, 3, 64, 64)
    other = x.clone()
    other[..., -1, -1] = 0
    moved = (net.encode(x) - net.encode(other)).abs().sum(dim=1)[0] > 0
    assert moved[-1, -1]
    assert not moved[:16, :16].any()


def test_vqgan_starts_near_mid_grey():
    x = torch.rand(2, 3, 32, 32)
    net = vqgan(multipliers=[1, 2], patch_size=2)
    assert net.decode(net.encode(x)).mean().item() == pytest.approx(0.5, abs=0.2)


def test_vqgan_sees_0_to_1_as_minus_1_to_1():
    net = vqgan(multipliers=[1])
    net.encoder = net.decoder = nn.Identity()
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(net.encode(x), 2 * x - 1)
    assert torch.allclose(net.decode(net.encode(x)), x)


def test_weights_of_a_vqgan_counted_by_hand():
    """Width 8, levels [1, 2], one block per level, attention: counted from the layers of taming-transformers."""

    def block(width_in: int, width_out: int) -> int:
        norms = 2 * width_in + 2 * width_out
        skip = conv(width_in, width_out, 1) if width_in != width_out else 0
        return norms + conv(width_in, width_out, 3) + conv(width_out, width_out, 3) + skip

    middle = 2 * block(16, 16) + 2 * 16 + 4 * conv(16, 16, 1)
    encoder = conv(3, 8, 3) + block(8, 8) + conv(8, 8, 3) + block(8, 16) + middle + 2 * 16 + conv(16, 12, 3)
    up = conv(16, 16, 3)
    decoder = conv(12, 16, 3) + middle + 2 * block(16, 16) + up + block(16, 8) + block(8, 8) + 2 * 8 + conv(8, 3, 3)
    net = vqgan(multipliers=[1, 2], res_blocks=1)
    assert (count(net.encoder), count(net.decoder)) == (encoder, decoder)


@pytest.mark.parametrize(
    ("width", "groups"), [(128, 32), (512, 32), (64, 16), (32, 8), (24, 4), (8, 2), (6, 1), (3, 1)]
)
def test_norms_have_groups_of_four_channels_or_more(width: int, groups: int):
    assert _norm(width).num_groups == groups


# -- ResNet32 -----------------------------------------------------------------------------------------------------


def test_resnet32_takes_cifar10_to_8_by_8_by_64():
    net = build_net({"name": "resnet32"})
    assert (net.factor, net.channels) == (4, 64)
    assert net.encode(torch.rand(5, 3, 32, 32)).shape == (5, 64, 8, 8)
    assert net.decode(torch.rand(5, 64, 8, 8)).shape == (5, 3, 32, 32)


def test_resnet32_has_the_layers_of_the_paper():
    """The layers of SQ-VAE (arXiv 2205.07547, github.com/sony/sqvae), as listed in docs/methods.md."""
    net = build_net({"name": "resnet32"})
    stem = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    assert [type(m) for m in net.encoder] == [*stem, ResNetBlock, ResNetBlock]
    up = [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU] * 2
    assert [type(m) for m in net.decoder] == [ResNetBlock, ResNetBlock, *up, nn.ConvTranspose2d, nn.Sigmoid]
    body = [nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]
    assert [type(m) for m in net.encoder[-1].body] == body


def test_weights_of_resnet32_counted_by_hand():
    block = conv(64, 64, 3) + conv(64, 64, 1) + 2 * 128
    stem = conv(3, 32, 4) + 64 + conv(32, 64, 4) + 128 + conv(64, 64, 3) + 128
    head = conv(64, 64, 3) + 128 + conv(64, 32, 4) + 64 + conv(32, 3, 4)
    net = build_net({"name": "resnet32"})
    assert (count(net.encoder), count(net.decoder)) == (stem + 2 * block, head + 2 * block) == (154_336, 154_147)


def test_a_block_of_resnet32_does_not_change_what_its_skip_carries():
    block = ResNetBlock(8).eval()
    for module in block.body:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_resnet32_gives_pictures_in_0_to_1():
    net = build_net({"name": "resnet32", "channels": 8})
    x_hat = net.decode(100 * torch.randn(2, 8, 4, 4))
    assert 0 <= x_hat.min() <= x_hat.max() <= 1
