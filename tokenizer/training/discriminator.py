"""A discriminator of patches, and its part in the training of an autoencoder of pictures.

pix2pix's net (arXiv 1611.07004) as VQGAN trains with it (arXiv 2012.09841): it says for each patch of a picture whether
it is real, and the autoencoder learns to be taken for real. x and x_hat are [B, 3, H, W] in 0..1.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenizer.distributed import mean_across_ranks

MAX_BALANCE = 1e4  # taming-transformers' clamp


@dataclass
class DiscriminatorConfig:
    """weight: pull of the adversarial loss on a reconstruction, over that of all other losses; 0 for no discriminator.

    start_step: updates that the autoencoder makes alone first. channels: of the first convolution. layers: how often
    the sides are halved. lr: constant.
    """

    weight: float = 0.0
    start_step: int = 5000
    channels: int = 64
    layers: int = 3
    lr: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.discriminator.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("weight", "start_step", "lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.discriminator.{name} is {getattr(self, name)}; it must be finite, 0 or more")

    @property
    def smallest_side(self) -> int:
        """In pixels, of a picture for which there is at least one logit."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """x -> logits [B, 1, h, w], one for each patch (70 x 70 pixels with 3 layers), above 0 where it looks real.

    Differs: group norm instead of batch norm. A picture's logits then depend on no other picture, so that real and
    rebuilt ones go through in one batch, ranks need not share statistics, and pieces of a batch give its gradient.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        strides = [2] * (config.layers - 1) + [1]
        layers: list[nn.Module] = [_conv4(3, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for (before, width), stride in zip(itertools.pairwise(widths), strides, strict=True):
            norm = nn.GroupNorm(math.gcd(32, config.channels), width)
            layers += [_conv4(before, width, stride), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _conv4(widths[-1], 1, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(2 * x - 1)


class Adversary:
    """A discriminator, its optimizer, and the losses between it and an autoencoder.

    Every rank has the same weights, from the same seed and gradients that are averaged over ranks.
    """

    def __init__(self, config: DiscriminatorConfig, device: torch.device, seed: int, autocast: bool):
        self.config, self.device, self.autocast = config, device, autocast
        with torch.random.fork_rng(devices=[]):  # else training would draw other noise than without a discriminator
            torch.default_generator.manual_seed(seed)
            self.net = PatchDiscriminator(config).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, betas=(0.5, 0.9))

    def loss_of(self, x_hat: Tensor) -> Tensor:
        """What the autoencoder lowers to be taken for real. Its gradient goes to x_hat, not to the discriminator."""
        frozen = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        with self._precision():
            logits = functional_call(self.net, frozen, (x_hat,))
        return -logits.float().mean()

    def add_gradients(self, x: Tensor, x_hat: Tensor, share: float) -> dict[str, Tensor]:
        """Adds those of share times the discriminator's own loss. Returns it and the mean logits, times share too."""
        with self._precision():
            logits = self.net(torch.cat([x, x_hat.detach()]))
        real, fake = logits.float().chunk(2)
        loss = hinge_loss(real, fake)
        (share * loss).backward()
        told = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {name: share * value.detach() for name, value in told.items()}

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Averages the gradients over the ranks, then clips them. Returns their norm before."""
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            parameter.grad = mean_across_ranks(parameter.grad.contiguous())
        return nn.utils.clip_grad_norm_(self.net.parameters(), max_norm)

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's, of logits; 0 once real ones are above 1 and fake ones below -1. Source: arXiv 1705.02894."""
    return (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2


def balance(loss: Tensor, adversarial: Tensor, x_hat: Tensor) -> Tensor:
    """The factor that gives the adversarial loss as large a gradient at x_hat as loss has. No gradient of its own.

    arXiv 2012.09841, equation 7. Differs: at the decoder's output, as EnCodec's balancer (arXiv 2210.13438, section
    3.4), instead of the weights of its last layer: every net has an output.
    """
    push, pull = (torch.autograd.grad(one, x_hat, retain_graph=True)[0].norm() for one in (loss, adversarial))
    return (push / pull.clamp(min=1e-12)).clamp(max=MAX_BALANCE)


def _conv4(width_in: int, width_out: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
