"""Exports: each format is read by the library it is for, and holds every row and token in order.

litdata and streaming are not among our extras: they need a torchvision that fits torch, and streaming an older numpy.
Where they are not installed, only readers written here after the published layouts read these formats.
"""

import ast
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset

from jobs.__main__ import main
from jobs.config.schema import ExportConfig
from jobs.exporting.folder import ExportFolder
from jobs.exporting.format import FORMATS
from jobs.exporting.parts import write_parts
from jobs.exporting.plan import Plan
from pipeline import storage
from pipeline.corpus.shards import ShardList
from pipeline.tokens import Output, TokenRow, commit_shard
from pipeline.tokens.views import Views
from tests.corpus import layout, quarantined, write_corpus, write_tokens
from tests.jobs.packs import logged
from tests.s3 import S3Server

SIZES = (5, 0, 7, 3)
Row = tuple[str, np.ndarray]
SHAPES = {"image": [(2, 3), (1, 1), (300, 2)], "residual": [(4, 7), (4, 1)], "flat": [(9,), (1,), (70_000,)]}


def export(output: Output | str, kind: str, to: Path | str, *more: str) -> int:
    url = output if isinstance(output, str) else output.url
    return main(["export", f"output={url}", f"export.format={kind}", f"export.to={to}", "export.workers=1", *more])


def stored(output: Output) -> list[Row]:
    """Every row as Parquet holds it, in the order of the commits, without our reader."""
    rows: list[Row] = []
    for entry in output.commits():
        table = pa.parquet.read_table(output.tokens_url(entry.name))
        for row in table.to_pylist():
            dtype = output.layout.token_dtype
            tokens = row["tokens"]
            flat = np.frombuffer(tokens, dtype) if isinstance(tokens, bytes) else np.array(tokens, dtype)
            rows.append((row["key"], flat.reshape(row["shape"])))
    return rows


def ragged(folder: Path, kind: str, codebook_size: int, encoding: str) -> Output:
    """Two shards of grids of several sizes. The largest token occurs."""
    inputs = write_corpus(folder / "in", (3, 2))
    made = layout(codebook_size=codebook_size, encoding=encoding)
    output = Output.create(str(folder / "out"), made, ShardList(inputs), config={})
    shapes = itertools.cycle(SHAPES[kind])
    for shard, count, start in zip(inputs, (3, 2), (0, 100), strict=True):
        rows = [_random(f"{start + i:04d}", i, next(shapes), codebook_size) for i in range(count)]
        commit_shard(output, shard, rows, [], seconds={}, now=0.0)
    return output


def _random(key: str, index: int, shape: tuple[int, ...], codebook_size: int) -> TokenRow:
    tokens = np.random.default_rng([index, *key.encode()]).integers(codebook_size, size=shape)
    tokens.reshape(-1)[0] = codebook_size - 1
    return TokenRow(key, index, tokens, {"height": 8, "width": 8})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("export"), SIZES, passthrough=("txt",))


# -- readers --------------------------------------------------------------------------------------------------------


def by_nanogpt(folder: Path, dtype: str = "uint16") -> np.ndarray:
    """As get_batch in nanoGPT's train.py opens it."""
    return np.memmap(folder / "train.bin", dtype=dtype, mode="r")


MEGATRON = """
import sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
dataset = IndexedDataset(sys.argv[1], mmap=True)
print(([dataset[i].tolist() for i in range(len(dataset))], dataset.document_indices.tolist(), dataset[0].dtype.name))
"""


