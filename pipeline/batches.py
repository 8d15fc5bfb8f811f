"""Samples to batches: decoding in threads, and grouping by shape under a budget. Order depends on the input alone."""

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_in_threads(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """function over items, `threads` at a time, results in the order of the items. Reads a few items ahead."""
    pending: collections.deque[Future[B]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def prefetch(items: Iterable[A], depth: int = 2) -> Iterator[A]:
    """The same items, made in a thread of their own, up to `depth` ahead. Raises what making them raised."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer, which raises it
            put("error", error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()


def bucket_by_shape(
    items: Iterable[A], array_of: Callable[[A], Any], budget: int, max_pending: int = 8
) -> Iterator[list[A]]:
    """Batches of items whose arrays have one shape, each of at most `budget` array elements (but at least one item).

    At most max_pending budgets are held back in unfinished batches; then the oldest goes out as it is.
    """
    buckets: dict[tuple[int, ...], list[A]] = {}
    held = 0
    for item in items:
        array = array_of(item)
        bucket = buckets.setdefault(array.shape, [])
        bucket.append(item)
        held += array.size
        if (len(bucket) + 1) * array.size > budget:
            held -= len(bucket) * array.size
            yield buckets.pop(array.shape)
        while held > max_pending * budget and buckets:
            oldest = buckets.pop(next(iter(buckets)))
            held -= sum(array_of(item).size for item in oldest)
            yield oldest
    yield from buckets.values()
