"""Files and tables to shards, and back: nothing is lost, changed or renamed on the way."""

import base64
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import webdataset

from jobs.__main__ import main
from pipeline.corpus.samples import read_samples
from tests.corpus import encoded, picture

PICTURES = {f"p{i}": encoded(picture(seed=i), "jpeg") for i in range(5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures in two folders, with a caption each, and one file in capitals."""
    for i, (key, data) in enumerate(PICTURES.items()):
        place = tmp_path / "source" / ("a" if i < 3 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{key}.jpg").write_bytes(data)
        (place / f"{key}.txt").write_text(f"caption of {key}")
    (tmp_path / "source/a/p0.JSON").write_text("{}")
    return tmp_path / "source"


def pack(source: Path, target: Path, *more: str) -> int:
    return main(
        ["pack", f"pack.source={source}", f"pack.shards={target}/s-%03d.tar", "pack.samples_per_shard=2", *more]
    )


def packed(target: Path) -> dict[str, dict[str, bytes]]:
    """Key to members, over all shards."""
    samples = [sample for file in sorted(target.glob("*.tar")) for sample in read_samples(str(file))]
    assert all(sample.quarantine_reason is None for sample in samples)
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample.members for sample in samples}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    [line] = capsys.readouterr().err.splitlines()
    return line


# -- a folder -----------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_file_by_file(folder: Path, tmp_path: Path):
    assert pack(folder, tmp_path / "out") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["s-000.tar", "s-001.tar", "s-002.tar"]
    found = packed(tmp_path / "out")
    assert set(found) == {"a/p0", "a/p1", "a/p2", "b/c/p3", "b/c/p4"}
    for key, members in found.items():
        name = key.rsplit("/", 1)[1]
        assert members["jpg"] == PICTURES[name]
        assert members["txt"] == f"caption of {name}".encode()
    assert set(found["a/p0"]) == {"jpg", "txt", "json"}


def test_webdatasets_own_reader_finds_the_same(folder: Path, tmp_path: Path):
    pack(folder, tmp_path / "out")
    shards = [str(file) for file in sorted((tmp_path / "out").glob("*.tar"))]
    theirs = {sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)}
    ours = packed(tmp_path / "out")
    assert set(theirs) == set(ours)
    for key, members in ours.items():
        assert {name: theirs[key][name] for name in members} == members


def test_packing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path):
    for name in ("one", "two"):
        pack(folder, tmp_path / name, "pack.shuffle_seed=3")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_shuffling_changes_the_order_alone(folder: Path, tmp_path: Path):
    pack(folder, tmp_path / "plain")
    pack(folder, tmp_path / "shuffled", "pack.shuffle_seed=3")
    plain, shuffled = packed(tmp_path / "plain"), packed(tmp_path / "shuffled")
    assert list(plain) == sorted(plain) != list(shuffled)
    assert plain == shuffled


def test_an_existing_shard_is_refused_and_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/s-000.tar").write_bytes(b"mine")
    assert pack(folder, tmp_path / "out") == 2
    assert "s-000.tar already exists" in error_line(capsys)
    assert (tmp_path / "out/s-000.tar").read_bytes() == b"mine"


def test_a_file_without_an_extension_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "README").write_text("?")
    assert pack(folder, tmp_path / "out") == 2
    assert f"{folder}/README is not named KEY.EXTENSION" in error_line(capsys)


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert pack(tmp_path / "empty", tmp_path / "out") == 2
    assert "holds no samples" in error_line(capsys)


def test_two_files_that_would_be_one_member_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "a/p0.JPG").write_bytes(b"another picture of the same name")
    assert pack(folder, tmp_path / "out") == 2
    assert "p0" in error_line(capsys)


# -- tables -------------------------------------------------------------------------------------------------------


def table(**columns: list) -> pa.Table:
    return pa.table({"key": list(PICTURES), "jpg": list(PICTURES.values()), **columns})


def test_a_parquet_file_of_bytes_comes_back(tmp_path: Path):
    pq.write_table(table(cls=[0, 1, 2, 3, None], txt=["é", "b", "c", "d", "e"]), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert {key: members["jpg"] for key, members in found.items()} == PICTURES
    assert [members.get("cls") for members in found.values()] == [b"0", b"1", b"2", b"3", None]
    assert found["p0"]["txt"] == "é".encode()


def test_a_csv_file_with_base64_comes_back(tmp_path: Path):
    coded = [base64.b64encode(data).decode() for data in PICTURES.values()]
    pyarrow.csv.write_csv(pa.table({"key": list(PICTURES), "jpg": coded, "cls": [1, 2, 3, 4, 5]}), tmp_path / "t.csv")
    assert pack(tmp_path / "t.csv", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert {key: members["jpg"] for key, members in found.items()} == PICTURES
    assert [members["cls"] for members in found.values()] == [b"1", b"2", b"3", b"4", b"5"]


def test_text_in_a_csv_file_stays_as_it_is_written(tmp_path: Path):
    (tmp_path / "t.csv").write_text("key,txt,cls\n0001,1.50,007\n0002,true,2020-01-01\n0003,NA,1e3\n")
    assert pack(tmp_path / "t.csv", tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {
        "0001": {"txt": b"1.50", "cls": b"007"},
        "0002": {"txt": b"true", "cls": b"2020-01-01"},
        "0003": {"txt": b"NA", "cls": b"1e3"},
    }


def test_rows_without_a_key_column_are_numbered(tmp_path: Path):
    pq.write_table(table().drop_columns("key"), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "out")
    assert list(packed(tmp_path / "out")) == [f"{i:09d}" for i in range(5)]


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pq.write_table(pa.concat_tables([table(), table().slice(1, 1)]), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "key 'p1' occurs twice" in error_line(capsys)


@pytest.mark.parametrize("key", ["a.001", "photo.jpg", ".hidden", "", "a/.b", "folder/"])
def test_a_key_that_no_file_can_have_is_refused(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]):
    """A reader would take the part after the first dot as the extension, and samples would be merged."""
    pq.write_table(pa.table({"key": [key, "b"], "jpg": list(PICTURES.values())[:2]}), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert repr(key) in error_line(capsys)


def test_a_nested_column_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Hugging Face datasets store pictures as {bytes, path}. Converted to text, this would not be a picture."""
    pq.write_table(pa.table({"jpg": [{"bytes": PICTURES["p0"], "path": None}]}), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "flatten the column" in error_line(capsys)


def test_base64_that_is_none_is_reported_with_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.csv").write_text("key,jpg\na,no base64!\n")
    assert pack(tmp_path / "t.csv", tmp_path / "out") == 2
    assert "'a'" in error_line(capsys)