def by_megatron(folder: Path) -> tuple[list[list[int]], list[int], str]:
    """Tokens, documents and dtype, as megatron-core reads them, in its own process: importing it changes torch."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed; the extra `readers` has it")
    command = [sys.executable, "-W", "ignore", "-c", MEGATRON, str(folder / "tokens")]
    return ast.literal_eval(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def by_idx_layout(folder: Path) -> list[np.ndarray]:
    """An independent reader of the MMIDIDX layout."""
    index, data = (folder / "tokens.idx").read_bytes(), (folder / "tokens.bin").read_bytes()
    magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version, documents) == (b"MMIDIDX\x00\x00", 1, sequences + 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    assert np.frombuffer(index, "<i8", documents, 34 + 12 * sequences).tolist() == list(range(documents))
    assert len(index) == 34 + 12 * sequences + 8 * documents
    dtype = {8: "<u2", 4: "<i4"}[code]
    return [np.frombuffer(data, dtype, n, start) for n, start in zip(lengths, pointers, strict=True)]


def items(data: bytes) -> Iterator[bytes]:
    """The items of a litdata chunk or an MDS shard."""
    count = int(np.frombuffer(data, "<u4", 1)[0])
    offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
    assert offsets[-1] == len(data)
    yield from (data[start:stop] for start, stop in itertools.pairwise(offsets))


def fields(item: bytes) -> tuple[str, bytes]:
    """The key, and the bytes of the tokens."""
    key, tokens = np.frombuffer(item, "<u4", 2).tolist()
    assert len(item) == 8 + key + tokens
    return item[8 : 8 + key].decode(), item[8 + key :]


def by_chunk_layout(folder: Path) -> Iterator[Row]:
    """An independent reader of litdata's chunks."""
    for chunk in json.loads((folder / "index.json").read_text())["chunks"]:
        data = (folder / chunk["filename"]).read_bytes()
        assert (chunk["chunk_bytes"], chunk["chunk_size"]) == (len(data), len(list(items(data))))
        for key, tokens in map(fields, items(data)):
            dtype, ndim = np.frombuffer(tokens, "<u4", 2).tolist()
            shape = np.frombuffer(tokens, "<u4", ndim, 8)
            kind = {4: "uint8", 5: "uint16", 6: "uint32"}[dtype]
            yield key, np.frombuffer(tokens, kind, offset=8 + 4 * ndim).reshape(shape)


def by_litdata(folder: Path) -> Iterator[Row]:
    litdata = pytest.importorskip("litdata")
    dataset = litdata.StreamingDataset(str(folder), shuffle=False)
    yield from ((item["key"], item["tokens"]) for item in map(dataset.__getitem__, range(len(dataset))))


def by_shard_layout(folder: Path) -> Iterator[Row]:
    """An independent reader of MDS."""
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert (shard["raw_data"]["bytes"], shard["samples"]) == (len(data), len(list(items(data))))
        dtype = shard["column_encodings"][1].removeprefix("ndarray:")
        for key, tokens in map(fields, items(data)):
            ndim, side = tokens[0] >> 2, ("<u1", "<u2", "<u4")[tokens[0] & 3]
            shape = np.frombuffer(tokens, side, ndim, 1)
            yield key, np.frombuffer(tokens, dtype, offset=1 + shape.nbytes).reshape(shape)


def by_streaming(folder: Path) -> Iterator[Row]:
    streaming = pytest.importorskip("streaming")
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    yield from ((sample["key"], sample["tokens"]) for sample in map(dataset.__getitem__, range(len(dataset))))


def by_webdataset(folder: Path) -> Iterator[Row]:
    shards = [str(file) for file in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        assert sample["json"]["shape"] == list(sample["tokens.npy"].shape)
        yield sample["__key__"], sample["tokens.npy"]


def by_datasets(folder: Path) -> Iterator[Row]:
    from datasets import Dataset

    for file in sorted(folder.glob("*.arrow")):
        dataset = Dataset.from_file(str(file))
        dtype = dataset.features["tokens"].feature.dtype
        yield from ((row["key"], np.array(row["tokens"], dtype).reshape(row["shape"])) for row in dataset)


GRIDS: dict[str, list[Callable[[Path], Iterator[Row]]]] = {
    "litdata": [by_chunk_layout, by_litdata],
    "mds": [by_shard_layout, by_streaming],
    "webdataset": [by_webdataset],
    "arrow": [by_datasets],
}
READERS = [(kind, reader) for kind, readers in GRIDS.items() for reader in readers]


def assert_same(found: list[Row], expected: list[Row]) -> None:
    assert [key for key, _ in found] == [key for key, _ in expected]
    for (_, tokens), (_, wanted) in zip(found, expected, strict=True):
        assert tokens.dtype == wanted.dtype
        assert tokens.shape == wanted.shape
        assert np.array_equal(tokens, wanted)


# -- rows and tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reader"), READERS)
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_a_library_reads_every_row_in_order(output: Output, tmp_path: Path, kind: str, reader: Callable):
    assert export(output, kind, tmp_path / "to") == 0
    assert_same(list(reader(tmp_path / "to")), stored(output))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("codebook_size", "encoding"), [(256, "list"), (65_536, "packed"), (65_537, "list")])
