"""How many CPUs each rank gets."""

import pytest

from jobs.actors.cluster import even_share


@pytest.mark.parametrize(
    ("nodes", "ranks", "expected"),
    [([8], 2, 4), ([8, 8], 3, 4), ([1, 1], 1, 1), ([0, 4], 1, 4), ([2], 4, 1), ([16, 8], 3, 8)],
)
def test_every_rank_fits_on_a_node(nodes: list[int], ranks: int, expected: int):
    assert even_share(nodes, ranks) == expected
