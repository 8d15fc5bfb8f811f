"""Views: where they lie, what their rows look like, and that `verify` finds a missing or doubled one."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.shards import Shard, ShardList
from pipeline.errors import OutputMismatch
from pipeline.tokens import Output, TokenDataset, TokenRow, commit_retry, commit_shard
from pipeline.tokens.repair import plan_repair
from pipeline.tokens.schema import to_parquet
from pipeline.tokens.verify import FILES, verify
from pipeline.tokens.views import Place, Views
from tests.corpus import layout, quarantined, token_row, write_corpus

VIEWS = Views(count=3, crop=256, flip=True, seed=0)
PLACES = [  # by hand, from the output of `printf "0 0 0001" | sha256sum` and of "0 1 0001"
    Place(0.14006965275168448, 0.053225419452265554, flip=False),
    Place(0.040137903120144425, 0.5928956451965205, flip=True),
]


def view_rows(start: int, samples: list[int]) -> list[TokenRow]:
    """VIEWS.count rows of each sample; the tokens of each view differ."""
    return [
        replace(token_row(f"{start + i:04d}", i), view=view, tokens=np.full((2, 2), 10 * i + view))
        for i in samples
        for view in range(VIEWS.count)
    ]


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Two shards of 4 and 2 samples in 3 views each. Sample 1 of the first is in quarantine."""
    inputs = write_corpus(tmp_path / "in", (4, 2))
    output = Output.create(str(tmp_path / "out"), layout(views=VIEWS), ShardList(inputs), config={})
    commit_shard(output, inputs[0], view_rows(0, [0, 2, 3]), [quarantined(inputs[0], 1)], {}, now=1.0, num_samples=4)
    commit_shard(output, inputs[1], view_rows(100, [0, 1]), [], {}, now=1.0)
    return output


def first(output: Output) -> Shard:
    return output.inputs()[0]


