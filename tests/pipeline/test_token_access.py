"""TokenDataset: batches, single rows, ranks of the environment, and epochs that other numbers of streams continue."""

import itertools
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.corpus.shards import ShardList
from pipeline.errors import BrokenOutput, OutputMismatch
from pipeline.tokens import Output, ShardLayout, TokenDataset, TokenRow, commit_shard
from pipeline.tokens.rows import collate
from tests.corpus import layout, write_corpus, write_tokens

SIZES = (5, 0, 7, 3, 8)  # 23 rows


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("list"), SIZES)


@pytest.fixture(scope="module")
def rows(output: Output) -> list[dict[str, Any]]:
    return list(TokenDataset(output.url))


def keys(found: Any) -> list[str]:
    return [row["key"] for row in found]


# -- batches ------------------------------------------------------------------------------------------------------


def test_batches_hold_the_rows_padded_to_the_largest_of_each(output: Output, rows: list[dict[str, Any]]):
    assert len({row["tokens"].shape for row in rows}) > 1
    batches = list(TokenDataset(output.url).batches(4, pad=-1))
    assert [len(batch["key"]) for batch in batches] == [4, 4, 4, 4, 4, 3]
    for batch, expected in zip(batches, in_fours(rows), strict=True):
        assert batch["key"] == keys(expected)
        assert batch["tokens"].dtype == np.int64
        assert batch["tokens"].shape[1:] == tuple(np.max([row["tokens"].shape for row in expected], axis=0))
        for tokens, mask, row in zip(batch["tokens"], batch["mask"], expected, strict=True):
            assert np.array_equal(tokens[mask].reshape(row["tokens"].shape), row["tokens"])
            assert (tokens[~mask] == -1).all()


def in_fours(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    return (rows[i : i + 4] for i in range(0, len(rows), 4))


def of_lengths(lengths: list[int], folder: Path) -> tuple[str, dict[str, list[int]]]:
    """An output of one shard, whose rows have these numbers of tokens, and its tokens by key."""
    [shard] = write_corpus(folder / "in", (1,))
    output = Output.create(str(folder / "out"), layout(modality="audio"), ShardList([shard]), {})
    rows = np.split(np.arange(sum(lengths)) % 1000, np.cumsum(lengths)[:-1])
    size = {"sample_rate": 16000, "num_samples": 1}
    commit_shard(output, shard, [TokenRow(f"{i}", i, row, size) for i, row in enumerate(rows)], [], {}, now=0.0)
    return output.url, {f"{i}": row.tolist() for i, row in enumerate(rows)}


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[3, 6, 9], [3, 6, 9, 6] * 3, [6] * 5, [2, 4]])
def test_batches_of_rows_of_any_lengths_hold_their_own_tokens(
    lengths: list[int], size: int, window: int, tmp_path: Path
):
    """The mean length of all rows may be that of a batch: 3, 6 and 9. Each row is found by its key."""
    url, tokens = of_lengths(lengths, tmp_path)
    seen = []
    for batch in TokenDataset(url, shuffle_window=window).batches(size, pad=-1):
        for key, row, mask in zip(batch["key"], batch["tokens"], batch["mask"], strict=True):
            assert row[mask].tolist() == tokens[key]
            seen.append(key)
    assert sorted(seen) == sorted(tokens)


def test_the_last_batch_can_be_left_out(output: Output):
    assert [len(batch["key"]) for batch in TokenDataset(output.url).batches(4, drop_last=True)] == [4] * 5


def test_a_state_between_two_batches_is_exact(output: Output):
    dataset, resumed = (TokenDataset(output.url, shuffle_window=6) for _ in range(2))
    batches = dataset.batches(4)
    found = [key for batch in itertools.islice(batches, 3) for key in batch["key"]]
    resumed.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    found += [key for batch in resumed.batches(4) for key in batch["key"]]
    assert found == keys(TokenDataset(output.url, shuffle_window=6))


