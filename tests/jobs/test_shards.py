"""Reading a shard: what is counted, what is skipped, and who is to blame for a bad batch."""

from pathlib import Path

import numpy as np
import pytest

from jobs.config import TokensConfig
from jobs.shards import Item, Tally, decoded_batches, one_by_one_if_bad, rows_of
from pipeline.corpus.samples import Sample
from pipeline.corpus.shards import find_shards
from pipeline.errors import ShardError
from pipeline.tokens import Quarantined
from tests.corpus import tar_bytes
from tests.jobs.helpers import jpegs
from tokenizer.errors import BadSample
from tokenizer.modalities.base import Decoded
from tokenizer.tokenizer import Tokenizer

BROKEN = ("broken.jpg", jpegs(1)[0][1][:300])


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Six pictures, of which the last is broken."""
    (tmp_path / "a.tar").write_bytes(tar_bytes([*jpegs(5), BROKEN]))
    return str(tmp_path / "a.tar")


@pytest.fixture(scope="module")
def frozen(tokenizer: str) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer)


def test_the_tally_counts_every_sample_and_the_time_of_each_stage(shard: str, frozen: Tokenizer):
    tally, bad = Tally(), list[Quarantined]()
    batches = list(decoded_batches(shard, frozen, TokensConfig(), bad, tally=tally))
    assert tally.num_samples == 6 == sum(map(len, batches)) + len(bad)
    assert tally.read_s > 0
    assert tally.decode_s > 0


@pytest.mark.parametrize("only", [{1, 3}, set()])
def test_only_some_are_decoded_but_all_are_counted(shard: str, frozen: Tokenizer, only: set[int]):
    tally, bad = Tally(), list[Quarantined]()
    batches = decoded_batches(shard, frozen, TokensConfig(), bad, only=only, tally=tally)
    assert {item.sample.index for batch in batches for item in batch} == only
    assert (tally.num_samples, bad) == (6, [])  # the broken one was not looked at


def test_another_version_of_the_shard_is_refused(shard: str, frozen: Tokenizer):
    [listed] = find_shards(shard).shards
    assert list(decoded_batches(shard, frozen, TokensConfig(), [], version=listed.version))
    with pytest.raises(ShardError, match=r"a\.tar"):
        list(decoded_batches(shard, frozen, TokensConfig(), [], version="another"))


def item(index: int) -> Item:
    return Item(Sample(index, f"k{index}"), Decoded(np.full((8, 8, 3), index, np.uint8), {}))


def first_pixel(batch: list[Item]) -> list[int]:
    """As a batched encoder: one bad sample spoils the batch."""
    values = [int(item.decoded.array[0, 0, 0]) for item in batch]
    if 13 in values:
        raise BadSample("thirteen")
    return values


@pytest.mark.parametrize(("indices", "good"), [([1, 2], [1, 2]), ([1, 13, 2, 13], [1, 2]), ([13], []), ([], [])])
def test_bad_samples_are_blamed_alone(indices: list[int], good: list[int]):
    bad: list[Quarantined] = []
    pairs = one_by_one_if_bad([item(i) for i in indices], first_pixel, bad)
    assert [(item.sample.index, value) for item, value in pairs] == [(i, i) for i in good]
    assert bad == [Quarantined("k13", 13, "encode", "BadSample", "thirteen")] * (len(indices) - len(good))


def test_rows_carry_their_passthrough_and_text_that_is_none_goes_to_quarantine(frozen: Tokenizer):
    pictures = [item(0), item(1)]
    pictures[0].sample.members["txt"], pictures[1].sample.members["txt"] = b"fine", b"\xff"
    bad: list[Quarantined] = []
    [row] = rows_of(pictures, frozen, ["txt", "json"], bad)
    assert (row.key, row.passthrough) == ("k0", {"txt": b"fine"})
    assert [(sample.key, sample.stage, sample.error) for sample in bad] == [("k1", "passthrough", "UnicodeDecodeError")]
