"""The convolutional encoder and decoder of VQGAN, arXiv 2012.09841: residual blocks, group norm, SiLU.

Pictures are [B, 3, H, W] in 0..1. Differs: with `patch_size` the first convolution reads patches of several pixels,
which makes nets that a CPU can train; attention is only at the bottleneck; downsampling pads all sides equally.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from tokenizer.nets.base.net import NETS, Net


@dataclass
class VQGANConfig:
    """multipliers: channels of each level in units of width; every level but the last halves the sides."""

    width: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 4])
    res_blocks: int = 2  # per level
    channels: int = 256  # of the encoder's output
    attention: bool = True
    patch_size: int = 1  # pixels per side of the patches that the first convolution reads

    def __post_init__(self) -> None:
        if not self.multipliers or min(*self.multipliers, self.width, self.channels, self.patch_size) < 1:
            raise ValueError(
                f"model.net.multipliers is {self.multipliers}, with width={self.width}, channels={self.channels} and "
                f"patch_size={self.patch_size}; all must be 1 or more, and multipliers must not be empty"
            )


@NETS.register("vqgan")
class VQGAN(Net):
    Config = VQGANConfig

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.factor = config.patch_size * 2 ** (len(config.multipliers) - 1)
        self.channels = config.channels
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(2 * x - 1)

    def decode(self, h: Tensor) -> Tensor:
        return (self.decoder(h) + 1) / 2


def _encoder(config: VQGANConfig) -> nn.Sequential:
    widths = [config.width * m for m in config.multipliers]
    layers: list[nn.Module] = [_patch_in(3, widths[0], config.patch_size)]
    before = widths[0]
    for level, width in enumerate(widths):
        layers += [ResBlock(before if i == 0 else width, width) for i in range(config.res_blocks)]
        before = width
        if level + 1 < len(widths):
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
    layers += [*_bottleneck(before, config.attention), _norm(before), nn.SiLU(), _conv3(before, config.channels)]
    return nn.Sequential(*layers)


def _decoder(config: VQGANConfig) -> nn.Sequential:
    widths = [config.width * m for m in config.multipliers]
    layers: list[nn.Module] = [_conv3(config.channels, widths[-1]), *_bottleneck(widths[-1], config.attention)]
    before = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        layers += [ResBlock(before if i == 0 else width, width) for i in range(config.res_blocks + 1)]
        before = width
        if level > 0:
            layers.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), _conv3(width, width)))
    layers += [_norm(before), nn.SiLU(), *_patch_out(before, 3, config.patch_size)]
    return nn.Sequential(*layers)


def _bottleneck(width: int, attention: bool) -> list[nn.Module]:
    middle: list[nn.Module] = [Attention(width)] if attention else []
    return [ResBlock(width, width), *middle, ResBlock(width, width)]


class ResBlock(nn.Module):
    """Twice norm, SiLU and 3x3 convolution, with a skip connection."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.body = nn.Sequential(
            *(_norm(width_in), nn.SiLU(), _conv3(width_in, width_out)),
            *(_norm(width_out), nn.SiLU(), _conv3(width_out, width_out)),
        )
        self.skip = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class Attention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = _norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(mixed.transpose(1, 2).reshape(batch, width, height, breadth))


def _norm(width: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if (width % g == 0 and width // g >= 4) or g == 1)
    return nn.GroupNorm(groups, width, eps=1e-6)


def _conv3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


def _patch_in(width_in: int, width_out: int, patch: int) -> nn.Conv2d:
    if patch == 1:
        return _conv3(width_in, width_out)
    return nn.Conv2d(width_in, width_out, patch, stride=patch)


def _patch_out(width_in: int, width_out: int, patch: int) -> list[nn.Module]:
    last = _conv3(width_in, width_out * patch**2)
    assert last.bias is not None
    nn.init.zeros_(last.bias)  # mid grey at the start
    return [last] if patch == 1 else [last, nn.PixelShuffle(patch)]
