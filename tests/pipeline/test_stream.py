"""The training stream: each rank its share, without end, resumable anywhere."""

import itertools
from pathlib import Path

import pytest

from pipeline.errors import ShardError
from pipeline.manifest import Shard
from pipeline.stream import Position, Share, training_samples
from tests.corpus import write_corpus

SIZES = (5, 3, 0, 7, 4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    return write_corpus(tmp_path_factory.mktemp("corpus"), SIZES)


def stream(shards: list[Shard], share: Share = Share(), position: Position = Position(), buffer: int = 4, bad=None):  # noqa: B008
    errors = [] if bad is None else bad
    return training_samples(shards, share, shuffle_buffer=buffer, position=position, on_bad_shard=errors.append)


def epoch_keys(shards: list[Shard], share: Share, epoch: int = 0, **settings) -> list[str]:
    samples = stream(shards, share, Position(epoch), **settings)
    return [sample.key for sample, at in itertools.takewhile(lambda pair: pair[1].epoch == epoch, samples)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_ranks_share_an_epoch_without_gap_or_overlap(shards: list[Shard], world_size: int, epoch: int):
    full = [shard for shard, count in zip(shards, SIZES, strict=True) if count]
    parts = [epoch_keys(full, Share(rank, world_size), epoch) for rank in range(world_size)]
    expected = [f"{100 * i + j:04d}" for i, count in enumerate(SIZES) for j in range(count)]
    assert sorted(itertools.chain(*parts)) == expected


def test_fewer_shards_than_ranks_are_split_by_sample(shards: list[Shard]):
    keys = [epoch_keys(shards[3:4], Share(rank, 3)) for rank in range(3)]
    assert sorted(itertools.chain(*keys)) == [f"{300 + j:04d}" for j in range(7)]
    assert [len(part) for part in keys] == [3, 2, 2]


def test_the_seed_decides_the_order(shards: list[Shard]):
    first, again, other = (epoch_keys(shards, Share(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_epochs_differ_in_order(shards: list[Shard]):
    assert epoch_keys(shards, Share(), 0) != epoch_keys(shards, Share(), 1)


def test_the_buffer_shuffles_within_shards(shards: list[Shard]):
    keys = epoch_keys(shards[3:4], Share(), buffer=4)
    assert keys != sorted(keys)


def test_the_seed_decides_the_order_within_a_shard(shards: list[Shard]):
    orders = {tuple(epoch_keys(shards[3:4], Share(seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_no_buffer_keeps_the_order_of_a_shard(shards: list[Shard]):
    keys = epoch_keys(shards[3:4], Share(), buffer=0)
    assert keys == sorted(keys)


def test_positions_count_up_and_begin_anew_each_epoch(shards: list[Shard]):
    positions = [at for _, at in itertools.islice(stream(shards), sum(SIZES) + 2)]
    assert positions[:2] == [Position(0, 0), Position(0, 1)]
    assert positions[-2:] == [Position(1, 0), Position(1, 1)]


@pytest.mark.parametrize("share", [Share(), Share(1, 2, seed=5)])
def test_resuming_anywhere_goes_on_with_the_very_next_sample(shards: list[Shard], share: Share):
    taken = [(sample.key, at) for sample, at in itertools.islice(stream(shards, share), 2 * sum(SIZES))]
    for i in range(0, len(taken) - 3, 2):
        resumed = itertools.islice(stream(shards, share, position=taken[i][1]), 3)
        assert [(sample.key, at) for sample, at in resumed] == taken[i : i + 3]


def test_members_come_with_the_samples(shards: list[Shard]):
    sample, _ = next(stream(shards))
    assert set(sample.members) == {"png", "txt"}


def broken(shard: Shard, folder: Path) -> Shard:
    """A copy of the shard, cut off in the second of its samples."""
    path = folder / Path(shard.url).name
    path.write_bytes(Path(shard.url).read_bytes()[:3500])
    return Shard(str(path), 3500)


def test_a_bad_shard_is_told_and_the_others_go_on(shards: list[Shard], tmp_path: Path):
    bad: list[ShardError] = []
    mixed = [broken(shards[0], tmp_path), *shards[1:]]
    keys = epoch_keys(mixed, Share(), bad=bad)
    assert set(keys) >= {f"{100 * i + j:04d}" for i, count in enumerate(SIZES) for j in range(count) if i}
    assert {mixed[0].url in str(error) for error in bad} == {True}


def test_a_shard_that_breaks_off_gives_what_lies_before(shards: list[Shard], tmp_path: Path):
    keys = epoch_keys([broken(shards[0], tmp_path), shards[1]], Share())
    assert sorted(keys)[0] == "0000"
    assert len(keys) < SIZES[0] + SIZES[1]


def test_nothing_but_bad_shards_is_an_error(tmp_path: Path):
    bad: list[ShardError] = []
    with pytest.raises(ShardError, match="rank 0 finds no sample in 2 shards"):
        next(stream([Shard(str(tmp_path / "gone-0.tar"), None), Shard(str(tmp_path / "gone-1.tar"), None)], bad=bad))
    assert len(bad) == 2


@pytest.mark.parametrize("without", ["missing", "empty"])
def test_a_shard_without_samples_does_not_end_a_training_with_a_shard_per_rank(shards: list[Shard], without: str):
    mixed = [shards[0], Shard("/gone.tar", None) if without == "missing" else shards[SIZES.index(0)]]
    for rank in range(2):
        assert len(list(itertools.islice(stream(mixed, Share(rank, 2)), 30))) == 30
