"""The CIFAR-10 autoencoder of SQ-VAE (sony/sqvae), Huh 2023 and GM-VQ: 32x32 pictures to 8x8 features of 64 channels.

Pictures are [B, 3, H, W] in 0..1, with sides that are multiples of 4.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from tokenizer.nets.base.net import NETS, Net


@dataclass
class ResNet32Config:
    channels: int = 64
    res_blocks: int = 2


@NETS.register("resnet32")
class ResNet32(Net):
    Config = ResNet32Config
    factor = 4

    def __init__(self, config: ResNet32Config):
        super().__init__()
        width, self.channels = config.channels, config.channels
        blocks = [[ResBlock(width) for _ in range(config.res_blocks)] for _ in range(2)]
        self.encoder = nn.Sequential(
            *_with_relu(nn.Conv2d(3, width // 2, 4, stride=2, padding=1), width // 2),
            *_with_relu(nn.Conv2d(width // 2, width, 4, stride=2, padding=1), width),
            *_with_relu(nn.Conv2d(width, width, 3, padding=1), width),
            *blocks[0],
        )
        self.decoder = nn.Sequential(
            *blocks[1],
            *_with_relu(nn.ConvTranspose2d(width, width, 3, padding=1), width),
            *_with_relu(nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1), width // 2),
            nn.ConvTranspose2d(width // 2, 3, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, h: Tensor) -> Tensor:
        return self.decoder(h)


class ResBlock(nn.Module):
    """ReLU, 3x3 convolution, norm, ReLU, 1x1 convolution, norm, with a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
            *(nn.ReLU(), nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _with_relu(conv: nn.Module, width: int) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(width), nn.ReLU()
