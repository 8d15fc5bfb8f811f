"""Turns samples into batches: decodes in threads and groups by shape. The order depends only on the input."""

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_in_threads(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Applies the function to the items in `threads` threads; yields results in order. Reads a few items ahead."""
    pending: collections.deque[Future[B]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def prefetch(items: Iterable[A], depth: int = 2) -> Iterator[A]:
    """Yields the same items, but produces up to `depth` of them ahead in a thread. Passes errors on."""
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
        except BaseException as error:  # raised in the consumer
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


def in_buckets(
    items: Iterable[A], array_of: Callable[[A], Any], bucket_of: Callable[[Any], Any], budget: int, max_pending: int = 8
) -> Iterator[list[A]]:
    """Yields batches of items from one bucket each.

    A batch has at most `budget` array elements, counted as if all items were padded to the largest, or a single item.
    When unfinished batches hold more than max_pending budgets, the oldest is yielded early.
    """
    buckets: dict[Any, _Bucket[A]] = {}
    held = 0
    for item in items:
        size, key = array_of(item).size, bucket_of(array_of(item))
        if key in buckets and not buckets[key].has_room(size, budget):
            held -= buckets[key].elements
            yield buckets.pop(key).items
        bucket = buckets.setdefault(key, _Bucket())
        bucket.add(item, size)
        held += size
        if not bucket.has_room(1, budget):
            held -= bucket.elements
            yield buckets.pop(key).items
        while held > max_pending * budget and buckets:
            oldest = buckets.pop(next(iter(buckets)))
            held -= oldest.elements
            yield oldest.items
    for bucket in buckets.values():
        yield bucket.items


class _Bucket(Generic[A]):
    """The items of an unfinished batch, their number of elements, and the size of the largest."""

    def __init__(self) -> None:
        self.items: list[A] = []
        self.elements = self.largest = 0

    def add(self, item: A, size: int) -> None:
        self.items.append(item)
        self.elements, self.largest = self.elements + size, max(self.largest, size)

    def has_room(self, size: int, budget: int) -> bool:
        return (len(self.items) + 1) * max(self.largest, size) <= budget
