"""TokenDataset: every row once, in a reproducible order, and resumable at every row."""

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from pipeline.errors import BrokenOutput, OutputMismatch, UnsupportedSchema
from pipeline.tokens import Output, TokenDataset
from tests.corpus import token_rows, write_tokens

SIZES = (5, 0, 7, 3, 8)  # 23 rows


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("list"), SIZES)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("packed"), SIZES, encoding="packed")


ALL_KEYS = [f"{100 * i + j:04d}" for i, count in enumerate(SIZES) for j in range(count)]


def keys(rows) -> list[str]:
    return [row["key"] for row in rows]


def ordered(output: Output) -> list[str]:
    """All keys in the order of the manifest entries."""
    return keys(TokenDataset(output.url))


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["output", "packed"])
@pytest.mark.parametrize("window", [0, 4])
def test_tokens_have_the_written_values_and_shape(request: pytest.FixtureRequest, encoding: str, window: int):
    output = request.getfixturevalue(encoding)
    found = {row["key"]: row["tokens"] for row in TokenDataset(output.url, shuffle_window=window)}
    for shard, count in zip(output.inputs(), SIZES, strict=True):
        for row in token_rows(shard, count):
            assert found[row.key].dtype == np.uint16
            assert np.array_equal(found[row.key], row.tokens)


def test_list_and_packed_give_the_same_rows(output: Output, packed: Output):
    first, second = ({row["key"]: row["tokens"].tolist() for row in TokenDataset(o.url)} for o in (output, packed))
    assert first == second


def test_rows_have_the_requested_columns(output: Output):
    row = next(iter(TokenDataset(output.url, columns=("source_index", "height"))))
    assert set(row) == {"tokens", "key", "source_index", "height"}
    assert row["height"] == 8 * row["tokens"].shape[0]


def test_an_unknown_column_is_an_error_with_its_name(output: Output):
    with pytest.raises((ValueError, KeyError), match="captoin"):
        next(iter(TokenDataset(output.url, columns=("captoin",))))


def test_tokens_are_writable_copies(output: Output):
    first = next(iter(TokenDataset(output.url)))
    first["tokens"][:] = 0
    assert next(iter(TokenDataset(output.url)))["tokens"].any()


def test_an_empty_output_has_no_rows(tmp_path: Path):
    dataset = TokenDataset(write_tokens(tmp_path, [0]).url, shuffle_window=4)
    assert (len(dataset), list(dataset)) == (0, [])


