"""The adversarial loss of image autoencoders, and the patch discriminator that it trains against.

The net is pix2pix's (arXiv 1611.07004), trained as in VQGAN (arXiv 2012.09841): it predicts for each patch of a picture
whether it is real, and the autoencoder learns to make reconstructions that pass as real. x and x_hat are
[B, 3, H, W] in 0..1.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenizer.distributed import mean_across_ranks
from tokenizer.training.recipe import DiscriminatorConfig

MAX_ADAPTIVE_WEIGHT = 1e4  # the limit that taming-transformers uses


class PatchDiscriminator(nn.Module):
    """x -> logits [B, 1, h, w], one per patch (70 x 70 pixels with 3 layers); above 0 means that it looks real.

    Differs: group norm instead of batch norm, so a picture's logits depend on no other picture. Originals and
    reconstructions can share a batch, ranks need not share statistics, and gradient accumulation is exact.
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


class GanLoss:
    """The discriminator, its optimizer, and the losses of both sides.

    All ranks have the same discriminator: they start from one seed and average the gradients.
    """

    def __init__(self, config: DiscriminatorConfig, device: torch.device, seed: int, autocast: bool):
        self.config, self.device, self.autocast = config, device, autocast
        with torch.random.fork_rng(devices=[]):  # so that training draws the same noise as without a discriminator
            torch.default_generator.manual_seed(seed)
            self.net = PatchDiscriminator(config).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, betas=(0.5, 0.9))

    def generator_loss(self, x_hat: Tensor) -> Tensor:
        """The autoencoder's loss: minus the mean logit of its reconstructions. No gradient for the discriminator."""
        frozen = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        with self._precision():
            logits = functional_call(self.net, frozen, (x_hat,))
        return -logits.float().mean()

    def add_gradients(self, x: Tensor, x_hat: Tensor, share: float) -> dict[str, Tensor]:
        """Adds the gradients of share times the discriminator's loss.

        Returns that loss and the mean logits, also multiplied by share.
        """
        with self._precision():
            logits = self.net(torch.cat([x, x_hat.detach()]))
        real, fake = logits.float().chunk(2)
        loss = hinge_loss(real, fake)
        (share * loss).backward()
        values = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {name: share * value.detach() for name, value in values.items()}

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Averages the gradients over the ranks, then clips them. Returns their norm before clipping."""
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
    """The discriminator's loss from its logits: 0 when real ones are above 1 and fake ones below -1.

    arXiv 1705.02894.
    """
    return (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2


def adaptive_weight(loss: Tensor, adversarial: Tensor, x_hat: Tensor) -> Tensor:
    """The factor that makes the adversarial loss's gradient at x_hat as large as that of loss. It has no gradient.

    Source: arXiv 2012.09841, eq. 7. Differs: measured at the decoder's output, as EnCodec's balancer does
    (arXiv 2210.13438, section 3.4), instead of at the weights of the last layer, because every net has an output.
    """
    norm, adversarial_norm = (
        torch.autograd.grad(one, x_hat, retain_graph=True)[0].norm() for one in (loss, adversarial)
    )
    return (norm / adversarial_norm.clamp(min=1e-12)).clamp(max=MAX_ADAPTIVE_WEIGHT)


def _conv4(width_in: int, width_out: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
