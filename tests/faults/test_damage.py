"""A short form of `python -m tests.faults.damage`, with other trials than those in results/faults/damage.json."""

from pathlib import Path

from tests.faults.damage import attack


def test_random_damage_is_found_and_repaired_or_changes_nothing(tmp_path: Path):
    figures = attack(25, tmp_path, seed=1)
    assert figures["broken promises"] == []
    assert sum(figures["outcomes"].values()) == 25
    assert figures["outcomes"]["found, and repaired by 1"] > 10
