"""Batches depend only on their input. Threads pass on errors, and stop when the consumer stops."""

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.corpus.batches import in_buckets, map_in_threads, prefetch


def arrays(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.full((rng.integers(1, 5), rng.integers(1, 5)), i) for i in range(count)]


def buckets(items: list[np.ndarray], budget: int, max_pending: int = 8) -> list[list[np.ndarray]]:
    return list(in_buckets(items, lambda array: array, np.shape, budget, max_pending))


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
@pytest.mark.parametrize("max_pending", [1, 8])
def test_every_item_is_in_one_batch(budget: int, max_pending: int):
    found = [int(a.flat[0]) for batch in buckets(arrays(200), budget, max_pending) for a in batch]
    assert sorted(found) == list(range(200))


def test_a_batch_has_one_shape_and_stays_within_the_budget():
    batches = buckets(arrays(200), budget=30)
    assert all(len({a.shape for a in batch}) == 1 for batch in batches)
    assert all(sum(a.size for a in batch) <= 30 for batch in batches)


def test_a_batch_is_as_large_as_the_budget_allows():
    assert [len(batch) for batch in buckets([np.zeros((2, 2))] * 10, budget=12)] == [3, 3, 3, 1]


def test_an_item_above_the_budget_is_a_batch_of_its_own():
    assert [len(batch) for batch in buckets([np.zeros(50)] * 3, budget=10)] == [1, 1, 1]


def test_items_of_one_shape_keep_their_order():
    for batch in buckets(arrays(200), budget=20):
        indices = [int(a.flat[0]) for a in batch]
        assert indices == sorted(indices)


def test_batches_are_the_same_every_time():
    first, second = ([[int(a.flat[0]) for a in b] for b in buckets(arrays(300), 25, 2)] for _ in range(2))
    assert first == second


def test_few_items_are_held_back():
    taken = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal taken
        for i in range(1, 100):
            taken += 1
            yield np.zeros(i)  # all shapes differ, so no batch ever fills

    given = 0
    for batch in in_buckets(counted(), lambda array: array, np.shape, budget=100, max_pending=2):
        given += len(batch)
        assert taken - given <= 20
    assert given == 99


def test_the_oldest_unfinished_batch_is_yielded_first():
    items = [np.zeros(i) for i in (2, 3, 4, 5)]
    assert [len(batch[0]) for batch in buckets(items, budget=10, max_pending=1)] == [2, 3, 4, 5]


def test_no_items_give_no_batches():
    assert buckets([], budget=10) == []


# -- threads ------------------------------------------------------------------------------------------------------


def test_threads_keep_the_order():
    def slow_for_even(i: int) -> int:
        time.sleep(0.002 * (i % 2 == 0))
        return i * i

    assert list(map_in_threads(slow_for_even, range(50), threads=4)) == [i * i for i in range(50)]


def test_threads_pass_on_an_error():
    results = map_in_threads(lambda i: 1 // (3 - i), range(10), threads=2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_threads_read_only_a_little_ahead():
    taken = itertools.count()
    results = map_in_threads(lambda i: i, (next(taken) for _ in range(1000)), threads=2)
    next(results)
    assert next(taken) < 20


def running(name: str) -> int:
    return sum(name in thread.name for thread in threading.enumerate())


def until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_prefetch_yields_the_same_items():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))


def test_prefetch_yields_the_items_before_an_error_and_then_raises_it():
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_prefetch_produces_a_bounded_number_of_items_ahead():
    made: list[int] = []
    items = prefetch((made.append(i) or i for i in range(100)), depth=2)
    assert next(items) == 0
    assert until(lambda: len(made) == 4)  # one yielded, two ready, one waiting
    time.sleep(0.05)
    assert len(made) == 4


def test_prefetch_stops_its_thread_when_the_consumer_stops():
    before = threading.active_count()
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = prefetch(endless())
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert until(lambda: threading.active_count() == before)
    del items
    assert closed.wait(5)


def test_the_budget_counts_arrays_as_padded_to_the_largest_in_the_batch():
    """3 + 3 fit into 10. A third item of 5 would count as 3 * 5, so it starts the next batch: 5 + 5."""
    sizes = [3, 3, 5, 5, 1]
    batches = in_buckets([np.zeros(n) for n in sizes], lambda array: array, lambda array: "one", budget=10)
    assert [[len(array) for array in batch] for batch in batches] == [[3, 3], [5, 5], [1]]
