"""Which windows of an epoch each stream reads, also after another number of streams resumes. Pure functions.

A stream is one DataLoader worker of one rank. What a stream has left is a list of spans: windows start..stop, of which
the first has already given `done` blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.tokens.processes import split


class Span(NamedTuple):
    start: int
    stop: int
    done: int = 0


Spans = list[Span]


def share(spans: Sequence[Span], stream: int, streams: int) -> Spans:
    """The part of a stream. The parts of all streams are all windows, each once; they differ by at most one window."""
    total = sum(span.stop - span.start for span in spans)
    low, high = split(0, total, stream, streams)
    found, begin = [], 0
    for span in spans:
        first, last = max(low - begin, 0), min(high - begin, span.stop - span.start)
        if first < last:
            found.append(Span(span.start + first, span.start + last, span.done if first == 0 else 0))
        begin += span.stop - span.start
    return found


def advanced(spans: Sequence[Span], windows: int, done: int) -> Spans:
    """What is left after so many whole windows, and `done` blocks of the next."""
    left = []
    for span in spans:
        skipped = min(windows, span.stop - span.start)
        windows -= skipped
        if skipped < span.stop - span.start:
            left.append(Span(span.start + skipped, span.stop, span.done if skipped == 0 else 0))
    if left and done:
        left[0] = left[0]._replace(done=done)
    return left


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