def test_shapes_and_dtypes_survive_every_format(tmp_path: Path, kind: str, codebook_size: int, encoding: str):
    output = ragged(tmp_path, kind, codebook_size, encoding)
    expected = stored(output)
    for name, (reader, *_) in GRIDS.items():
        assert export(output, name, tmp_path / name) == 0
        assert_same(list(reader(tmp_path / name)), expected)
    tokens = np.concatenate([grid.reshape(-1) for _, grid in expected])
    wide = codebook_size > 65_536
    assert export(output, "nanogpt", tmp_path / "nanogpt") == export(output, "megatron", tmp_path / "megatron") == 0
    assert np.array_equal(by_nanogpt(tmp_path / "nanogpt", "uint32" if wide else "uint16"), tokens)
    sequences = by_idx_layout(tmp_path / "megatron")
    assert sequences[0].dtype == ("int32" if wide else "uint16")
    assert [s.tolist() for s in sequences] == [grid.reshape(-1).tolist() for _, grid in expected]


@pytest.mark.parametrize(("bos", "eos"), [(-1, 1034), (1034, -1), (1034, 1035)])
def test_rows_have_begin_and_end_tokens_and_an_offset(output: Output, tmp_path: Path, bos: int, eos: int):
    marks = [f"export.bos={bos}", f"export.eos={eos}", "export.offset=10"]
    expected = [
        [*([bos] if bos >= 0 else []), *(grid.reshape(-1).astype(int) + 10), *([eos] if eos >= 0 else [])]
        for _, grid in stored(output)
    ]
    assert export(output, "nanogpt", tmp_path / "gpt", *marks) == 0
    assert by_nanogpt(tmp_path / "gpt").tolist() == list(itertools.chain(*expected))
    assert pickle.loads((tmp_path / "gpt/meta.pkl").read_bytes()) == {"vocab_size": max(bos, eos) + 1}
    assert export(output, "megatron", tmp_path / "megatron", *marks) == 0
    assert [sequence.tolist() for sequence in by_idx_layout(tmp_path / "megatron")] == expected


def test_megatron_reads_every_document(output: Output, tmp_path: Path):
    assert export(output, "megatron", tmp_path / "to") == 0
    expected = [grid.reshape(-1).tolist() for _, grid in stored(output)]
    assert by_megatron(tmp_path / "to") == (expected, list(range(len(expected) + 1)), "uint16")


def test_other_columns_come_along_in_arrow_and_webdataset(output: Output, tmp_path: Path):
    export(output, "arrow", tmp_path / "arrow")
    export(output, "webdataset", tmp_path / "tars")
    [first, *_] = sorted((tmp_path / "arrow").glob("*.arrow"))
    columns = pa.ipc.open_stream(first.read_bytes()).read_all().drop_columns("tokens").to_pylist()[0]
    shards = [str(file) for file in sorted((tmp_path / "tars").glob("*.tar"))]
    assert next(iter(webdataset.WebDataset(shards, shardshuffle=False).decode()))["json"] == columns
    assert set(columns) == set(output.layout.schema("").names) - {"tokens"}


