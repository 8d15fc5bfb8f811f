"""Nets over time, and clips of any length through them in windows of one size.

Windows bound memory, and no neighbour changes a result. The first window_frames frames of a clip are the centre of its
first window, the next ones that of the second, and so on. Around its centre a window has as many frames as the net's
context: the clip's own where it has them, else padding, which the mask clears, as it clears what is behind the clip's
end. The centres side by side are the result.

It is that of the whole clip, since no centre depends on anything outside of its window, but for rounding: a library of
convolutions adds in another order when it is given another shape. Here every call has the same shape, one window. So a
clip's result has the same bits alone, beside any clips and under any padding, for the same window_frames. Windows
without a real frame are not computed: their result is 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tokenizer.nets.base.net import Net

Run = Callable[[Tensor, Tensor], Tensor]  # a window and its mask to a result


class Context(NamedTuple):
    """Frames before and after a frame that its result depends on."""

    before: int
    after: int


class SequenceNet(Net):
    """A net over time, [B, input channels, T], that takes a mask and says how far it sees.

    mask [B, 1, F] (bool, or 0 and 1) says which of the F = T / factor frames are real; None: all. The others have no
    effect, and a clip's result is what it would be alone, but for rounding, which may change with the shape that a
    library of convolutions is given; windows keep that the same. Results are 0 where the mask is. encode and decode
    raise ValueError for a mask of another shape, encode for a T that is not a multiple of factor.
    """

    in_channels = 1
    spatial_dims = 1
    window_frames: int  # of the windows that a frozen tokenizer computes in

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
        """Frames around a frame whose samples its features depend on."""
        raise AssertionError(f"{type(self).__name__} lacks encode_context")

    @property
    def decode_context(self) -> Context:
        """Frames around a frame whose features its samples depend on."""
        raise AssertionError(f"{type(self).__name__} lacks decode_context")


def encode_in_windows(net: SequenceNet, x: Tensor, mask: Tensor | None, window_frames: int) -> Tensor:
    """net.encode(x, mask) by windows: [B, input channels, F * factor] -> [B, channels, F].

    mask [B, 1, F] or None. Raises ValueError if x is empty or no multiple of factor, for a mask of another shape, and
    for window_frames below 1. Memory: x, the result, and what encode needs for a window.
    """
    frames, rest = divmod(x.shape[-1], net.factor)
    if rest:
        raise ValueError(f"x has {x.shape[-1]} samples, {rest} more than a multiple of {net.factor}: pad it")
    windows = _Windows(_checked(mask, x, frames), net.encode_context, window_frames)
    return windows.run(net.encode, x, units=(net.factor, 1))


def decode_in_windows(net: SequenceNet, h: Tensor, mask: Tensor | None, window_frames: int) -> Tensor:
    """net.decode(h, mask) by windows: [B, channels, F] -> [B, input channels, F * factor]. Else as above."""
    windows = _Windows(_checked(mask, h, h.shape[-1]), net.decode_context, window_frames)
    return windows.run(net.decode, h, units=(1, net.factor))


class _Windows:
    """Where the windows of a batch lie. Positions are frames from the start of the clips."""

    def __init__(self, mask: Tensor, context: Context, window_frames: int):
        if min(mask.shape[-1], window_frames) < 1:
            raise ValueError(f"frames={mask.shape[-1]} and {window_frames=} must be 1 or more")
        self.mask, self.context, self.window_frames = mask, context, window_frames

    def run(self, function: Run, t: Tensor, *, units: tuple[int, int]) -> Tensor:
        """function over t [B, any, F * units[0]] -> [B, any, F * units[1]]."""
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
        """(row, first frame of the centre) of the windows with a real frame; never none at all."""
        centres = functional.pad(self.mask[:, 0] != 0, (0, -self.mask.shape[-1] % self.window_frames))
        real = centres.unflatten(1, (-1, self.window_frames)).any(dim=2).nonzero().tolist() or [[0, 0]]
        return [(row, number * self.window_frames) for row, number in real]

    def _window(self, t: Tensor, start: int, unit: int) -> Tensor:
        """[any, window * unit]: the window of a clip with its context, zeros outside of the clip."""
        before, after = self.context
        return _cut(t, (start - before) * unit, (start + self.window_frames + after) * unit)


def _cut(t: Tensor, first: int, last: int) -> Tensor:
    """t[..., first:last], with zeros where that lies outside of t."""
    length = t.shape[-1]
    return functional.pad(t[..., max(0, first) : last], (max(0, -first), max(0, last - length)))


def _checked(mask: Tensor | None, t: Tensor, frames: int) -> Tensor:
    """The mask, or one of all frames, so that clips with and without one take the same path and get the same bits."""
    if mask is None:
        return torch.ones(len(t), 1, frames, dtype=torch.bool, device=t.device)
    if mask.shape != (len(t), 1, frames):
        raise ValueError(f"the mask is {list(mask.shape)}, but these clips need {[len(t), 1, frames]}")
    return mask