@pytest.mark.parametrize("window", [0, 4])
def test_ragged_batches_hold_the_rows_one_after_another(output: Output, window: int):
    rows = list(TokenDataset(output.url, shuffle_window=window))
    batches = list(TokenDataset(output.url, shuffle_window=window).batches(4, ragged=True, dtype=None))
    assert {batch["tokens"].dtype for batch in batches} == {np.dtype(np.uint16)}
    found = [
        (key, batch["tokens"][start:stop].reshape(shape).tolist())
        for batch in batches
        for key, shape, (start, stop) in zip(
            batch["key"], batch["shapes"], itertools.pairwise(batch["offsets"]), strict=True
        )
    ]
    assert found == [(row["key"], row["tokens"].tolist()) for row in rows]


def test_batches_can_be_tensors(output: Output):
    for batch in TokenDataset(output.url, columns=("source_index",)).batches(4, torch=True):
        assert {name: batch[name].dtype for name in ("tokens", "mask", "source_index")} == {
            "tokens": torch.int64,
            "mask": torch.bool,
            "source_index": torch.int64,
        }


def test_single_rows_read_a_file_once_while_there_is_room(output: Output, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    original = TokenDataset._read_file
    monkeypatch.setattr(TokenDataset, "_read_file", lambda self, name: (read.append(name), original(self, name))[1])
    dataset = TokenDataset(output.url)
    for index in (0, 22, 1, 21, 8, 0):
        assert dataset[index]["key"] == dataset.take([index])[0]["key"]
    assert len(read) == len(set(read)) == 3
    monkeypatch.setattr("pipeline.tokens.dataset.KEPT_BYTES", 1)
    dataset[0], dataset[22], dataset[0]
    assert len(read) == 5
    assert not pickle.loads(pickle.dumps(dataset.__getstate__()["_recent"]))


def test_latents_stay_floats(tmp_path: Path):
    [shard] = write_corpus(tmp_path / "in", (3,))
    about = ShardLayout.for_latents(encoder_id="enc", modality="image", preprocessing={})
    output = Output.create(str(tmp_path / "latents"), about, ShardList([shard]), {})
    grids = [np.random.default_rng(i).normal(size=(2, 3 + i % 2, 4)).astype(np.float32) for i in range(3)]
    size = {"height": 16, "width": 24}
    commit_shard(output, shard, [TokenRow(f"000{i}", i, z, size) for i, z in enumerate(grids)], [], {}, now=0.0)
    dataset = TokenDataset(output.url, tokenizer_id="enc")
    assert all(np.array_equal(row["tokens"], z) for row, z in zip(dataset, grids, strict=True))
    [batch] = dataset.batches(3)
    assert batch["tokens"].dtype == np.float32
    assert batch["tokens"].shape == (3, 2, 4, 4)
    assert np.array_equal(batch["tokens"][batch["mask"]], np.concatenate([z.reshape(-1) for z in grids]))
    assert torch.equal(collate(list(dataset))["tokens"], torch.from_numpy(batch["tokens"]))


def test_a_batch_without_rows_is_refused(output: Output):
    with pytest.raises(ValueError, match="size is 0; a batch needs at least 1 row"):
        next(TokenDataset(output.url).batches(0))


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_lengths_are_those_of_the_rows(encoding: str, tmp_path: Path):
    output = write_tokens(tmp_path, SIZES, encoding=encoding)
    lengths = TokenDataset(output.url).lengths()
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [row["tokens"].size for row in TokenDataset(output.url)]


def test_lengths_of_a_damaged_file_name_it(tmp_path: Path):
    output = write_tokens(tmp_path, (3, 4))
    name = output.commits()[1].name
    Path(output.tokens_url(name)).unlink()
    with pytest.raises(BrokenOutput, match=f"{name}.parquet: the file is missing; .*verify.repair=true"):
        TokenDataset(output.url).lengths()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_with_collate_feeds_an_embedding(output: Output, workers: int):
    columns = ("source_index",)
    loader = DataLoader(
        TokenDataset(output.url, columns=columns), batch_size=8, collate_fn=collate, num_workers=workers
    )
    embedding = torch.nn.Embedding(1024, 4)
    found = []
    for batch in loader:
        assert embedding(batch["tokens"]).shape == (*batch["tokens"].shape, 4)
        assert batch["mask"].dtype == torch.bool
        assert batch["source_index"].dtype == torch.int64
        found += batch["key"]
    assert sorted(found) == sorted(keys(TokenDataset(output.url)))


# -- single rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_rows_by_number_are_those_of_the_iteration(tmp_path: Path, encoding: str):
    dataset = TokenDataset(write_tokens(tmp_path, SIZES, encoding=encoding).url, rank=1, world_size=2)
    rows = [row for rank in (0, 1) for row in TokenDataset(dataset.output.url, rank=rank, world_size=2)]
    wanted = random.Random(0).choices(range(23), k=40)
    for found, number in zip(dataset.take(wanted), wanted, strict=True):
        assert found["key"] == rows[number]["key"]
        assert np.array_equal(found["tokens"], rows[number]["tokens"])
    assert dataset[22]["key"] == rows[22]["key"]
    assert dataset.take([]) == []


@pytest.mark.parametrize("number", [True, np.True_, 1.0, 1.7, "3", None])
def test_what_is_no_number_of_a_row_is_refused(output: Output, number: Any):
    with pytest.raises(TypeError):
        TokenDataset(output.url)[number]
    with pytest.raises(TypeError):
        TokenDataset(output.url).take([number])


def test_a_row_that_is_taken_twice_is_two_rows(output: Output):
    one, other = TokenDataset(output.url).take([4, 4])
    one["tokens"][:] = 0
    assert other["tokens"].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle_window": -5}, "shuffle_window is -5; it must be 0 or more"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"columns": "height"}, r"columns is 'height'; give \('height',\)"),
        ({"columns": ("shape",)}, "'shape' is not in"),
    ],
)
def test_settings_that_would_give_other_rows_are_refused(output: Output, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TokenDataset(output.url, **settings)


def test_numbers_that_a_dtype_does_not_hold_are_refused(output: Output):
    with pytest.raises(ValueError, match="dtype is uint8, which does not hold the token 1023"):
        next(TokenDataset(output.url).batches(2, dtype=np.uint8))
    with pytest.raises(ValueError, match="pad is -1, which uint16 does not hold"):
        next(TokenDataset(output.url).batches(2, pad=-1, dtype=None))
    with pytest.raises(ValueError, match="epoch is -1; it must be 0 or more"):
        TokenDataset(output.url).set_epoch(-1)


def test_a_batch_that_was_interrupted_is_read_again(output: Output, monkeypatch: pytest.MonkeyPatch):
    dataset = TokenDataset(output.url)
    batches = dataset.batches(4)
    found = next(batches)["key"]
    with monkeypatch.context() as broken:
        broken.setattr("pipeline.tokens.dataset.padded", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(batches)
    resumed = TokenDataset(output.url)
    resumed.load_state_dict(dataset.state_dict())
    assert found + [key for batch in resumed.batches(4) for key in batch["key"]] == keys(TokenDataset(output.url))


@pytest.mark.parametrize("number", [-1, 23])
def test_a_row_that_is_not_there_is_an_index_error(output: Output, number: int):
    with pytest.raises(IndexError, match=f"row {number} of 23"):
        TokenDataset(output.url)[number]


def test_a_key_leads_to_its_row(output: Output, rows: list[dict[str, Any]]):
    dataset = TokenDataset(output.url)
    assert [dataset.find(row["key"]) for row in rows] == list(range(23))
    with pytest.raises(KeyError, match="nobody"):
        dataset.find("nobody")


# -- ranks --------------------------------------------------------------------------------------------------------


def test_rank_and_world_size_come_from_the_environment(output: Output, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert keys(TokenDataset(output.url)) == keys(TokenDataset(output.url, rank=2, world_size=3))
    assert len(TokenDataset(output.url, rank=0, world_size=1)) == 23


def test_set_epoch_reaches_persistent_workers(output: Output):
    dataset = TokenDataset(output.url, shuffle_window=6)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (4, 2):
        dataset.set_epoch(epoch)
        alone = TokenDataset(output.url, shuffle_window=6)
        alone.set_epoch(epoch)
        assert keys(loader) == keys(alone)
    del loader


class InFours(IterableDataset):
    """What a user writes to make batches in the workers."""

    def __init__(self, dataset: TokenDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.dataset.batches(4)


def test_set_epoch_reaches_the_batches_of_persistent_workers(output: Output):
    dataset = TokenDataset(output.url, shuffle_window=6)
    loader = DataLoader(InFours(dataset), batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (4, 2, 7):
        dataset.set_epoch(epoch)
        alone = TokenDataset(output.url, shuffle_window=6)
        alone.set_epoch(epoch)
        assert [key for batch in loader for key in batch["key"]] == keys(alone)
    del loader


def test_a_worker_that_resumes_is_not_reset_by_an_earlier_set_epoch(output: Output, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.tokens.dataset.worker_of", lambda: (0, 1))
    expected = keys(TokenDataset(output.url, shuffle_window=6))
    running, resumed = (TokenDataset(output.url, shuffle_window=6) for _ in range(2))
    with monkeypatch.context() as main:
        main.setattr("pipeline.tokens.dataset.worker_of", lambda: (0, 0))
        resumed.set_epoch(0)
    list(itertools.islice(running, 5))
    resumed.load_state_dict(running.state_dict())
    assert keys(resumed) == expected[5:]


def test_a_state_beside_the_workers_of_a_dataloader_is_refused(output: Output):
    dataset = TokenDataset(output.url)
    list(DataLoader(dataset, batch_size=None, num_workers=1))
    with pytest.raises(OutputMismatch, match="use torchdata's StatefulDataLoader, or num_workers=0"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert dataset.state_dict()["epoch"] == 1


# -- other numbers of streams -------------------------------------------------------------------------------------


class Streams:
    """All ranks and workers of a run, each as a dataset of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, url: str, ranks: int, workers: int, **settings: Any):
        self.monkeypatch = monkeypatch
        places = itertools.product(range(ranks), range(max(1, workers)))
        self.all = [
            (TokenDataset(url, rank=rank, world_size=ranks, **settings), (worker, workers)) for rank, worker in places
        ]

    def resume(self, states: list[dict[str, Any]]) -> None:
        for dataset, _ in self.all:
            dataset.load_state_dict(json.loads(json.dumps(states)))

    def read(self, rng: random.Random, most: int) -> tuple[list[str], list[dict[str, Any]]]:
        """Up to `most` rows of each stream, a different number of each; the keys and the states after them."""
        found, states = [], []
        for dataset, place in self.all:
            with self.monkeypatch.context() as patched:
                patched.setattr("pipeline.tokens.dataset.worker_of", lambda place=place: place)
                found += keys(itertools.islice(dataset, rng.randint(0, most)))
                states.append(dataset.state_dict())
        return found, states


@pytest.mark.parametrize("window", [0, 4, 100])
@pytest.mark.parametrize("shapes", [[(2, 0), (3, 0)], [(1, 4), (1, 1)], [(3, 2), (1, 0), (2, 3)], [(1, 0), (5, 0)]])
def test_an_epoch_continues_on_any_number_of_ranks_and_workers(
    output: Output, shapes: list[tuple[int, int]], window: int, monkeypatch: pytest.MonkeyPatch
):
    """Killed in mid-epoch, again and again: every row once."""
    for seed in range(5):
        rng = random.Random(seed)
        found: list[str] = []
        states: list[dict[str, Any]] | None = None
        for number, (ranks, workers) in enumerate(shapes):
            streams = Streams(monkeypatch, output.url, ranks, workers, shuffle_window=window, seed=3)
            if states is not None:
                streams.resume(states)
            is_last = number == len(shapes) - 1
            more, states = streams.read(rng, 3) if not is_last else (whole(streams), None)
            found += more
        assert sorted(found) == sorted(keys(TokenDataset(output.url)))


def whole(streams: Streams) -> list[str]:
    found: list[str] = []
    for dataset, place in streams.all:
        with streams.monkeypatch.context() as patched:
            patched.setattr("pipeline.tokens.dataset.worker_of", lambda place=place: place)
            found += keys(dataset)
    return found


def test_after_a_continued_epoch_the_next_is_whole(output: Output):
    old = [TokenDataset(output.url, rank=rank, world_size=2) for rank in range(2)]
    for dataset in old:
        list(itertools.islice(dataset, 4))
    new = TokenDataset(output.url)
    new.load_state_dict([dataset.state_dict() for dataset in old])
    assert len(list(new)) == 23 - 8
    assert new.epoch == 1
    assert len(list(new)) == 23


def test_states_may_be_within_those_of_a_loader(output: Output):
    """As torchdata's StatefulDataLoader stores them: {"_snapshot": {..., "worker_0": {"dataset_state": ...}}}."""
    old = [TokenDataset(output.url, rank=rank, world_size=2) for rank in range(2)]
    for dataset in old:
        list(itertools.islice(dataset, 4))
    loaders = [{"_snapshot": {"_steps": 4, "workers": [{"dataset_state": one.state_dict()}, None]}} for one in old]
    new = TokenDataset(output.url)
    new.load_state_dict(loaders)
    assert len(list(new)) == 23 - 8


def test_a_state_without_its_list_of_rows_is_read(output: Output):
    """As older versions wrote it."""
    dataset, resumed = TokenDataset(output.url), TokenDataset(output.url)
    expected = keys(dataset)
    dataset.set_epoch(0)
    list(itertools.islice(dataset, 6))
    state = dataset.state_dict()
    del state["left"]
    resumed.load_state_dict(state)
    assert keys(resumed) == expected[6:]


def test_a_state_of_another_output_with_as_many_rows_is_refused(output: Output, tmp_path: Path):
    other = TokenDataset(write_tokens(tmp_path, (12, 11)).url)
    state = TokenDataset(output.url).state_dict()
    for saved in (state, [state]):
        with pytest.raises(OutputMismatch, match="its shards have other names or numbers of rows"):
            other.load_state_dict(saved)
    del state["files"]  # of a state that an earlier version saved
    other.load_state_dict(state)


def test_states_two_epochs_apart_are_refused(output: Output):
    ahead, behind = (TokenDataset(output.url, rank=rank, world_size=2) for rank in range(2))
    ahead.set_epoch(2)
    with pytest.raises(OutputMismatch, match="the states are of different epochs"):
        TokenDataset(output.url).load_state_dict([ahead.state_dict(), behind.state_dict()])


@pytest.mark.parametrize("state", [{}, [], {"rank": {}}, "text", {"epoch": 1, "left": []}])
def test_what_is_no_state_is_refused(output: Output, state: Any):
    with pytest.raises(OutputMismatch, match="there is no state of a TokenDataset in it"):
        TokenDataset(output.url).load_state_dict(state)


def test_a_list_that_lacks_a_state_is_refused(output: Output):
    states = [TokenDataset(output.url, rank=rank, world_size=3).state_dict() for rank in (0, 2)]
    with pytest.raises(OutputMismatch, match=r"one state for each of 3 ranks.*\[\(0, 0\), \(2, 0\)\]"):
        TokenDataset(output.url).load_state_dict(states)
    with pytest.raises(OutputMismatch, match="there is no state of a TokenDataset in it"):
        TokenDataset(output.url).load_state_dict([])


def test_one_state_for_another_number_of_ranks_says_what_to_do(output: Output):
    state = TokenDataset(output.url, rank=0, world_size=2).state_dict()
    with pytest.raises(OutputMismatch, match="give the states of all ranks as a list"):
        TokenDataset(output.url, rank=0, world_size=3).load_state_dict(state)
