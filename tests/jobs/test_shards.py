"""Reading a shard: counts, skipped samples, and samples that spoil a batch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.artifacts import check_member, token_layout
from jobs.audit import AuditWorker
from jobs.config import ConfigError, TokensConfig
from jobs.shards import DecodedSample, ShardReader, apply_or_quarantine, decode_sample, encode_batch
from pipeline.corpus.samples import Sample
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.errors import OutputMismatch, ShardError
from pipeline.tokens import Output, Quarantined
from tests.corpus import tar_bytes
from tests.jobs.helpers import here, jpegs, rows_of, tokenize_without_ray
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


def test_rows_carry_their_passthrough_and_a_caption_that_is_not_utf_8_costs_no_sample(frozen: Tokenizer):
    images = [decoded(0), decoded(1)]
    images[0].sample.members["txt"], images[1].sample.members["txt"] = b"fine", b"\xff"
    quarantined: list[Quarantined] = []
    rows = encode_batch(images, frozen, ["txt", "json"], quarantined)
    assert [row.passthrough for row in rows] == [{"txt": b"fine"}, {"txt": b"\xff"}]
    assert quarantined == []


# -- samples with several pictures --------------------------------------------------------------------------------


PAIR = {"left.jpg": jpegs(1)[0][1], "right.jpg": jpegs(2)[1][1], "txt": b"caption"}


@pytest.mark.parametrize("member", ["left.jpg", "right.jpg"])
def test_the_member_that_is_named_is_decoded(frozen: Tokenizer, member: str):
    outcome = decode_sample(Sample(0, "a", PAIR), frozen.modality, member)
    assert isinstance(outcome, DecodedSample)
    assert np.array_equal(outcome.decoded.array, frozen.modality.read(PAIR[member], "jpg").array)


@pytest.mark.parametrize(
    ("members", "member", "message"),
    [
        (PAIR, "", "has several image members: left.jpg, right.jpg; set data.member to one of them"),
        (PAIR, "jpg", "has no member jpg (data.member); it has left.jpg, right.jpg, txt"),
        ({"jpg": PAIR["left.jpg"]}, "left.jpg", "has no member left.jpg (data.member); it has jpg"),
        ({}, "jpg", "has no member jpg (data.member); it has nothing"),
    ],
)
def test_a_sample_without_the_member_is_quarantined(
    frozen: Tokenizer, members: dict[str, bytes], member: str, message: str
):
    outcome = decode_sample(Sample(0, "a", members), frozen.modality, member)
    assert outcome == Quarantined("a", 0, "decode", "BadSample", message)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Three samples of two pictures each, as macOS packs them."""
    members = [member for key in "abc" for name, data in PAIR.items() for member in _with_fork(f"{key}.{name}", data)]
    (tmp_path / "pairs.tar").write_bytes(tar_bytes(members))
    return str(tmp_path / "pairs.tar")


def _with_fork(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(f"._{name}", b"fork"), (name, data)]


def test_an_output_holds_the_tokens_of_its_member_and_no_other_may_be_added(
    pairs: str, tokenizer: str, frozen: Tokenizer, tmp_path: Path
):
    output = tokenize_without_ray(pairs, tokenizer, tmp_path / "out", TokensConfig(), member="right.jpg")
    expected = frozen.encode_batch([frozen.modality.read(PAIR["right.jpg"], "jpg").array])[0]
    tokens = rows_of(output.url)["tokens"].to_pylist()
    assert tokens == [expected.ravel().tolist()] * 3
    assert Output.open(output.url).layout.member == "right.jpg"
    with pytest.raises(OutputMismatch, match=r"member is right\.jpg there and left\.jpg here"):
        tokenize_without_ray(pairs, tokenizer, tmp_path / "out", TokensConfig(), member="left.jpg")
    with pytest.raises(OutputMismatch, match=r"member is right\.jpg there and not set here"):
        tokenize_without_ray(pairs, tokenizer, tmp_path / "out")


def test_retry_and_audit_read_the_member_of_the_output(pairs: str, tokenizer: str, tmp_path: Path):
    output = tokenize_without_ray(pairs, tokenizer, tmp_path / "out", TokensConfig(), member="right.jpg")
    [shard] = find_shards(pairs).shards
    settings = {"output_url": output.url, "member": output.layout.member}
    compared = here(AuditWorker, tokenizer, drawn={shard.name: [0, 2]}, **settings).process(shard)
    assert (compared.failure, compared.num_rows, compared.differing) == (None, 2, [])


def test_a_commit_counts_members_that_were_passed_over_and_rows_without_a_caption(
    pairs: str, tokenizer: str, tmp_path: Path
):
    options = TokensConfig(passthrough=["txt", "cls"])
    [entry] = tokenize_without_ray(pairs, tokenizer, tmp_path / "out", options, member="left.jpg").commits()
    assert (entry.num_rows, entry.num_quarantined) == (3, 0)
    assert entry.notes == {
        "members passed over: macOS metadata (._*, .DS_Store, __MACOSX)": 9,
        "rows without cls (tokens.passthrough), which is null there": 3,
    }


def test_an_output_without_a_member_has_no_such_key(tokenizer: str, shard: Shard, tmp_path: Path):
    output = Output.create(
        str(tmp_path / "out"),
        token_layout(Tokenizer.from_pretrained(tokenizer), TokensConfig()),
        ShardList([shard]),
        config={},
    )
    assert "member" not in output.about()["layout"]


@pytest.mark.parametrize("member", ["txt", "left.wav", "jpg.txt"])
def test_a_member_that_is_no_picture_is_a_mistake(frozen: Tokenizer, member: str):
    check_member("left.jpg", frozen.modality)
    with pytest.raises(ConfigError, match=f"data.member is '{member}'; it must end in one of: .*jpg"):
        check_member(member, frozen.modality)
