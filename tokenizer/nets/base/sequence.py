"""Nets over time, and clips of any length processed in windows of a fixed size.

Windows limit memory, and make a clip's result independent of the other clips in its batch. The first window_frames
frames of a clip are the centre of its first window, the next window_frames frames the centre of the second, and so on.
Around the centre a window has the frames of the net's context; frames outside the clip are padding, which the mask
clears. The result is the concatenation of the centres.

No centre depends on anything outside its window, so the result equals that of the whole clip up to rounding, which
depends on the shape of a convolution's input. Every call here has the shape of one window. A clip's result therefore
has the same bits in any batch and with any padding, for a given window_frames. Windows that contain only padding are
skipped; their result is 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tokenizer.nets.base.net import Net

Run = Callable[[Tensor, Tensor], Tensor]  # (window, mask) -> result


class Context(NamedTuple):
    """How many frames before and after a frame its result depends on."""

    before: int
    after: int


class SequenceNet(Net):
    """A net over time, [B, input channels, T], with a mask and a known context.

    mask [B, 1, F] (bool, or 0 and 1): which of the F = T / factor frames are not padding; None: all. Padding has no
    effect on the result of a clip, except for rounding, which can depend on the shape of the input. Results are 0 where
    the mask is 0. encode and decode raise ValueError for a mask of another shape, and encode also if T is not a
    multiple of factor.
    """

    in_channels = 1
    spatial_dims = 1
    window_frames: int  # frames per window in a frozen tokenizer, without the context

    def encode_frozen(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return encode_in_windows(self, x, mask, self.window_frames)

    def decode_frozen(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return decode_in_windows(self, h, mask, self.window_frames)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, input channels, T] with T a multiple of factor -> [B, channels, F]."""
        raise AssertionError(f"{type(self).__name__} lacks encode")

    def decode(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, channels, F] -> [B, input channels, F * factor]."""
        raise AssertionError(f"{type(self).__name__} lacks decode")

    @property
    def encode_context(self) -> Context:
        """Frames whose samples the features of a frame depend on."""
        raise AssertionError(f"{type(self).__name__} lacks encode_context")

    @property
    def decode_context(self) -> Context:
        """Frames whose features the samples of a frame depend on."""
        raise AssertionError(f"{type(self).__name__} lacks decode_context")


def encode_in_windows(net: SequenceNet, x: Tensor, mask: Tensor | None, window_frames: int) -> Tensor:
    """net.encode(x, mask) in windows: [B, input channels, F * factor] -> [B, channels, F].

    mask [B, 1, F] or None. Raises ValueError if x is empty or its length is not a multiple of factor, for a mask of
    another shape, and for window_frames below 1. Memory: x, the result, and what encode needs for one window.
    """
    frames, rest = divmod(x.shape[-1], net.factor)
    if rest:
        raise ValueError(
            f"x has {x.shape[-1]} samples, {rest} more than a multiple of {net.factor}; pad it to a multiple"
        )
    windows = _Windows(_checked(mask, x, frames), net.encode_context, window_frames)
    return windows.run(net.encode, x, units=(net.factor, 1))


def decode_in_windows(net: SequenceNet, h: Tensor, mask: Tensor | None, window_frames: int) -> Tensor:
    """net.decode(h, mask) in windows: [B, channels, F] -> [B, input channels, F * factor]. Otherwise as above."""
    windows = _Windows(_checked(mask, h, h.shape[-1]), net.decode_context, window_frames)
    return windows.run(net.decode, h, units=(1, net.factor))


class _Windows:
    """The windows of a batch. Positions are in frames from the start of a clip."""

    def __init__(self, mask: Tensor, context: Context, window_frames: int):
        if min(mask.shape[-1], window_frames) < 1:
            raise ValueError(f"frames={mask.shape[-1]} and {window_frames=} must be 1 or more")
        self.mask, self.context, self.window_frames = mask, context, window_frames

    def run(self, function: Run, t: Tensor, *, units: tuple[int, int]) -> Tensor:
        """Applies function to all windows of t: [B, any, F * units[0]] -> [B, any, F * units[1]]."""
        unit, unit_out = units
        frames, before = self.mask.shape[-1], self.context.before
        result = None
        for row, start in self._centres():
            [window] = function(self._window(t[row], start, unit)[None], self._window(self.mask[row], start, 1)[None])
            if result is None:
                result = window.new_zeros(len(t), len(window), frames * unit_out)
            kept = min(self.window_frames, frames - start)
            centre = window[:, before * unit_out : (before + kept) * unit_out]
            result[row, :, start * unit_out : (start + kept) * unit_out] = centre
        assert result is not None
        return result

    def _centres(self) -> list[tuple[int, int]]:
        """(row, first frame of the centre) of each window that is not only padding; at least one window."""
        centres = functional.pad(self.mask[:, 0] != 0, (0, -self.mask.shape[-1] % self.window_frames))
        real = centres.unflatten(1, (-1, self.window_frames)).any(dim=2).nonzero().tolist() or [[0, 0]]
        return [(row, number * self.window_frames) for row, number in real]

    def _window(self, t: Tensor, start: int, unit: int) -> Tensor:
        """[any, window * unit]: a window of a clip with its context, zeros outside the clip."""
        before, after = self.context
        return _cut(t, (start - before) * unit, (start + self.window_frames + after) * unit)


def _cut(t: Tensor, first: int, last: int) -> Tensor:
    """t[..., first:last], with zeros outside t."""
    length = t.shape[-1]
    return functional.pad(t[..., max(0, first) : last], (max(0, -first), max(0, last - length)))


def _checked(mask: Tensor | None, t: Tensor, frames: int) -> Tensor:
    """The mask, or one with all frames, so that clips with and without a mask get the same bits."""
    if mask is None:
        return torch.ones(len(t), 1, frames, dtype=torch.bool, device=t.device)
    if mask.shape != (len(t), 1, frames):
        raise ValueError(f"the mask has shape {list(mask.shape)}, but these clips need {[len(t), 1, frames]}")
    return mask
