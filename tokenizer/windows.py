"""Clips of any length through a net in windows of one size: bounded memory, and results that no neighbour changes.

The rule. A clip's first window_frames frames are the centre of its first window, the next as many that of the second,
and so on. Around its centre a window has as many frames as the net's context: the clip's own where it has them, else
padding, which the mask clears, as it clears what is behind the clip's end. The centres side by side are the result.

It is that of the whole clip, since no centre depends on anything outside of its window, but for rounding: a library of
convolutions adds in another order when it is given another shape. Here every call has the same shape, at_once windows
of one size, filled up with empty ones. So with at_once = 1 a clip's result has the same bits alone, beside any clips
and under any padding, for the same window_frames. With more, a window's place among the others must not matter either,
which is the library's affair. Windows without a real frame are not computed: their result is 0.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tokenizer.net import Context, SequenceNet

Run = Callable[[Tensor, Tensor], Tensor]  # windows and their masks to results


def encode_in_windows(
    net: SequenceNet, x: Tensor, mask: Tensor | None, window_frames: int, *, at_once: int = 1
) -> Tensor:
    """net.encode(x, mask) by windows: [B, input channels, F * factor] -> [B, channels, F].

    mask [B, 1, F] or None. Raises ValueError if x is empty or no multiple of factor, for a mask of another shape, and
    for window_frames or at_once below 1. Memory: x, the result, and what encode needs for at_once windows.
    """
    frames, rest = divmod(x.shape[-1], net.factor)
    if rest:
        raise ValueError(f"x has {x.shape[-1]} samples, {rest} more than a multiple of {net.factor}: pad it")
    windows = _Windows(_checked(mask, x, frames), net.encode_context, window_frames, at_once)
    return windows.run(net.encode, x, units=(net.factor, 1))


def decode_in_windows(
    net: SequenceNet, h: Tensor, mask: Tensor | None, window_frames: int, *, at_once: int = 1
) -> Tensor:
    """net.decode(h, mask) by windows: [B, channels, F] -> [B, input channels, F * factor]. Else as above."""
    windows = _Windows(_checked(mask, h, h.shape[-1]), net.decode_context, window_frames, at_once)
    return windows.run(net.decode, h, units=(1, net.factor))


class _Windows:
    """Where the windows of a batch lie. Positions are frames from the start of the clips."""

    def __init__(self, mask: Tensor, context: Context, window_frames: int, at_once: int):
        if min(mask.shape[-1], window_frames, at_once) < 1:
            raise ValueError(f"frames={mask.shape[-1]}, {window_frames=} and {at_once=} must be 1 or more")
        self.mask, self.context, self.window_frames, self.at_once = mask, context, window_frames, at_once

    def run(self, function: Run, t: Tensor, *, units: tuple[int, int]) -> Tensor:
        """function over t [B, any, F * units[0]] -> [B, any, F * units[1]]."""
        unit, unit_out = units
        frames, before = self.mask.shape[-1], self.context.before
        result = None
        for spots in self._groups():
            y = function(self._stacked(t, spots, unit), self._stacked(self.mask, spots, 1))
            if result is None:
                result = y.new_zeros(len(t), y.shape[1], frames * unit_out)
            for window, (row, start) in zip(y, spots, strict=False):  # what fills up the group has no spot
                kept = min(self.window_frames, frames - start)
                centre = window[:, before * unit_out : (before + kept) * unit_out]
                result[row, :, start * unit_out : (start + kept) * unit_out] = centre
        assert result is not None
        return result

    def _groups(self) -> Iterator[list[tuple[int, int]]]:
        """(row, first frame of the centre) of the windows with a real frame, at_once at a time; never none at all."""
        centres = functional.pad(self.mask[:, 0] != 0, (0, -self.mask.shape[-1] % self.window_frames))
        real = centres.unflatten(1, (-1, self.window_frames)).any(dim=2).nonzero().tolist() or [[0, 0]]
        spots = [(row, number * self.window_frames) for row, number in real]
        for i in range(0, len(spots), self.at_once):
            yield spots[i : i + self.at_once]

    def _stacked(self, t: Tensor, spots: list[tuple[int, int]], unit: int) -> Tensor:
        """[at_once, any, window * unit]: the windows of t with their context, zeros outside of t."""
        before, after = self.context
        windows = [
            _cut(t[row], (start - before) * unit, (start + self.window_frames + after) * unit) for row, start in spots
        ]
        return functional.pad(torch.stack(windows), (0, 0, 0, 0, 0, self.at_once - len(spots)))


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
