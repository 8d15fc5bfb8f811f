"""A short form of `python -m tests.faults.fuzz`, with other variants than those in results/faults/fuzz.json."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fuzz import Worker, attack, variant_of
from tests.faults.roads import TABLES, Roads, Variant, Wrong
from tests.faults.seeds import pictures, seeds

ANY_BYTES = ("g722",)  # without a header: nothing can be refused


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(seed=1)
    yield worker
    worker.stop()


def test_hostile_files_of_every_kind_are_read_or_refused_in_words(worker: Worker):
    found = attack(worker, {kind: 6 if kind in TABLES else 30 for kind in seeds()})
    assert [verdict for verdicts in found.values() for verdict in verdicts if verdict.finding] == []
    assert [kind for kind, verdicts in found.items() if not any(one.refusal for one in verdicts)] == [*ANY_BYTES]


def test_a_variant_has_the_same_bytes_each_time():
    assert variant_of("jpeg", 7, 0, seeds())[1:] == variant_of("jpeg", 7, 0, seeds())[1:]
    assert variant_of("jpeg", 7, 0, seeds())[1] != variant_of("jpeg", 7, 1, seeds())[1]


def test_every_seed_can_be_read(tmp_path: Path):
    roads = Roads(tmp_path)
    refused = [
        kind for kind, of_kind in seeds().items() for seed in of_kind if roads.refusal(Variant(kind, seed, seed.file))
    ]
    assert refused in ([], ["tar.xz"])  # one of them claims to need 4 GiB, which this machine may not have


def test_content_that_differs_although_the_format_shows_it_is_a_finding(tmp_path: Path):
    first, second, *_ = pictures()["png"]
    with pytest.raises(Wrong, match="the content differs"):
        Roads(tmp_path).refusal(Variant("png", first, second.file, is_detectable=True))


def test_a_crash_is_a_finding_and_the_next_variant_is_read(worker: Worker):
    assert worker.judge("bmp", 0).finding == ""
    os.kill(worker.pid, signal.SIGSEGV)
    assert worker.judge("bmp", 0).finding == "the process ended with -11"
    assert worker.judge("bmp", 0).finding == ""
