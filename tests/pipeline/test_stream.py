"""The training stream: each rank reads its share, endlessly, and can resume at any sample."""

import collections
import itertools
from pathlib import Path

import pytest

from pipeline.corpus.shards import Shard, find_shards
from pipeline.corpus.streams import Lanes, LaneSample, Position, training_samples
from pipeline.errors import ShardError
from tests.corpus import write_corpus, write_tar

SIZES = (5, 3, 0, 7, 4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    return write_corpus(tmp_path_factory.mktemp("corpus"), SIZES)


def stream(shards: list[Shard], lanes: Lanes = Lanes(1, 4), rank=0, world_size=1, positions=None, bad=None):  # noqa: B008
    on_bad_shard = [].append if bad is None else bad.append
    place = {"rank": rank, "world_size": world_size, "positions": positions or {}}
    return training_samples(shards, lanes, **place, on_bad_shard=on_bad_shard)


def epoch_keys(shards: list[Shard], lanes: Lanes = Lanes(1, 4), lane: int = 0, epoch: int = 0, **settings) -> list[str]:  # noqa: B008
    """The keys of one lane in one epoch."""
    drawn = stream(shards, lanes, lane, lanes.count, {lane: Position(epoch)}, **settings)
    return [one.sample.key for one in itertools.takewhile(lambda one: one.before.epoch == epoch, drawn)]


EVERY_KEY = [f"{100 * i + j:04d}" for i, count in enumerate(SIZES) for j in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_lanes_of_an_epoch_have_every_sample_once(shards: list[Shard], count: int, epoch: int):
    full = [shard for shard, size in zip(shards, SIZES, strict=True) if size]
    parts = [epoch_keys(full, Lanes(count, 4), lane, epoch) for lane in range(count)]
    assert sorted(itertools.chain(*parts)) == EVERY_KEY


def test_fewer_shards_than_lanes_are_split_by_sample(shards: list[Shard]):
    keys = [epoch_keys(shards[3:4], Lanes(3, 4), lane) for lane in range(3)]
    assert sorted(itertools.chain(*keys)) == [f"{300 + j:04d}" for j in range(7)]
    assert [len(part) for part in keys] == [3, 2, 2]


@pytest.mark.parametrize(("num_shards", "ranks"), [(4, 1), (4, 2), (2, 4)])  # shards by lane, and samples by lane
def test_all_ranks_together_count_what_is_passed_over_once(tmp_path: Path, num_shards: int, ranks: int):
    for i in range(num_shards):
        members = [(f"{i}{j}.{name}", b"x") for j in range(6) for name in ("jpg", "txt")]
        write_tar(tmp_path / f"{i}.tar", [("._fork.jpg", b"fork"), *members, (".DS_Store", b"Bud1")])
    shards, counted = find_shards(str(tmp_path / "*.tar")).shards, collections.Counter[str]()
    for rank in range(ranks):
        lanes = Lanes.for_ranks(ranks, num_shards, shuffle_buffer=4, seed=0)
        place = {"rank": rank, "world_size": ranks, "positions": {}}
        drawn = training_samples(shards, lanes, **place, on_bad_shard=pytest.fail, passed_over=counted)
        for _ in range(100):  # several epochs
            assert "jpg" in next(drawn).sample.members
    assert counted.total() == 2 * num_shards


def test_the_seed_determines_the_order(shards: list[Shard]):
    first, again, other = (epoch_keys(shards, Lanes(1, 4, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_epochs_differ_in_order(shards: list[Shard]):
    assert epoch_keys(shards, epoch=0) != epoch_keys(shards, epoch=1)


def test_the_shuffle_buffer_shuffles_within_a_shard(shards: list[Shard]):
    keys = epoch_keys(shards[3:4])
    assert keys != sorted(keys)


def test_the_seed_determines_the_order_within_a_shard(shards: list[Shard]):
    orders = {tuple(epoch_keys(shards[3:4], Lanes(1, 4, seed), epoch=e)) for seed in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_without_a_shuffle_buffer_a_shard_keeps_its_order(shards: list[Shard]):
    keys = epoch_keys(shards[3:4], Lanes(1, 0))
    assert keys == sorted(keys)


def test_positions_count_up_and_restart_each_epoch(shards: list[Shard]):
    count = sum(SIZES)
    drawn = list(itertools.islice(stream(shards), count + 2))
    assert [one.before for one in drawn[:2]] == [Position(0, 0, 0), Position(0, 1, 1)]
    assert [one.before for one in drawn[-2:]] == [Position(1, 0, count), Position(1, 1, count + 1)]


def test_a_rank_draws_from_its_lanes_in_turn(shards: list[Shard]):
    assert [one.lane for one in itertools.islice(stream(shards, Lanes(4, 2), 1, 2), 6)] == [1, 3, 1, 3, 1, 3]


def positions_after(drawn: list[LaneSample]) -> dict[int, Position]:
    return {one.lane: one.after for one in drawn}


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resuming_continues_with_the_next_sample(shards: list[Shard], rank: int, world_size: int):
    lanes = Lanes(4, 2, seed=5)
    taken = list(itertools.islice(stream(shards, lanes, rank, world_size), 2 * sum(SIZES)))
    for i in range(1, len(taken) - 3, 2):
        resumed = stream(shards, lanes, rank, world_size, positions_after(taken[:i]))
        assert list(itertools.islice(resumed, 3)) == taken[i : i + 3]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2), (2, 4)])
def test_a_different_number_of_ranks_finishes_the_epoch_with_every_sample_once(
    shards: list[Shard], before: int, after: int
):
    full = [shard for shard, size in zip(shards, SIZES, strict=True) if size]
    lanes = Lanes(4, 2)
    first = [one for rank in range(before) for one in itertools.islice(stream(full, lanes, rank, before), 2 + rank)]
    rest: list[LaneSample] = []
    for rank in range(after):
        drawn = itertools.islice(stream(full, lanes, rank, after, positions_after(first)), 3 * sum(SIZES))
        rest += drawn
    assert sorted(one.sample.key for one in first + rest if one.before.epoch == 0) == EVERY_KEY


def test_more_ranks_than_lanes_is_an_error(shards: list[Shard]):
    with pytest.raises(ValueError, match="4 lanes, too few for 5 workers"):
        next(stream(shards, Lanes(4, 2), 0, 5))


def test_every_rank_has_the_same_number_of_lanes_and_at_most_one_per_shard():
    assert Lanes.for_ranks(2, 100, 1024, 0) == Lanes(16, 128)
    assert Lanes.for_ranks(2, 7, 1024, 0) == Lanes(6, 341)
    assert Lanes.for_ranks(4, 3, 1024, 0) == Lanes(4, 1024)  # every lane reads a part of every shard


def test_samples_have_their_members(shards: list[Shard]):
    assert set(next(stream(shards)).sample.members) == {"png", "txt"}


def broken(shard: Shard, folder: Path) -> Shard:
    """A copy of the shard, truncated within its second sample."""
    path = folder / Path(shard.url).name
    path.write_bytes(Path(shard.url).read_bytes()[:3500])
    return Shard(str(path), 3500)


def test_a_broken_shard_is_reported_and_the_others_are_read(shards: list[Shard], tmp_path: Path):
    bad: list[ShardError] = []
    mixed = [broken(shards[0], tmp_path), *shards[1:]]
    keys = epoch_keys(mixed, bad=bad)
    assert set(keys) >= {f"{100 * i + j:04d}" for i, count in enumerate(SIZES) for j in range(count) if i}
    assert {mixed[0].url in str(error) for error in bad} == {True}


def test_a_truncated_shard_yields_the_samples_before_the_break(shards: list[Shard], tmp_path: Path):
    keys = epoch_keys([broken(shards[0], tmp_path), shards[1]])
    assert sorted(keys)[0] == "0000"
    assert len(keys) < SIZES[0] + SIZES[1]


def test_only_broken_shards_are_an_error(tmp_path: Path):
    bad: list[ShardError] = []
    with pytest.raises(ShardError, match="none of the 2 shards has a readable sample"):
        next(stream([Shard(str(tmp_path / "gone-0.tar"), None), Shard(str(tmp_path / "gone-1.tar"), None)], bad=bad))
    assert len(bad) == 2


@pytest.mark.parametrize("without", ["missing", "empty"])
def test_a_rank_whose_only_shard_has_no_samples_continues_with_the_next_epoch(shards: list[Shard], without: str):
    mixed = [shards[0], Shard("/gone.tar", None) if without == "missing" else shards[SIZES.index(0)]]
    for rank in range(2):
        assert len(list(itertools.islice(stream(mixed, Lanes(2, 4), rank, 2), 30))) == 30
