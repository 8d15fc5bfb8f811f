"""Tests of the harness: it counts damage that we cause by hand, and injects faults as planned."""

import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.corpus import tar_bytes
from tests.faults.corpus import Damage, Expected, rows_of
from tests.faults.proxy import RESET_BEFORE, SLOW_DOWN, TRUNCATE, Request, seeded
from tests.jobs.helpers import jpegs, save_tiny_tokenizer, tokenize_without_ray

GET, PUT = (Request(method, "/", b"", b"") for method in ("GET", "PUT"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output of two shards with three samples each."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(jpegs(3)))
    tokenize_without_ray(f"{tmp_path}/*.tar", save_tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    return tmp_path / "out"


def damage_after(output: Path, change) -> Damage:
    """The damage after `change` has modified the entry and the token file of the first shard."""
    expected = Expected(dict(rows_of(str(output))))
    assert expected.damage(str(output)) == Damage(0, 0, 0)
    [entry, _] = sorted((output / "manifest").iterdir())
    change(entry, output / "tokens" / f"{entry.stem}.parquet")
    return expected.damage(str(output))


def test_rows_without_an_entry_are_lost(output: Path):
    assert damage_after(output, lambda entry, tokens: entry.unlink()) == Damage(lost=3, doubled=0, wrong=0)


def test_rows_of_two_entries_are_doubled(output: Path):
    def copy(entry: Path, tokens: Path) -> None:
        for file in (entry, tokens):
            shutil.copy(file, file.with_stem(f"{file.stem}+1"))

    assert damage_after(output, copy) == Damage(lost=0, doubled=3, wrong=0)


def test_rows_with_other_tokens_are_wrong(output: Path):
    def change(entry: Path, tokens: Path) -> None:
        table = pq.read_table(tokens)
        order = [0, 1, 1]  # the third sample gets the tokens of the second
        pq.write_table(
            table.set_column(table.schema.get_field_index("tokens"), "tokens", table["tokens"].take(order)), tokens
        )

    assert damage_after(output, change) == Damage(lost=0, doubled=0, wrong=1)


def test_faults_follow_the_seed_the_rates_and_the_limit():
    rates = {SLOW_DOWN: 0.2, RESET_BEFORE: 0.1}
    first, again = ([plan(GET) for _ in range(1000)] for plan in (seeded(7, rates), seeded(7, rates)))
    assert first == again
    counts = Counter(first)
    assert 150 < counts[SLOW_DOWN] < 250
    assert 60 < counts[RESET_BEFORE] < 140
    limited = seeded(7, rates, limit=5)
    assert sum(bool(limited(GET)) for _ in range(1000)) == 5


def test_only_responses_with_a_body_are_truncated():
    plan = seeded(0, {TRUNCATE: 1.0})
    assert (plan(PUT), plan(GET)) == ("", TRUNCATE)
