"""Long clips through a convolutional net in windows, without a change of the result.

A window holds the frames around its centre on which the centre depends, and ends where the clip ends. The net's own
padding at both ends of a clip therefore stays, and memory does not grow with the clip. The result equals that of the
whole clip up to rounding, and depends on nothing but the clip.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

WINDOW_FRAMES = 512


def in_windows(run: Callable[[Tensor], Tensor], t: Tensor, units: tuple[int, int], context: int) -> Tensor:
    """run in windows: [1, any, F * units[0]] -> [1, any, F * units[1]].

    context: how many frames before and after a frame its result depends on. A result of run that is shorter than its
    frames, as of a transposed convolution with an odd stride, gets zeros at its end.
    """
    unit, unit_out = units
    frames = t.shape[-1] // unit
    parts = []
    for start in range(0, frames, WINDOW_FRAMES):
        kept = min(WINDOW_FRAMES, frames - start)
        first, last = max(0, start - context), min(frames, start + kept + context)
        result = run(t[..., first * unit : last * unit])
        result = nn.functional.pad(result, (0, (last - first) * unit_out - result.shape[-1]))
        parts.append(result[..., (start - first) * unit_out : (start - first + kept) * unit_out])
    return torch.cat(parts, dim=-1)


def context_frames(net: nn.Module, factor: int, *, decoder: bool) -> int:
    """An upper bound of the frames on each side that a frame depends on: the sum over all convolutions, also over those
    that run beside each other."""
    reach, step = 0.0, float(factor if decoder else 1)  # in samples; step: of the layer's input
    for layer in net.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            step /= layer.stride[0]
            reach += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
        elif isinstance(layer, nn.Conv1d):
            reach += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
            step *= layer.stride[0]
    return math.ceil(reach / factor)
