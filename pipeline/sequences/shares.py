"""Which blocks of an epoch each stream reads, also after another number of streams resumes. Pure functions.

A stream is one DataLoader worker of one rank. An epoch consists of windows of rows. Only a reader of a window knows how
many blocks it has, so a share of it is every step-th block, and any share can be divided again in the same way.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.tokens.processes import split

LEAST = 4  # windows of a stream; if there are fewer, streams divide them, so that their shares differ little


class Span(NamedTuple):
    """The blocks first, first + step, first + 2 * step, ... of each of the windows start..stop."""

    start: int
    stop: int
    first: int = 0
    step: int = 1


Spans = list[Span]


def share(spans: Sequence[Span], stream: int, streams: int) -> Spans:
    """The part of a stream. The parts of all streams together are all blocks, each once.

    Each stream reads whole windows, and their numbers differ by at most one. If there are few windows, all streams read
    the same number of equal pieces of windows.
    """
    windows = _num_windows(spans)
    if streams > 1 and 0 < windows < LEAST * streams:
        spans = list(_divided(spans, streams // math.gcd(windows, streams)))
    low, high = split(0, _num_windows(spans), stream, streams)
    return _cut(spans, low, high)


def advanced(spans: Sequence[Span], windows: int, blocks: int) -> Spans:
    """What is left after so many whole windows, and so many blocks of the next one."""
    left = _cut(spans, windows, _num_windows(spans))
    if left and blocks:
        begun, rest = left[0], left[0]._replace(start=left[0].start + 1)
        begun = begun._replace(stop=begun.start + 1, first=begun.first + blocks * begun.step)
        left[:1] = [begun, rest] if rest.start < rest.stop else [begun]
    return left


def _num_windows(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def _divided(spans: Sequence[Span], pieces: int) -> Iterator[Span]:
    """The same blocks, with each window in so many pieces."""
    for start, stop, first, step in spans:
        for window in range(start, stop):
            for piece in range(pieces):
                yield Span(window, window + 1, first + piece * step, step * pieces)


def _cut(spans: Sequence[Span], low: int, high: int) -> Spans:
    """Windows low..high of the spans, counted over all of them."""
    found, begin = [], 0
    for span in spans:
        start, stop = max(span.start, span.start + low - begin), min(span.stop, span.start + high - begin)
        if start < stop:
            found.append(span._replace(start=start, stop=stop))
        begin += span.stop - span.start
    return found


def left_by_epoch(states: Sequence[dict[str, Any]], num_windows: int) -> dict[int, Spans]:
    """What all streams together have left, for each epoch in which some have read or begun to read.

    states: of each stream its `epoch`, what is `left` of it, what it planned for `later` epochs if that is not its even
    share, and its number `stream` of `streams`. Streams may be in different epochs.
    """
    last = max(max([state["epoch"], *map(int, state["later"])]) for state in states)
    return {
        epoch: [span for state in states for span in _left(state, epoch, num_windows)]
        for epoch in range(min(state["epoch"] for state in states), last + 1)
    }


def _left(state: dict[str, Any], epoch: int, num_windows: int) -> Spans:
    if epoch < state["epoch"]:
        return []
    if epoch == state["epoch"]:
        return [Span(*span) for span in state["left"]]
    if str(epoch) in state["later"]:
        return [Span(*span) for span in state["later"][str(epoch)]]
    return share([Span(0, num_windows)], state["stream"], state["streams"])
