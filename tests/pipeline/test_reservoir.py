"""A uniform sample that does not depend on the order of the rows or on their split among workers."""

import itertools

import numpy as np

from pipeline.reservoir import Reservoir

SOURCES = {f"shard-{i}": np.arange(100 * i, 100 * i + 20 + 15 * i, dtype=np.float32)[:, None] for i in range(6)}


def reservoir(sources: list[str], capacity: int = 40, seed: int = 0) -> Reservoir:
    found = Reservoir(capacity, seed)
    for source in sources:
        found.add(SOURCES[source], source)
    return found


def merged(parts: list[list[str]], **settings) -> np.ndarray:
    whole = reservoir([], **settings)
    for part in parts:
        whole.merge(reservoir(part, **settings))
    assert whole.rows is not None
    return whole.rows


def test_the_order_of_sources_does_not_matter():
    expected = merged([list(SOURCES)])
    for order in itertools.islice(itertools.permutations(SOURCES), 0, 720, 97):
        assert np.array_equal(merged([[source] for source in order]), expected)


def test_the_split_among_workers_does_not_matter():
    names = list(SOURCES)
    expected = merged([names])
    for cut in range(1, 6):
        assert np.array_equal(merged([names[cut:], [], names[:cut]]), expected)


def test_fewer_rows_than_capacity_are_all_kept():
    assert sorted(merged([["shard-0"], ["shard-1"]], capacity=1000).ravel()) == [*range(20), *range(100, 135)]


def test_the_sample_has_capacity_rows_of_the_input():
    rows = merged([list(SOURCES)], capacity=17)
    assert rows.shape == (17, 1)
    assert len(set(rows.ravel())) == 17
    assert set(rows.ravel()) <= set(np.concatenate(list(SOURCES.values())).ravel())


def test_another_seed_gives_another_sample():
    assert not np.array_equal(merged([list(SOURCES)], seed=0), merged([list(SOURCES)], seed=1))


def test_an_empty_reservoir_has_no_rows():
    assert reservoir([]).rows is None


def test_every_row_is_equally_likely():
    """chi^2 over 345 rows, each drawn 40/345 of the time: mean 344 * (1 - 40/345) = 304, std about 25."""
    total = sum(len(rows) for rows in SOURCES.values())
    drawn = np.concatenate([merged([list(SOURCES)], seed=seed).ravel() for seed in range(600)])
    counts = np.unique(drawn, return_counts=True)[1]
    expected = 600 * 40 / total
    assert len(counts) == total
    assert 200 < ((counts - expected) ** 2 / expected).sum() < 410