@pytest.fixture(scope="module")
def with_views(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """2 samples of 3 views."""
    folder = tmp_path_factory.mktemp("views")
    [shard] = write_corpus(folder / "in", (2,))
    made = layout(views=Views(count=3, crop=8, flip=False, seed=0))
    output = Output.create(str(folder / "out"), made, ShardList([shard]), config={})
    rows = [replace(_random(f"{i:04d}", i, (2, 2 + view), 1024), view=view) for i in range(2) for view in range(3)]
    commit_shard(output, shard, rows, [], seconds={}, now=0.0)
    return output


VIEWS = [("0000", 0), ("0000", 1), ("0000", 2), ("0001", 0), ("0001", 1), ("0001", 2)]


def test_views_come_along_in_arrow_and_webdataset(with_views: Output, tmp_path: Path):
    export(with_views, "arrow", tmp_path / "arrow")
    export(with_views, "webdataset", tmp_path / "tars")
    table = pa.ipc.open_stream(next((tmp_path / "arrow").glob("*.arrow")).read_bytes()).read_all()
    assert list(zip(table["key"].to_pylist(), table["view"].to_pylist(), strict=True)) == VIEWS
    shards = [str(file) for file in (tmp_path / "tars").glob("*.tar")]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [(sample["json"]["key"], sample["json"]["view"]) for sample in samples] == VIEWS
    assert [sample["__key__"] for sample in samples] == [f"{key}-view{view}" for key, view in VIEWS]


def test_views_come_along_in_litdata_and_mds(with_views: Output, tmp_path: Path):
    """By their layouts: litdata has a size for each field, MDS for each without a fixed one."""
    for kind, num_sizes, dtype in (("litdata", 3, "<i8"), ("mds", 2, "<i2")):
        export(with_views, kind, tmp_path / kind)
        [file] = [file for file in (tmp_path / kind).iterdir() if file.suffix in (".bin", ".mds")]
        found = []
        for item in items(file.read_bytes()):
            sizes = np.frombuffer(item, "<u4", num_sizes).tolist()
            key, end = item[4 * num_sizes :][: sizes[0]].decode(), 4 * num_sizes + sizes[0] + sizes[1]
            [view] = np.frombuffer(item[end:], dtype).tolist()
            found.append((key, view))
        assert found == VIEWS
    config = json.loads((tmp_path / "litdata/index.json").read_text())["config"]
    assert config["data_format"] == ["str", "numpy", "int"]
    assert json.loads(json.loads(config["data_spec"])[1]["context"]) == ["key", "tokens", "view"]
    [shard] = json.loads((tmp_path / "mds/index.json").read_text())["shards"]
    assert (shard["column_names"], shard["column_sizes"]) == (["key", "tokens", "view"], [None, None, 2])
    assert shard["column_encodings"] == ["str", "ndarray:uint16", "int16"]


@pytest.mark.parametrize(("kind", "name"), [("litdata", "litdata"), ("mds", "streaming")])
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_a_library_reads_views(with_views: Output, tmp_path: Path, kind: str, name: str):
    library = pytest.importorskip(name)
    export(with_views, kind, tmp_path / "to")
    where = (
        {"input_dir": str(tmp_path / "to")} if name == "litdata" else {"local": str(tmp_path / "to"), "batch_size": 1}
    )
    dataset = library.StreamingDataset(**where, shuffle=False)
    assert [(dataset[i]["key"], int(dataset[i]["view"])) for i in range(len(dataset))] == VIEWS


def test_several_processes_write_the_same_bytes(output: Output, tmp_path: Path):
    assert export(output, "megatron", tmp_path / "one") == 0
    assert export(output, "megatron", tmp_path / "two", "export.workers=2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.s3
def test_object_storage_gets_the_same_bytes(output: Output, tmp_path: Path, s3: S3Server, monkeypatch):
    s3.use(monkeypatch)
    for kind in ("nanogpt", "mds"):
        assert export(output, kind, tmp_path / kind) == export(output, kind, f"{s3.url}/{kind}") == 0
        found = {url.rsplit("/", 1)[1]: storage.read(url) for url in storage.list_files(f"{s3.url}/{kind}")}
        assert found == contents(tmp_path / kind)
        assert storage.list_folders(f"{s3.url}/{kind}") == []


# -- export.json, resuming --------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", FORMATS.names())
def test_export_json_counts_rows_and_holds_the_checksum_of_each_file(output: Output, tmp_path: Path, kind: str):
    assert export(output, kind, tmp_path / "to") == 0
    found = contents(tmp_path / "to")
    result = json.loads(found.pop("export.json"))
    assert {name: file["sha256"] for name, file in result["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in found.items()
    }
    tokens = sum(grid.size for _, grid in stored(output))
    assert (result["num_rows"], result["num_tokens"], result["tokenizer_id"]) == (15, tokens, "tok-a")
    assert [part["commit"] for part in result["parts"]] == [e.name for e in output.commits() if e.num_rows]


def test_a_killed_export_continues_and_gives_the_same_bytes(output: Output, tmp_path: Path):
    copy = Path(shutil.copytree(output.url, tmp_path / "out"))
    assert export(str(copy), "webdataset", tmp_path / "whole") == 0
    third = copy / "tokens" / Path(output.tokens_url([e.name for e in output.commits() if e.num_rows][2])).name
    data = third.read_bytes()
    third.unlink()
    os.mkfifo(third)  # the export waits here until it is killed
    settings = [f"output={copy}", "export.format=webdataset", f"export.to={tmp_path / 'to'}", "export.workers=1"]
    process = subprocess.Popen([sys.executable, "-m", "jobs", "export", *settings])
    while not (tmp_path / "to/parts/000001.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    third.unlink()
    third.write_bytes(data)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "to").glob("*.tar")}
    assert sorted(before) == ["tokens-000000.tar", "tokens-000001.tar"]
    assert export(str(copy), "webdataset", tmp_path / "to") == 0
    assert {name: (tmp_path / "to" / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path / "to") == contents(tmp_path / "whole")


def test_a_second_export_is_a_noop(output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export(output, "mds", tmp_path / "to")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "to").iterdir()}
    assert export(output, "mds", tmp_path / "to") == 0
    assert "already complete" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "to").iterdir()} == times


