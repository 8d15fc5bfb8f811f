"""The InceptionV3 of the Frechet Inception Distance, for the weights of pytorch-fid and torch-fidelity.

These are TensorFlow's weights of 2015-12-05. The net differs from torchvision's in three places: average pooling
excludes the padding, the last block uses max pooling, and pictures are resized by TensorFlow 1's bilinear
interpolation. Sources: arXiv 1512.00567 (the net), arXiv 1706.08500 (the distance), torch-fidelity 0.4.0 (the
resizing).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # side of the net's input pictures, in pixels
NUM_FEATURES = 2048
Kernel = int | tuple[int, int]
Layer = Any  # (name, channels, kernel[, stride]), a list of layers that share an input, or the name of a pooling


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU. pad: whether to pad by half the kernel; by default only if stride is 1."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, *, pad: bool | None = None):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padded = stride == 1 if pad is None else pad
        padding = (sides[0] // 2, sides[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches with the same input and concatenated outputs. Layers have their names in the weights file."""

    def __init__(self, channels: int, branches: list[list[Layer]]):
        super().__init__()
        self.channels = 0  # of the output
        self.branches: list[list[str | list[str]]] = []  # per step a pooling, or the names of parallel convolutions
        for branch in branches:
            width = channels
            steps: list[str | list[str]] = []
            for layer in branch:
                if isinstance(layer, str):
                    steps.append(layer)
                    continue
                parallel = layer if isinstance(layer, list) else [layer]
                for name, *shape in parallel:
                    self.add_module(name, ConvNorm(width, *shape))
                width = sum(out for _, out, *_ in parallel)
                steps.append([name for name, *_ in parallel])
            self.branches.append(steps)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(steps, x) for steps in self.branches], dim=1)

    def _run(self, steps: list[str | list[str]], x: Tensor) -> Tensor:
        for step in steps:
            if isinstance(step, str):
                x = _pool(step, x)
            else:
                x = torch.cat([self.get_submodule(name)(x) for name in step], dim=1)
        return x


class FidInception(nn.Module):
    """x [B, 3, H, W] float RGB in [0, 1], rounded to 8 bits -> [B, 2048], the mean over positions of the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        channels = 192
        for name, branches in BLOCKS.items():
            block = Mixed(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        assert channels == NUM_FEATURES

    def forward(self, x: Tensor) -> Tensor:
        x = resize_as_tensorflow_1((255 * x).round(), SIDE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _pool("max, stride 2", x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _pool("max, stride 2", x)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


def resize_as_tensorflow_1(x: Tensor, side: int) -> Tensor:
    """x [B, C, H, W] -> [B, C, side, side]: bilinear without antialiasing; output pixel i is at input i * H / side.

    In torch's own function it is at (i + 0.5) * H / side - 0.5.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        positions = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)
        low = positions.long()
        high = (low + 1).clamp(max=size - 1)
        shape = [1, 1, side, 1] if dim == 2 else [1, 1, 1, side]
        share = (positions - low).reshape(shape)
        at_low, at_high = x.index_select(dim, low), x.index_select(dim, high)
        x = at_low + (at_high - at_low) * share
    return x


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "max":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    assert kind == "max, stride 2"
    return F.max_pool2d(x, 3, stride=2)


def _a(pooled: int) -> list[list[Layer]]:
    """35 x 35 positions. pooled: channels of the pooling branch."""
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    ]


def _c(inner: int) -> list[list[Layer]]:
    """17 x 17 positions, 7 x 7 kernels factored into a row and a column. inner: channels between them."""
    row, column = (1, 7), (7, 1)
    first = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row)]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [*first, ("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)],
        ["average", ("branch_pool", 192, 1)],
    ]


def _e(pooling: str) -> list[list[Layer]]:
    """8 x 8 positions, 3 x 3 kernels replaced by a row and a column in parallel."""

    def row_and_column(name: str) -> list[Layer]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), row_and_column("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), row_and_column("branch3x3dbl_3")],
        [pooling, ("branch_pool", 192, 1)],
    ]


BLOCKS: dict[str, list[list[Layer]]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        ["max, stride 2"],
    ],
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        ["max, stride 2"],
    ],
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("max"),
}