def forge(output: Output, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes the rows of the first shard and everything in its entry that follows from them."""
    name = first(output).name
    table = change(pq.read_table(output.tokens_url(name)))
    data = to_parquet(table)
    Path(output.tokens_url(name)).write_bytes(data)
    path = Path(output.entry_url(name))
    entry = json.loads(path.read_text())
    entry |= {"tokens_sha256": hashlib.sha256(data).hexdigest(), "tokens_num_bytes": len(data)}
    path.write_text(json.dumps(entry))


# -- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "view", "digest"),
    [
        ("cat", 0, hashlib.sha256(b"7 0 cat").digest()),
        ("cat", 1, hashlib.sha256(b"7 1 cat").digest()),
        ("a/ü", 2, hashlib.sha256(b"7 2 a/\xc3\xbc").digest()),
    ],
)
def test_a_place_comes_from_the_hash_of_seed_view_and_key(key: str, view: int, digest: bytes):
    place = Views(count=3, crop=256, flip=True, seed=7).place(key, view)
    assert place.top == pytest.approx(int.from_bytes(digest[:8]) / 2**64, abs=1e-15)
    assert place.left == pytest.approx(int.from_bytes(digest[8:16]) / 2**64, abs=1e-15)
    assert place.flip == (digest[16] % 2 == 1)


def test_places_stay_those_of_the_first_version():
    assert [Views(count=2, crop=64, flip=True, seed=0).place("0001", view) for view in (0, 1)] == PLACES


def test_places_do_not_depend_on_count_or_crop_and_half_of_them_are_mirrored():
    many = Views(count=1000, crop=8, flip=True, seed=0)
    places = [many.place("key", view) for view in range(1000)]
    assert places[:3] == [VIEWS.place("key", view) for view in range(3)]
    assert not any(replace(many, flip=False).place("key", view).flip for view in range(1000))
    # 5 standard deviations of a uniform distribution and of a fair coin
    assert np.mean([place.top for place in places]) == pytest.approx(0.5, abs=5 * (1 / 12) ** 0.5 / 1000**0.5)
    assert np.mean([place.left for place in places]) == pytest.approx(0.5, abs=5 * (1 / 12) ** 0.5 / 1000**0.5)
    assert np.mean([place.flip for place in places]) == pytest.approx(0.5, abs=5 * 0.5 / 1000**0.5)


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_have_an_int16_view_and_an_output_without_views_has_no_such_column(output: Output):
    table = pq.read_table(output.tokens_url(first(output).name))
    assert table.schema.field("view").type == pa.int16()
    assert list(zip(table["source_index"].to_pylist(), table["view"].to_pylist(), strict=True)) == [
        (index, view) for index in (0, 2, 3) for view in (0, 1, 2)
    ]
    assert "view" not in layout().schema("").names
    assert "views" not in layout().to_dict()


def test_a_member_named_view_stays_a_passthrough_column_of_outputs_without_views(tmp_path: Path):
    inputs = write_corpus(tmp_path / "in", (2,))
    output = Output.create(str(tmp_path / "out"), layout(passthrough=("view",)), ShardList(inputs), config={})
    rows = [replace(token_row(f"{i:04d}", i), passthrough={"view": b"front"}) for i in range(2)]
    commit_shard(output, inputs[0], rows[:1], [quarantined(inputs[0], 1)], {}, now=1.0)
    history = output.committed_shard(inputs[0].name)
    assert history is not None
    for _ in range(2):  # the second finds the token file of the first
        entry = commit_retry(output, inputs[0], history, rows[1:], [], {}, now=2.0)
        assert entry is not None
        Path(output.entry_url(entry.name)).unlink()
    assert verify(output, deep=True).problems == []
    with pytest.raises(ValueError, match="a column 'view' already exists"):
        layout(passthrough=("view",), views=VIEWS)


def test_counts_are_rows_and_samples(output: Output):
    history = output.committed_shard(first(output).name)
    assert history is not None
    assert (history.first.num_samples, history.num_rows, history.num_quarantined) == (4, 9, 1)


def test_views_are_in_dataset_json_and_in_the_footers(output: Output):
    assert Output.open(output.url).layout == output.layout
    expected = {"count": 3, "crop": 256, "flip": True, "seed": 0}
    assert output.about()["layout"]["views"] == expected
    footer = pq.read_schema(output.tokens_url(first(output).name)).metadata
    assert json.loads(footer[b"views"]) == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(VIEWS, seed=1), "views.seed is 0 there and 1 here. "),
        (replace(VIEWS, count=4, flip=False), "views.count is 3 there and 4 here; views.flip is True there and False"),
        (None, "views.count is 3 there and not set here; views.crop is 256 there and not set"),
    ],
)
def test_other_views_into_the_same_output_are_refused(output: Output, other: Views | None, message: str):
    with pytest.raises(OutputMismatch, match=message):
        Output.create(output.url, layout(views=other), ShardList(output.inputs()), config={})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (view_rows(100, [0, 1])[1:], r"lost: 0 view 0; twice: none; unknown: none"),
        ([*view_rows(100, [0, 1]), view_rows(100, [1])[2]], r"lost: none; twice: 1 view 2; unknown: none"),
        ([*view_rows(100, [0, 1]), replace(view_rows(100, [1])[2], view=3)], r"unknown: 1 view 3"),
        ([token_row("0100", 0), *view_rows(100, [1])], r"lost: 0 view 0, 0 view 1, 0 view 2; .* unknown: 0\)"),
    ],
)
def test_a_commit_without_each_view_once_is_refused(tmp_path: Path, rows: list[TokenRow], message: str):
    inputs = write_corpus(tmp_path / "in", (4, 2))
    output = Output.create(str(tmp_path / "out"), layout(views=VIEWS), ShardList(inputs), config={})
    with pytest.raises(ValueError, match=message):
        commit_shard(output, inputs[1], rows, [], {}, now=1.0, num_samples=2)
    assert output.commits() == []


# -- verify and retries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_correct_output_has_no_problems(output: Output, deep: bool):
    proof = verify(output, deep=deep)
    assert (proof.problems, proof.notes) == ([], [])  # the views of a sample are no repeated keys


def without_row(table: pa.Table, row: int) -> pa.Table:
    return pa.concat_tables([table[:row], table[row + 1 :]])


@pytest.mark.parametrize(
    ("change", "deep", "message"),
    [
        (lambda table: without_row(table, 4), False, "8 rows, the manifest says 9"),
        (lambda table: without_row(table, 4), True, "sample 2 has 0, 2; lost or doubled"),
        (lambda table: pa.concat_tables([table[:5], table[4:]]), False, "10 rows, the manifest says 9"),
        (lambda table: pa.concat_tables([table[:5], table[4:]]), True, "sample 2 has 0, 1, 1, 2; lost or doubled"),
        # as many rows as before
        (lambda table: pa.concat_tables([table[:5], table[4:5], table[6:]]), True, "sample 2 has 0, 1, 1; lost"),
        (lambda table: pa.concat_tables([table[:1], table[:1], table[2:]]), True, "sample 0 has 0, 0, 2; lost"),
    ],
)
def test_verify_finds_a_missing_and_a_doubled_view(
    output: Output, change: Callable[[pa.Table], pa.Table], deep: bool, message: str
):
    forge(output, change)
    proof = verify(output, deep=deep)
    assert any(message in problem for problem in proof.problems), proof.problems


def test_a_wrong_count_of_rows_in_an_entry_is_found(output: Output):
    path = Path(output.entry_url(first(output).name))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_rows": 8}))
    assert any("8 rows and 1 quarantined are not 4 samples in 3 views each" in p for p in verify(output).problems)


def test_a_repair_removes_the_shard_with_the_missing_view_and_its_commit_makes_it_again(output: Output):
    intact = Path(output.tokens_url(first(output).name)).read_bytes()
    forge(output, lambda table: without_row(table, 4))
    removals = plan_repair(output, verify(output, level=FILES))
    assert [removal.what for removal in removals] == [f"shard {first(output).name}"]
    for removal in removals:
        removal.remove()
    bad = [quarantined(first(output), 1)]
    commit_shard(output, first(output), view_rows(0, [0, 2, 3]), bad, {}, now=2.0, num_samples=4)
    assert Path(output.tokens_url(first(output).name)).read_bytes() == intact
    assert verify(output, deep=True).problems == []


def test_a_retry_adds_every_view_of_a_sample(output: Output):
    history = output.committed_shard(first(output).name)
    assert history is not None
    entry = commit_retry(output, first(output), history, view_rows(0, [1]), [], {}, now=2.0)
    assert entry is not None
    assert (entry.num_samples, entry.num_rows, entry.settled) == (1, 3, [1])
    assert verify(output).problems == []
    assert verify(output, deep=True).problems == []


def test_a_retry_keeps_the_whole_samples_of_a_retry_that_died(output: Output):
    history = output.committed_shard(first(output).name)
    assert history is not None
    entry = commit_retry(output, first(output), history, view_rows(0, [1]), [], {}, now=2.0)
    assert entry is not None
    Path(output.entry_url(entry.name)).unlink()  # killed before its commit
    left = Path(output.tokens_url(entry.name)).read_bytes()
    again = commit_retry(output, first(output), history, view_rows(0, [1]), [], {}, now=9.0)
    assert again is not None
    assert (again.num_rows, Path(output.tokens_url(entry.name)).read_bytes()) == (3, left)


def test_row_groups_may_end_within_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.tokens.schema.ROWS_PER_GROUP", 4)
    inputs = write_corpus(tmp_path / "in", (4,))
    output = Output.create(str(tmp_path / "out"), layout(views=VIEWS), ShardList(inputs), config={})
    commit_shard(output, inputs[0], view_rows(0, [0, 1, 2, 3]), [], {}, now=1.0, num_samples=4)
    assert pq.read_metadata(output.tokens_url(inputs[0].name)).num_row_groups == 3
    assert verify(output).problems == []


# -- readers --------------------------------------------------------------------------------------------------------


def test_readers_get_the_view_as_a_column_and_find_the_rows_of_a_key(output: Output):
    dataset = TokenDataset(output.url, columns=("view",))
    assert [(row["key"], row["view"]) for row in dataset] == [
        (key, view) for key in ("0000", "0002", "0003", "0100", "0101") for view in (0, 1, 2)
    ]
    assert [dataset.find("0003", view) for view in (0, 1, 2)] == [6, 7, 8]
    assert dataset[dataset.find("0101", 2)]["tokens"].tolist() == [[12, 12], [12, 12]]
    with pytest.raises(ValueError, match="view is 3; each sample has 3 rows"):
        dataset.find("0003", 3)