@pytest.mark.parametrize(
    ("kind", "half", "lost", "final"),
    [
        ("mds", "shard.00000.mds", "shard.00001.mds", "shard.00001.mds"),
        ("megatron", "parts/000000.bin", "parts/000001.lengths", "tokens.idx"),
    ],
)
def test_a_damaged_part_is_made_again_and_a_damaged_export_is_named(
    output: Output, tmp_path: Path, capsys, kind: str, half: str, lost: str, final: str
):
    plan = Plan.of(output, FORMATS.get(kind), ExportConfig(format=kind))
    folder = ExportFolder(str(tmp_path / "to"))
    folder.start(plan)
    write_parts(plan, folder, {})
    (tmp_path / "to" / half).write_bytes(b"half")
    (tmp_path / "to" / lost).unlink()
    assert sorted(folder.finished_parts()) == [2]
    assert export(output, kind, tmp_path / "to") == export(output, kind, tmp_path / "whole") == 0
    assert contents(tmp_path / "to") == contents(tmp_path / "whole")
    capsys.readouterr()
    (tmp_path / "to" / final).unlink()
    assert export(output, kind, tmp_path / "to") == 2
    assert f"{final} has no bytes, but export.json says" in logged(capsys)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_configuration_in_the_same_folder_is_refused(output: Output, tmp_path: Path, capsys):
    export(output, "nanogpt", tmp_path / "to")
    before = contents(tmp_path / "to")
    assert export(output, "nanogpt", tmp_path / "to", "export.eos=1024") == 2
    assert "holds another export: eos is -1 there and 1024 here" in logged(capsys)
    assert contents(tmp_path / "to") == before


def test_tokens_of_another_tokenizer_are_refused(output: Output, tmp_path: Path, capsys):
    other = write_tokens(tmp_path / "other", (2,), tokenizer_id="tok-b")
    export(output, "arrow", tmp_path / "to")
    assert export(other, "arrow", tmp_path / "to") == 2
    assert "tokenizer_id is tok-a there and tok-b here" in logged(capsys)
    [entry] = other.commits()
    foreign = next(e for e in output.commits() if e.num_rows)
    about = json.loads(storage.read(other.entry_url(entry.name)))
    storage.replace(other.tokens_url(entry.name), output.read_tokens(foreign.name))
    about |= {"tokens_sha256": foreign.tokens_sha256}
    storage.replace(other.entry_url(entry.name), json.dumps(about).encode())
    assert export(other, "arrow", tmp_path / "mixed") == 2
    assert "was written by tokenizer 'tok-a', not by tok-b" in logged(capsys)


