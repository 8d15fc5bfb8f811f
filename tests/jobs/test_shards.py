"""Reading a shard: counts, skipped samples, and samples that spoil a batch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.config import TokensConfig
from jobs.shards import DecodedSample, ShardReader, apply_or_quarantine, encode_batch
from pipeline.corpus.samples import Sample
from pipeline.corpus.shards import Shard, find_shards
from pipeline.errors import ShardError
from pipeline.tokens import Quarantined
from tests.corpus import tar_bytes
from tests.jobs.helpers import jpegs
from tokenizer.errors import BadSample
from tokenizer.modalities.base import Decoded
from tokenizer.tokenizer import Tokenizer

BROKEN = ("broken.jpg", jpegs(1)[0][1][:300])


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Six images; the last one is broken."""
    (tmp_path / "a.tar").write_bytes(tar_bytes([*jpegs(5), BROKEN]))
    [listed] = find_shards(str(tmp_path / "a.tar")).shards
    return listed


@pytest.fixture(scope="module")
def frozen(tokenizer: str) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer)


def test_the_reader_counts_every_sample_and_the_time_of_each_stage(shard: Shard, frozen: Tokenizer):
    reader = ShardReader(shard, frozen.modality, TokensConfig())
    batches = list(reader.batches())
    assert reader.num_samples == 6 == sum(map(len, batches)) + len(reader.quarantined)
    assert reader.read_s > 0
    assert reader.decode_s > 0


@pytest.mark.parametrize("only", [{1, 3}, set()])
def test_unwanted_samples_are_counted_but_not_decoded(shard: Shard, frozen: Tokenizer, only: set[int]):
    reader = ShardReader(shard, frozen.modality, TokensConfig(), only=only)
    assert {one.sample.index for batch in reader.batches() for one in batch} == only
    assert (reader.num_samples, reader.quarantined) == (6, [])  # the broken one was not decoded


def test_a_shard_that_changed_since_it_was_listed_is_refused(shard: Shard, frozen: Tokenizer):
    changed = dataclasses.replace(shard, version="another")
    with pytest.raises(ShardError, match=r"a\.tar"):
        list(ShardReader(changed, frozen.modality, TokensConfig()).batches())


def decoded(index: int) -> DecodedSample:
    return DecodedSample(Sample(index, f"k{index}"), Decoded(np.full((8, 8, 3), index, np.uint8), {}))


def first_pixels(batch: list[DecodedSample]) -> list[int]:
    """Like a batched encoder: one bad sample spoils the batch."""
    values = [int(one.decoded.array[0, 0, 0]) for one in batch]
    if 13 in values:
        raise BadSample("thirteen")
    return values


@pytest.mark.parametrize(("indices", "good"), [([1, 2], [1, 2]), ([1, 13, 2, 13], [1, 2]), ([13], []), ([], [])])
def test_only_the_bad_samples_of_a_batch_are_quarantined(indices: list[int], good: list[int]):
    quarantined: list[Quarantined] = []
    pairs = apply_or_quarantine(first_pixels, [decoded(i) for i in indices], quarantined)
    assert [(one.sample.index, value) for one, value in pairs] == [(i, i) for i in good]
    assert quarantined == [Quarantined("k13", 13, "encode", "BadSample", "thirteen")] * (len(indices) - len(good))


def test_rows_carry_their_passthrough_and_invalid_text_is_quarantined(frozen: Tokenizer):
    images = [decoded(0), decoded(1)]
    images[0].sample.members["txt"], images[1].sample.members["txt"] = b"fine", b"\xff"
    quarantined: list[Quarantined] = []
    [row] = encode_batch(images, frozen, ["txt", "json"], quarantined)
    assert (row.key, row.passthrough) == ("k0", {"txt": b"fine"})
    assert [(one.key, one.stage, one.error) for one in quarantined] == [("k1", "passthrough", "UnicodeDecodeError")]
