"""Parquet and CSV files to shards, and back."""

import base64
import io
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import soundfile

from jobs.__main__ import main
from jobs.config import ConfigError
from jobs.packing.media import Media
from jobs.packing.table import table_samples
from jobs.packing.tally import Tally
from pipeline import storage
from pipeline.corpus.samples import read_samples
from tests.faults.proxy import start_proxy
from tests.jobs.packs import PICTURES, logged, pack, packed
from tests.pipeline.test_s3 import overwriting
from tests.s3 import S3Server

KEYS, JPEGS = list(PICTURES), list(PICTURES.values())
PICTURE = JPEGS[0]


def table(**columns: list) -> pa.Table:
    return pa.table({"key": KEYS, "jpg": JPEGS, **columns})


def parquet(folder: Path, columns: dict[str, Any] | pa.Table, name: str = "t") -> Path:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def csv(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def in_base64(data: bytes = PICTURE) -> str:
    return base64.b64encode(data).decode()


# -- Parquet ------------------------------------------------------------------------------------------------------


def test_a_parquet_file_of_bytes_comes_back(tmp_path: Path):
    source = parquet(tmp_path, table(cls=[0, 1, 2, 3, None], txt=["é", "b", "c", "d", "e"]))
    assert pack(source, tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert {key: members["jpg"] for key, members in found.items()} == PICTURES
    assert [members.get("cls") for members in found.values()] == [b"0", b"1", b"2", b"3", None]
    assert found["p0"]["txt"] == "é".encode()


def test_several_processes_write_the_same_shards(tmp_path: Path):
    source = parquet(tmp_path, table())
    for workers in (1, 2):
        assert pack(source, tmp_path / str(workers), f"pack.workers={workers}") == 0
    shards = [{f.name: f.read_bytes() for f in (tmp_path / workers).iterdir()} for workers in ("1", "2")]
    assert len(shards[0]) == 3
    assert shards[0] == shards[1]


def test_pictures_as_hugging_face_stores_them(tmp_path: Path):
    """{bytes, path}: the path may be empty, and the column has no name of a format."""
    pictures = [{"bytes": PICTURE, "path": "x.jpeg"}, {"bytes": PICTURE, "path": None}, {"bytes": b"", "path": None}]
    assert pack(parquet(tmp_path, {"image": pictures, "label": [3, 4, 5]}), tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {
        "000000000": {"jpg": PICTURE, "label": b"3"},
        "000000001": {"jpg": PICTURE, "label": b"4"},
    }


def test_hugging_faces_export_of_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = parquet(tmp_path, {"__key__": ["s1", "a/s2"], "__url__": ["u", "u"], "jpg": JPEGS[:2], "_id": ["x", "y"]})
    assert pack(source, tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {
        "s1": {"jpg": JPEGS[0], "_id": b"x"},
        "a/s2": {"jpg": JPEGS[1], "_id": b"y"},
    }
    assert "one that webdataset reserves: 1, such as '__url__'" in capsys.readouterr().out


def test_recordings_in_a_parquet_file(tmp_path: Path):
    out = io.BytesIO()
    soundfile.write(out, np.zeros(800, np.float32), 16000, format="FLAC")
    source = parquet(tmp_path, {"audio": [{"bytes": out.getvalue(), "path": None}]})
    assert pack(source, tmp_path / "out", "model.modality=audio") == 0
    assert packed(tmp_path / "out") == {"000000000": {"flac": out.getvalue()}}


def test_several_pictures_in_a_row_keep_the_names_of_their_columns(tmp_path: Path):
    assert pack(parquet(tmp_path, {"left": JPEGS[:2], "right": JPEGS[1:3]}), tmp_path / "out") == 0
    assert packed(tmp_path / "out")["000000000"] == {"left.jpg": JPEGS[0], "right.jpg": JPEGS[1]}


def test_lists_and_structs_become_json(tmp_path: Path):
    columns = {"jpg": JPEGS[:1], "boxes": [[[1, 2], [3, 4]]], "price": [{"usd": Decimal("1.50")}]}
    assert pack(parquet(tmp_path, columns), tmp_path / "out") == 0
    assert packed(tmp_path / "out")["000000000"] == {
        "jpg": PICTURE,
        "boxes.json": b"[[1, 2], [3, 4]]",
        "price.json": b'{"usd": "1.50"}',
    }


def test_bytes_inside_a_list_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(parquet(tmp_path, {"jpg": JPEGS[:1], "pages": [JPEGS[:2]]}), tmp_path / "out") == 2
    assert "column 'pages' has bytes inside a list" in logged(capsys)


def test_columns_in_capitals_become_members_in_lower_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(parquet(tmp_path, {"key": ["a"], "JPG": [PICTURE], "TXT": ["x"]}), tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {"a": {"jpg": PICTURE, "txt": b"x"}}
    clash = parquet(tmp_path, {"jpg": [PICTURE], "TXT": ["x"], "txt": ["y"]})
    assert pack(clash, tmp_path / "other") == 2
    assert "two columns would become the member 'txt'" in logged(capsys)


def test_rows_without_a_picture_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        pack(parquet(tmp_path, {"key": ["a", "b"], "jpg": [PICTURE, None], "txt": ["x", "y"]}), tmp_path / "out") == 0
    )
    assert set(packed(tmp_path / "out")) == {"a"}
    skipped, summary = capsys.readouterr().out.splitlines()
    assert skipped == "pack: skipped rows without image data: 1, such as b"
    assert summary.startswith("pack: 1 samples in 1 shards")


def test_rows_without_a_key_column_are_numbered_over_all_files(tmp_path: Path):
    for name in ("train-0", "train-1"):
        parquet(tmp_path, {"image": JPEGS[:3]}, name)
    assert pack(f"{tmp_path}/train-*.parquet", tmp_path / "out") == 0
    assert list(packed(tmp_path / "out")) == [f"{i:09d}" for i in range(6)]


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(parquet(tmp_path, pa.concat_tables([table(), table().slice(1, 1)])), tmp_path / "out") == 2
    assert "key 'p1' occurs twice" in logged(capsys)


@pytest.mark.parametrize(("key", "stored"), [("a.001", "a%2E001"), ("x/photo.jpg", "x/photo%2Ejpg"), (7, "7")])
def test_dots_in_a_key_are_encoded(tmp_path: Path, key: str | int, stored: str):
    assert pack(parquet(tmp_path, {"key": [key], "jpg": [PICTURE]}), tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {stored: {"jpg": PICTURE}}


@pytest.mark.parametrize("key", ["", "folder/", "/a", "../a", None])
def test_a_key_that_no_file_can_have_is_refused(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]):
    source = parquet(tmp_path, {"key": pa.array([key, "b"], pa.string()), "jpg": JPEGS[:2]})
    assert pack(source, tmp_path / "out") == 2
    assert f"row 0, key {str(key)!r}" in logged(capsys)


def test_a_table_without_a_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(parquet(tmp_path, {"key": ["a"], "caption": ["x"], "emb": [[0.1]]}), tmp_path / "out") == 2
    line = logged(capsys)
    assert "no column holds image data; its columns: 'key', 'caption', 'emb'" in line
    assert not (tmp_path / "out").exists()


def test_a_table_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = parquet(tmp_path, {"jpg": pa.array([], pa.binary())})
    assert pack(source, tmp_path / "out") == 2
    assert "holds no samples" in logged(capsys)


def test_damaged_parquet_files_are_named(tmp_path: Path):
    """Three bytes of each file are changed: anywhere, or near its end, which describes the rest."""
    pq.write_table(table(txt=KEYS), tmp_path / "whole.parquet", write_page_checksum=True)
    whole, rng = (tmp_path / "whole.parquet").read_bytes(), random.Random(0)
    messages = []
    for i in range(200):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(len(data) - 1500 if i % 2 else 0, len(data))] ^= rng.randrange(1, 256)
        (tmp_path / "t.parquet").write_bytes(data)
        try:
            list(table_samples([f"{tmp_path}/t.parquet"], Media("image", ("jpg",)), Tally()))
        except ConfigError as error:
            messages.append(str(error))
    assert len(messages) > 100  # some bytes describe nothing that is needed
    assert all("t.parquet" in message and "\n" not in message for message in messages)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.parquet").write_bytes(PICTURE)
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "t.parquet cannot be read as Parquet" in logged(capsys)


# -- CSV ----------------------------------------------------------------------------------------------------------


def test_a_csv_file_with_base64_comes_back(tmp_path: Path):
    coded = [in_base64(data) for data in JPEGS]
    pyarrow.csv.write_csv(pa.table({"key": KEYS, "jpg": coded, "cls": [1, 2, 3, 4, 5]}), tmp_path / "t.csv")
    assert pack(tmp_path / "t.csv", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert {key: members["jpg"] for key, members in found.items()} == PICTURES
    assert [members["cls"] for members in found.values()] == [b"1", b"2", b"3", b"4", b"5"]


def test_base64_of_megabytes_comes_back(tmp_path: Path):
    large = PICTURE + bytes(3_000_000)
    assert pack(csv(tmp_path, f"key,image\na,{in_base64(large)}\nb,{in_base64()}\n"), tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {"a": {"jpg": large}, "b": {"jpg": PICTURE}}


def test_a_csv_file_of_paths_takes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Paths start at the table's folder. The text of another column is not taken for one."""
    (tmp_path / "photos").mkdir()
    for key, data in PICTURES.items():
        (tmp_path / f"photos/{key}.jpg").write_bytes(data)
    rows = f"photos/gone.jpg,c\nphotos/p0.jpg,as seen on logo.jpg\n{tmp_path}/photos/p1.jpg,b\n"
    assert pack(csv(tmp_path, f"file_name,caption\n{rows}"), tmp_path / "out", "pack.workers=2") == 0
    assert packed(tmp_path / "out") == {
        "000000001": {"jpg": JPEGS[0], "caption": b"as seen on logo.jpg"},
        "000000002": {"jpg": JPEGS[1], "caption": b"b"},
    }
    assert "skipped rows whose file does not exist: 1, such as" in capsys.readouterr().out


def test_paths_that_do_not_exist_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(csv(tmp_path, "path,caption\nphotos/a.jpg,x\n"), tmp_path / "out") == 2
    assert "No file 'photos/a.jpg' was found; paths start at the table's folder" in logged(capsys)


def test_web_addresses_are_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(csv(tmp_path, "key,jpg\na,https://example.org/a.jpg\n"), tmp_path / "out") == 2
    assert "download the files first" in logged(capsys)
    beside = csv(tmp_path, f"key,url,jpg\na,https://example.org/a.jpg,{in_base64()}\n")
    assert pack(beside, tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {"a": {"jpg": PICTURE, "url": b"https://example.org/a.jpg"}}


def test_text_in_a_csv_file_stays_as_it_is_written(tmp_path: Path):
    rows = [f"000{i},{in_base64()},{text}" for i, text in enumerate(['1.50,007,"two\nlines, a comma"', "NA,1e3,"])]
    assert pack(csv(tmp_path, "\n".join(["key,jpg,txt,cls,note", *rows])), tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {
        "0000": {"jpg": PICTURE, "txt": b"1.50", "cls": b"007", "note": b"two\nlines, a comma"},
        "0001": {"jpg": PICTURE, "txt": b"NA", "cls": b"1e3", "note": b""},
    }


def test_csv_files_as_spreadsheets_and_pandas_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A byte order mark, tabs, and an index column without a name."""
    source = csv(tmp_path, f"\ufeffkey\t\tjpg\na\t0\tdata:image/jpeg;base64,{in_base64()}\n", "t.tsv")
    assert pack(source, tmp_path / "out") == 0
    assert packed(tmp_path / "out") == {"a": {"jpg": PICTURE}}
    assert "skipped columns without a name" in capsys.readouterr().out


def test_text_that_is_not_base64_is_named_with_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(csv(tmp_path, "key,jpg\na,no base64!\n"), tmp_path / "out") == 2
    assert "key 'a': 'no base64!' is neither base64 nor the path" in logged(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,jpg\na,b,c\n", "line 2: 3 cells, but the first line names 2 columns"),
        ("key,jpg\na\n", "line 2: 1 cells, but the first line names 2 columns"),
        ('key,jpg\na,"b\nc,d\n', "cannot be read as CSV after line 3: unexpected end of data"),
        ("key,jpg,jpg\na,b,c\n", "several columns with the name 'jpg'"),
        ("", "no column holds image data; its columns: none"),
    ],
)
def test_a_broken_csv_file_is_refused(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert pack(csv(tmp_path, text), tmp_path / "out") == 2
    assert message in logged(capsys)


def test_csv_in_another_encoding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.csv").write_bytes(f"key,jpg\ncaf\xe9,{in_base64()}\n".encode("latin-1"))
    assert pack(tmp_path / "t.csv", tmp_path / "out") == 2
    assert "save it as CSV in UTF-8" in logged(capsys)


# -- object storage -----------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_a_password_of_a_url_reaches_every_process(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    s3.use(monkeypatch)
    key, secret = s3.read_write
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(fsspec.config, "conf", {})
    place = f"s3://{key}:{secret}@{s3.bucket}/pack-with-password"
    assert (
        main(
            [
                "pack",
                f"pack.source={parquet(tmp_path, table())}",
                f"pack.shards={place}/s-%d.tar",
                "pack.workers=2",
                "pack.samples_per_shard=1",
            ]
        )
        == 0
    )
    assert secret not in "".join(capsys.readouterr())


@pytest.mark.s3
def test_a_table_and_its_files_in_s3_are_packed_there(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    s3.use(monkeypatch)
    folder = storage.join(s3.url, "pack")
    for key, data in PICTURES.items():
        storage.write_once(f"{folder}/photos/{key}.jpg", data)
    rows = "".join(f"{key},photos/{key}.jpg\n" for key in KEYS)
    storage.write_once(f"{folder}/t.csv", f"key,path\n{rows}x,{folder}/gone.jpg\n".encode())
    settings = [f"pack.source={folder}/t.csv", f"pack.shards={folder}/s-%d.tar", "pack.samples_per_shard=2"]
    for _ in range(2):  # a rerun keeps the shards
        assert main(["pack", *settings, "pack.workers=2"]) == 0
    assert "skipped rows whose file does not exist: 1" in capsys.readouterr().out
    shards = [file.url for file in storage.glob(f"{folder}/s-*.tar")]
    assert {sample.key: sample.members["jpg"] for url in shards for sample in read_samples(url)} == PICTURES
    assert len(shards) == 3


@pytest.mark.s3
def test_a_server_that_would_overwrite_shards_is_refused(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = [f"pack.source={parquet(tmp_path, table())}", f"pack.shards={s3.url}/refused/s-%d.tar"]
    with start_proxy(s3.port) as proxy:
        proxy.plan = overwriting(s3)
        s3.use(monkeypatch, endpoint=proxy.endpoint)
        assert main(["pack", *settings]) == 2
    assert "the server overwrites objects" in logged(capsys)