def test_a_damaged_token_file_is_refused(tmp_path: Path, capsys):
    output = write_tokens(tmp_path, (2,))
    [entry] = output.commits()
    data = bytearray(output.read_tokens(entry.name))
    data[20] ^= 1
    storage.replace(output.tokens_url(entry.name), bytes(data))
    assert export(output, "nanogpt", tmp_path / "to") == 2
    assert "its checksum is not the one that was committed" in logged(capsys)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("nanogpt", ("export.dtype=uint16", "export.offset=65000"), "go up to 66023 .* uint16 holds up to 65535"),
        ("megatron", ("export.offset=2147483000",), "go up to 2147484023 .* int32 holds up to 2147483647"),
        ("megatron", ("export.dtype=uint32",), "'uint32'; megatron has: uint16, int32"),
        ("nanogpt", ("export.eos=7",), "also a token of the codebook"),
        ("arrow", ("export.eos=2000",), "export.eos is for flat tokens"),
        ("nanogtp", (), "did you mean 'nanogpt'"),
    ],
)
def test_impossible_settings_are_refused(output: Output, tmp_path: Path, capsys, kind: str, settings, message: str):
    assert export(output, kind, tmp_path / "to", *settings) == 2
    assert re.search(message, logged(capsys))
    assert not (tmp_path / "to").exists()


def test_a_wider_dtype_is_chosen_and_printed(output: Output, tmp_path: Path, capsys):
    assert export(output, "nanogpt", tmp_path / "to", "export.offset=65000") == 0
    assert "tokens go up to 66023, so they are written as uint32" in capsys.readouterr().out
    assert int(by_nanogpt(tmp_path / "to", "uint32").min()) >= 65_000


def test_a_folder_with_other_files_is_refused(output: Output, tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("")
    assert export(output, "mds", tmp_path) == 2
    assert "holds other files" in logged(capsys)
    assert export(output, "mds", output.url) == 2


def test_an_output_without_rows_is_refused(tmp_path: Path, capsys):
    assert export(str(tmp_path), "mds", tmp_path / "to") == 2
    assert "is not an output of `tokenmill tokenize`" in logged(capsys)
    assert export(write_tokens(tmp_path, (0, 0)), "mds", tmp_path / "to") == 2
    assert "holds no rows" in logged(capsys)


def test_missing_and_quarantined_samples_are_counted(tmp_path: Path, capsys):
    inputs = write_corpus(tmp_path / "in", (2, 1))
    output = Output.create(str(tmp_path / "out"), layout(), ShardList(inputs), config={})
    row = _random("0000", 0, (2, 2), 1024)
    commit_shard(output, inputs[0], [row], [quarantined(inputs[0], 1)], seconds={}, now=0.0)
    assert export(output, "arrow", tmp_path / "to") == 0
    printed = capsys.readouterr().out
    assert "1 input shards are not tokenized yet" in printed
    assert "1 samples are in quarantine" in printed


def test_mds_refuses_a_row_without_tokens(tmp_path: Path, capsys):
    inputs = write_corpus(tmp_path / "in", (1,))
    output = Output.create(str(tmp_path / "out"), layout(), ShardList(inputs), config={})
    empty: dict[str, Any] = {"height": 0, "width": 0}
    commit_shard(output, inputs[0], [TokenRow("0000", 0, np.zeros((0, 3), int), empty)], [], seconds={}, now=0.0)
    assert export(output, "mds", tmp_path / "mds") == 2
    assert "shape (0, 3)" in logged(capsys)
    assert export(output, "webdataset", tmp_path / "tars") == 0
    assert [tokens.shape for _, tokens in by_webdataset(tmp_path / "tars")] == [(0, 3)]


def test_help_lists_the_formats(capsys: pytest.CaptureFixture[str]):
    assert main(["export", "--help"]) == 0
    assert ", ".join(FORMATS.names()) in capsys.readouterr().out