# -- ranks and workers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_together_read_every_row_once(output: Output, world_size: int, workers: int):
    found: list[str] = []
    for rank in range(world_size):
        dataset = TokenDataset(output.url, rank=rank, world_size=world_size, shuffle_window=4)
        found += keys(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert sorted(found) == ALL_KEYS


def test_more_ranks_than_rows_are_not_an_error(output: Output):
    found = [keys(TokenDataset(output.url, rank=rank, world_size=30)) for rank in range(30)]
    assert sorted(itertools.chain(*found)) == ALL_KEYS


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [0, 4])
def test_equal_length_gives_every_rank_the_same_number_of_rows(output: Output, world_size: int, window: int):
    settings = {"world_size": world_size, "shuffle_window": window, "equal_length": True}
    datasets = [TokenDataset(output.url, rank=rank, **settings) for rank in range(world_size)]
    found = [keys(dataset) for dataset in datasets]
    assert {len(part) for part in found} == {len(ALL_KEYS) // world_size} == {len(dataset) for dataset in datasets}
    assert len(set(itertools.chain(*found))) == len(ALL_KEYS) // world_size * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_len_is_the_number_of_rows_of_an_epoch(output: Output, world_size: int):
    for rank in range(world_size):
        dataset = TokenDataset(output.url, rank=rank, world_size=world_size)
        assert len(dataset) == len(list(dataset))


def test_a_dataloader_batches_rows_into_tensors(output: Output):
    dataset = TokenDataset(output.url, rank=0, world_size=2)
    rows = [row for row in dataset if row["tokens"].shape == (2, 3)]
    batch = next(iter(DataLoader(rows, batch_size=3)))
    assert batch["tokens"].shape == (3, 2, 3)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_size_is_refused(output: Output, rank: int):
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        TokenDataset(output.url, rank=rank, world_size=2)


# -- order --------------------------------------------------------------------------------------------------------


def epochs(output: Output, count: int = 2, **settings) -> list[list[str]]:
    dataset = TokenDataset(output.url, **settings)
    return [keys(dataset) for _ in range(count)]


def test_without_shuffling_rows_are_in_the_order_of_the_shards(output: Output):
    files = sorted(zip(output.inputs(), SIZES, strict=True), key=lambda pair: pair[0].name)
    expected = [row.key for shard, count in files for row in token_rows(shard, count)]
    assert epochs(output) == [expected, expected]


def test_shuffling_mixes_rows_of_different_shards(output: Output):
    [found] = epochs(output, 1, shuffle_window=12)
    changes = sum(a[:2] != b[:2] for a, b in itertools.pairwise(found))
    assert sorted(found) == ALL_KEYS
    assert changes > len(SIZES)


def test_epochs_and_seeds_give_different_orders(output: Output):
    first, second = epochs(output, 2, shuffle_window=6, seed=1)
    [other] = epochs(output, 1, shuffle_window=6, seed=2)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_epochs_and_seeds_give_different_orders_within_a_shard(tmp_path: Path):
    single = write_tokens(tmp_path, (8,))
    orders = [order for seed in (0, 1) for order in epochs(single, 2, shuffle_window=4, seed=seed)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_reproducible(output: Output):
    settings = {"shuffle_window": 6, "seed": 1, "rank": 1, "world_size": 2}
    assert epochs(output, 3, **settings) == epochs(output, 3, **settings)


def test_set_epoch_gives_the_order_of_that_epoch(output: Output):
    dataset = TokenDataset(output.url, shuffle_window=6)
    dataset.set_epoch(2)
    assert keys(dataset) == epochs(output, 3, shuffle_window=6)[2]


# -- state --------------------------------------------------------------------------------------------------------

STATES = [
    {"shuffle_window": 0},
    {"shuffle_window": 4, "seed": 3},
    {"shuffle_window": 100},
    {"shuffle_window": 5, "rank": 1, "world_size": 2, "equal_length": True},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("small"), (3, 0, 2, 5))


@pytest.mark.parametrize("settings", STATES)
def test_a_state_resumes_right_after_the_last_row(small: Output, settings: dict):
    """At every position of two epochs: the rows before the state and the rows after it add up to the epochs."""
    expected = list(itertools.chain(*epochs(small, 3, **settings)))
    for taken in range(2 * len(expected) // 3):
        running = TokenDataset(small.url, **settings)
        endless = itertools.chain.from_iterable(iter(running) for _ in itertools.count())
        assert keys(itertools.islice(endless, taken)) == expected[:taken]
        resumed = TokenDataset(small.url, **settings)
        resumed.load_state_dict(running.state_dict())
        rest = keys(resumed) + keys(resumed)
        assert rest == expected[taken : taken + len(rest)]
        assert len(rest) >= len(expected) // 3


def test_a_state_round_trips_through_json_and_repeated_resumes(output: Output):
    expected = epochs(output, 1, shuffle_window=4)[0]
    found: list[str] = []
    state = None
    for part in (3, 4, 9, 7):
        dataset = TokenDataset(output.url, shuffle_window=4)
        if state:
            dataset.load_state_dict(json.loads(state))
        found += keys(itertools.islice(dataset, part))
        state = json.dumps(dataset.state_dict())
    assert found == expected


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle_window": 5}, {"rank": 1}, {"world_size": 3}])
def test_a_state_with_other_settings_is_refused(output: Output, change: dict):
    settings = {"shuffle_window": 4, "seed": 0, "rank": 0, "world_size": 2}
    state = TokenDataset(output.url, **settings).state_dict()
    with pytest.raises(OutputMismatch, match=next(iter(change))):
        TokenDataset(output.url, **{**settings, **change}).load_state_dict(state)


def test_a_state_with_another_equal_length_is_refused(output: Output):
    state = TokenDataset(output.url, rank=1, world_size=2).state_dict()
    with pytest.raises(OutputMismatch):
        TokenDataset(output.url, rank=1, world_size=2, equal_length=True).load_state_dict(state)


def test_a_state_of_an_output_that_has_grown_is_refused(output: Output, tmp_path: Path):
    state = TokenDataset(output.url).state_dict()
    with pytest.raises(OutputMismatch, match="num_rows=23"):
        TokenDataset(write_tokens(tmp_path, (*SIZES, 2)).url).load_state_dict(state)


def test_a_state_of_another_tokenizers_output_is_refused(output: Output, tmp_path: Path):
    state = TokenDataset(output.url).state_dict()
    other = write_tokens(tmp_path, SIZES, tokenizer_id="tok-b")
    with pytest.raises(OutputMismatch):
        TokenDataset(other.url).load_state_dict(state)


def as_worker(monkeypatch: pytest.MonkeyPatch, worker: int, workers: int) -> None:
    """Imitates a DataLoader worker. A real worker that raises would make torch wait 5 s at the end."""
    info = SimpleNamespace(id=worker, num_workers=workers)
    monkeypatch.setattr("pipeline.tokens.processes.get_worker_info", lambda: info)


def test_a_state_saved_without_workers_is_refused_with_workers(output: Output, monkeypatch: pytest.MonkeyPatch):
    dataset, resumed = TokenDataset(output.url), TokenDataset(output.url)
    list(itertools.islice(dataset, 6))
    resumed.load_state_dict(dataset.state_dict())
    as_worker(monkeypatch, 0, 2)
    with pytest.raises(OutputMismatch, match="the same number of workers"):
        next(iter(resumed))


def test_the_state_of_a_worker_resumes_only_in_that_worker(output: Output, monkeypatch: pytest.MonkeyPatch):
    as_worker(monkeypatch, 1, 2)
    expected = keys(TokenDataset(output.url, shuffle_window=4))
    dataset, resumed = (TokenDataset(output.url, shuffle_window=4) for _ in range(2))
    assert keys(itertools.islice(dataset, 5)) == expected[:5]
    resumed.load_state_dict(dataset.state_dict())
    assert keys(resumed) == expected[5:]
    resumed.load_state_dict(dataset.state_dict())
    as_worker(monkeypatch, 0, 2)
    with pytest.raises(OutputMismatch, match="worker"):
        next(iter(resumed))


def test_an_unfinished_pass_does_not_shorten_the_next(output: Output):
    dataset = TokenDataset(output.url)
    next(iter(dataset))
    assert len(list(dataset)) == len(dataset)


# -- identity -----------------------------------------------------------------------------------------------------


def test_an_output_of_another_tokenizer_is_refused(output: Output):
    TokenDataset(output.url, tokenizer_id="tok-a")
    with pytest.raises(OutputMismatch, match="written by tokenizer tok-a, not by tok-b"):
        TokenDataset(output.url, tokenizer_id="tok-b")


def test_a_single_shard_of_another_tokenizer_is_refused(output: Output, tmp_path: Path):
    mixed = write_tokens(tmp_path / "a", (2, 2))
    other = write_tokens(tmp_path / "b", (2, 2), tokenizer_id="tok-b")
    [first, _], [stranger, _] = mixed.commits(), other.commits()
    Path(mixed.tokens_url(first.name)).write_bytes(other.read_tokens(stranger.name))
    with pytest.raises(OutputMismatch, match="tok-b"):
        list(TokenDataset(mixed.url))


def test_uncommitted_files_are_not_read(tmp_path: Path):
    output = write_tokens(tmp_path, (2, 3))
    first, _ = output.commits()
    (Path(output.url) / "manifest" / f"{first.name}.json").unlink()
    assert len(list(TokenDataset(output.url))) == 5 - first.num_rows


def test_a_folder_without_dataset_json_is_not_an_output(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"dataset\.json is missing"):
        TokenDataset(str(tmp_path))


def test_another_file_system_gives_the_same_rows(output: Output):
    memory = fsspec.filesystem("memory")
    for path in Path(output.url).rglob("*.*"):
        memory.pipe_file(f"/copied/{path.relative_to(output.url)}", path.read_bytes())
    assert epochs(Output.open("memory://copied"), shuffle_window=4) == epochs(output, shuffle_window=4)


# -- damaged files ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["list", "packed"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    return write_tokens(tmp_path, (5,), encoding=request.param)


def the_file(output: Output) -> Path:
    return Path(output.tokens_url(output.commits()[0].name))


def read(output: Output) -> list[dict]:
    return list(TokenDataset(output.url))


def column(name: str, values: list, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def footer(**values: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata(
        {**table.schema.metadata, **{k.encode(): v for k, v in values.items()}}
    )


def flat(table: pa.Table, token: int | float, kind: pa.DataType) -> pa.Table:
    """Each token replaced by this one, in the encoding of the table."""
    counts = [math.prod(shape) for shape in table["shape"].to_pylist()]
    if pa.types.is_binary(table.schema.field("tokens").type):
        return column("tokens", [np.full(n, token, "<u2").tobytes() for n in counts], pa.binary())(table)
    return column("tokens", [[token] * n for n in counts], pa.list_(kind))(table)


WRONG: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "an id that is no code": (lambda t: flat(t, 1024, pa.uint16()), "token 1024 is not below 1024"),
    "the highest id": (lambda t: flat(t, 65535, pa.uint16()), "token 65535 is not below 1024"),
    "floats": (lambda t: column("tokens", [[0.5]] * 5, pa.list_(pa.float32()))(t), "column tokens is list<"),
    "text": (lambda t: column("tokens", ["0"] * 5, pa.string())(t), "column tokens is string"),
    "a negative shape": (lambda t: column("shape", [[-2, -3]] * 5, pa.list_(pa.int32()))(t), "a shape has the side -3"),
    "another shape": (lambda t: column("shape", [[9, 9]] * 5, pa.list_(pa.int32()))(t), "another number of tokens"),
    "no column of shapes": (lambda t: t.drop_columns(["shape"]), r"No match for FieldRef\.Name\(shape\)"),
    "another shard": (lambda t: footer(source_shard="/other.tar")(t), "it holds the rows of /other.tar"),
    "fewer rows": (lambda t: t.slice(1), "4 rows, the manifest says 5"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_does_not_fit_the_layout_is_refused_with_its_name(fresh: Output, what: str):
    path = the_file(fresh)
    change, message = WRONG[what]
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(BrokenOutput, match=f"{path.name}: .*{message}.*verify.repair=true"):
        read(fresh)


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing", None])
def test_a_torn_or_missing_file_is_named(fresh: Output, content: bytes | None):
    path = the_file(fresh)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BrokenOutput, match=rf"{path.name}.*verify\.repair=true"):
        read(fresh)


def test_no_flipped_byte_of_the_pages_is_read(fresh: Output):
    """The page checksums find it before it becomes a token, a key or a shape."""
    path = the_file(fresh)
    good, rows = path.read_bytes(), repr(read(fresh))
    for at in range(4, len(good), 61):
        damaged = bytearray(good)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with contextlib.suppress(BrokenOutput, OutputMismatch):
            assert repr(read(fresh)) == rows


def test_a_file_without_page_checksums_is_read(fresh: Output):
    path, rows = the_file(fresh), repr(read(fresh))
    pq.write_table(pq.read_table(path), path)
    assert repr(read(fresh)) == rows


def test_the_error_of_a_damaged_file_is_one_line(fresh: Output):
    path = the_file(fresh)
    good = path.read_bytes()
    for at in (4, len(good) - 40):  # the header of a page, the footer
        path.write_bytes(good[:at] + b"\xff\x0f\n\0" * 5 + good[at + 20 :])
        with pytest.raises(BrokenOutput, match=path.name) as found:
            read(fresh)
        assert str(found.value).isprintable()


def test_a_key_that_is_not_utf8_is_damage(fresh: Output):
    """In a file of an earlier version, without page checksums."""
    path = the_file(fresh)
    table = pq.read_table(path)
    keys = pa.array([b"\xff\xfe"] * len(table), pa.binary()).view(pa.string())
    field = table.schema.field("key")
    pq.write_table(table.set_column(table.schema.get_field_index("key"), field, keys), path)
    with pytest.raises(BrokenOutput, match=rf"{path.name}: .*UTF"):
        read(fresh)


@pytest.mark.parametrize("version", ["2", "x"])
def test_a_single_shard_with_a_newer_schema_is_refused(fresh: Output, version: str):
    path = the_file(fresh)
    pq.write_table(footer(schema_version=version)(pq.read_table(path)), path)
    with pytest.raises(UnsupportedSchema, match=f"{path.name}: schema_version is .*upgrade tokenmill"):
        read(fresh)
