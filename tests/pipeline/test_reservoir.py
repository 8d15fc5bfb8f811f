"""A uniform sample that does not depend on who saw which rows, nor on when."""

import itertools

import numpy as np

from pipeline.reservoir import Reservoir

PLACES = {f"shard-{i}": np.arange(100 * i, 100 * i + 20 + 15 * i, dtype=np.float32)[:, None] for i in range(6)}


def reservoir(places: list[str], capacity: int = 40, seed: int = 0) -> Reservoir:
    found = Reservoir(capacity, seed)
    for place in places:
        found.add(PLACES[place], place)
    return found


def merged(parts: list[list[str]], **settings) -> np.ndarray:
    whole = reservoir([], **settings)
    for part in parts:
        whole.merge(reservoir(part, **settings))
    assert whole.rows is not None
    return whole.rows


def test_order_of_places_leaves_no_trace():
    expected = merged([list(PLACES)])
    for order in itertools.islice(itertools.permutations(PLACES), 0, 720, 97):
        assert np.array_equal(merged([[place] for place in order]), expected)


def test_partition_into_workers_leaves_no_trace():
    names = list(PLACES)
    expected = merged([names])
    for cut in range(1, 6):
        assert np.array_equal(merged([names[cut:], [], names[:cut]]), expected)


def test_fewer_rows_than_capacity_are_all_kept():
    assert sorted(merged([["shard-0"], ["shard-1"]], capacity=1000).ravel()) == [*range(20), *range(100, 135)]


def test_capacity_is_kept_and_rows_are_of_the_input():
    rows = merged([list(PLACES)], capacity=17)
    assert rows.shape == (17, 1)
    assert len(set(rows.ravel())) == 17
    assert set(rows.ravel()) <= set(np.concatenate(list(PLACES.values())).ravel())


def test_the_seed_decides():
    assert not np.array_equal(merged([list(PLACES)], seed=0), merged([list(PLACES)], seed=1))


def test_nothing_seen_is_none():
    assert reservoir([]).rows is None


def test_every_row_is_as_likely_as_any_other():
    """chi^2 over 345 rows, each drawn 40/345 of the time: mean 344 * (1 - 40/345) = 304, std about 25."""
    total = sum(len(rows) for rows in PLACES.values())
    drawn = np.concatenate([merged([list(PLACES)], seed=seed).ravel() for seed in range(600)])
    counts = np.unique(drawn, return_counts=True)[1]
    expected = 600 * 40 / total
    assert len(counts) == total
    assert 200 < ((counts - expected) ** 2 / expected).sum() < 410
