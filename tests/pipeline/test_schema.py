"""Schema 1 of a token shard: token widths, encodings, footer, versions, and the readers of other libraries."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UnsupportedSchema
from pipeline.tokens import ShardLayout, TokenRow
from pipeline.tokens.schema import SIZE_COLUMNS, passthrough_notes, to_parquet, token_dtype, tokens_as_lists
from tests.corpus import layout, token_row


def written(layout: ShardLayout, rows: list[TokenRow]) -> pa.Table:
    """The rows, written to Parquet and read back."""
    return pq.read_table(io.BytesIO(to_parquet(layout.to_table(rows, "in/a.tar"))))


def grids(table: pa.Table, layout: ShardLayout) -> list[np.ndarray]:
    lists = tokens_as_lists(table["tokens"].combine_chunks(), layout.token_dtype).to_pylist()
    return [np.array(tokens).reshape(shape) for tokens, shape in zip(lists, table["shape"].to_pylist(), strict=True)]


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")],
)
@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_the_token_width_depends_on_the_codebook_and_holds_its_last_code(codebook_size: int, dtype: str, encoding: str):
    shape = layout(codebook_size=codebook_size, encoding=encoding)
    tokens = np.array([[0, codebook_size - 1, codebook_size // 2]])
    table = written(shape, [TokenRow("a", 0, tokens, {})])
    assert shape.token_dtype == dtype
    assert table.schema.metadata[b"token_dtype"] == dtype.encode()
    assert np.array_equal(grids(table, shape)[0], tokens)
    if encoding == "list":
        assert table.schema.field("tokens").type == pa.list_(pa.from_numpy_dtype(dtype))


def test_more_than_32_bits_per_token_are_refused():
    with pytest.raises(ValueError, match="4294967297 codes need more than 32 bits per token"):
        token_dtype(2**32 + 1)


@pytest.mark.parametrize("token", [1024, -1, 65536 + 3])
@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_a_token_outside_the_codebook_is_refused(token: int, encoding: str):
    row = TokenRow("photo-7", 0, np.array([3, token, 5]), {})
    with pytest.raises(ValueError, match=rf"'photo-7' has tokens in .*{token}.*; the codebook allows 0\.\.1023"):
        layout(encoding=encoding).to_table([row], "in/a.tar")


def test_unknown_encoding_is_refused():
    with pytest.raises(ValueError, match="'npy'; choose one of: list, packed"):
        layout(encoding="npy")


@pytest.mark.parametrize("codebook_size", [200, 1024, 100_000])
def test_list_and_packed_read_back_the_same(codebook_size: int):
    rows = [token_row(f"k{i}", i, codebook_size) for i in range(5000)]  # more than one row group
    as_lists, packed = (layout(codebook_size=codebook_size, encoding=encoding) for encoding in ("list", "packed"))
    first, second = grids(written(as_lists, rows), as_lists), grids(written(packed, rows), packed)
    for row, a, b in zip(rows, first, second, strict=True):
        assert np.array_equal(a, row.tokens)
        assert np.array_equal(b, row.tokens)


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_a_slice_of_the_column_gives_those_rows(encoding: str):
    shape = layout(encoding=encoding)
    rows = [token_row(f"k{i}", i) for i in range(10)]
    part = written(shape, rows)["tokens"].chunk(0).slice(3, 4)
    found = tokens_as_lists(part, shape.token_dtype).to_pylist()
    assert found == [row.tokens.ravel().tolist() for row in rows[3:7]]


@pytest.mark.parametrize("shape", [(4,), (2, 3), (3, 2, 5), (0,)])
@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_tokens_are_written_in_c_order_from_any_memory_order(shape: tuple[int, ...], encoding: str):
    tokens = np.asfortranarray(np.arange(np.prod(shape)).reshape(shape)).astype(">i4")
    table = written(layout(encoding=encoding), [TokenRow("a", 0, tokens, {})])
    assert table["shape"].to_pylist() == [list(shape)]
    assert np.array_equal(grids(table, layout())[0], tokens)


def test_packed_tokens_are_little_endian_bytes():
    table = written(layout(encoding="packed"), [TokenRow("a", 0, np.array([1, 1023]), {})])
    assert table["tokens"].to_pylist() == [b"\x01\x00\xff\x03"]


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_an_empty_shard_has_the_whole_schema(encoding: str):
    empty, full = (written(layout(encoding=encoding), rows) for rows in ([], [token_row("a", 0)]))
    assert empty.num_rows == 0
    assert empty.schema.equals(full.schema, check_metadata=True)
    assert grids(empty, layout(encoding=encoding)) == []


def test_the_footer_has_the_layout_and_the_source_shard():
    footer = written(layout(codebook_size=257), []).schema.metadata
    assert {name.decode(): value.decode() for name, value in footer.items()} == {
        "schema_version": "1",
        "token_dtype": "uint16",
        "codebook_size": "257",
        "codebook_id": "book-a",
        "tokenizer_id": "tok-a",
        "index_order": "first dimension least significant",
        "preprocessing": '{"short_side": 0}',
        "modality": "image",
        "encoding": "list",
        "num_samples_dtype": "int64",
        "source_shard": "in/a.tar",
    }


def test_columns_are_the_documented_ones():
    table = written(layout(passthrough=("txt", "jpg")), [token_row("a", 4)])
    assert table.column_names == [
        *["key", "source_shard", "source_index", "modality", "tokens", "shape"],
        *SIZE_COLUMNS,
        *["txt", "jpg"],
    ]
    row = table.drop_columns(["tokens", "shape"]).to_pylist()[0]
    assert row == {
        **{"key": "a", "source_shard": "in/a.tar", "source_index": 4, "modality": "image"},
        **{"height": 16, "width": 24, "sample_rate": None, "num_samples": None, "txt": None, "jpg": None},
    }


def test_the_extension_decides_whether_passthrough_is_text_or_bytes():
    members = {"txt": "größer".encode(), "left.json": b"{}", "npy": b"\x00\xff"}
    row = TokenRow("a", 0, np.array([1]), {}, members)
    table = written(layout(passthrough=("txt", "left.json", "npy")), [row, token_row("b", 1)])
    assert table.select(["txt", "left.json", "npy"]).to_pylist() == [
        {"txt": "größer", "left.json": "{}", "npy": b"\x00\xff"},
        {"txt": None, "left.json": None, "npy": None},
    ]


LATIN_1 = "café".encode("latin-1")


@pytest.mark.parametrize(
    ("text", "stored"),
    [(b"\xef\xbb\xbfcaf\xc3\xa9", "café"), (b"\xef\xbb\xbf", ""), (LATIN_1, None), ("café".encode("utf-16"), None)],
)
def test_text_loses_its_byte_order_mark_and_is_null_if_it_is_not_utf_8(text: bytes, stored: str | None):
    row = TokenRow("photo-7", 0, np.array([1]), {}, {"txt": text})
    assert written(layout(passthrough=("txt",)), [row])["txt"].to_pylist() == [stored]


def test_rows_with_null_in_a_passthrough_column_are_counted_by_reason():
    members: list[dict[str, bytes]] = [{"txt": b"fine", "jpg": b"\xff"}, {"txt": LATIN_1}, {"txt": LATIN_1}]
    rows = [TokenRow(str(i), i, np.array([1]), {}, given) for i, given in enumerate(members)]
    assert passthrough_notes(rows, ["txt", "jpg", "cls"]) == {
        "rows whose txt (tokens.passthrough) is not UTF-8, which is null there": 2,
        "rows without jpg (tokens.passthrough), which is null there": 2,
        "rows without cls (tokens.passthrough), which is null there": 3,
    }


@pytest.mark.parametrize("name", ["key", "tokens", "height"])
def test_passthrough_with_the_name_of_another_column_is_refused(name: str):
    with pytest.raises(ValueError, match=name):
        layout(passthrough=(name,))


@pytest.mark.parametrize("member", ["", "left.jpg"])
def test_a_layout_round_trips_through_its_dict(member: str):
    original = layout(passthrough=("txt",), encoding="packed", member=member)
    assert ShardLayout.from_dict(original.to_dict()) == original


def latent_layout() -> ShardLayout:
    return ShardLayout.for_latents(encoder_id="enc-a", modality="audio", preprocessing={"b": 1, "a": 2})


def test_a_layout_of_latents_has_no_codebook_and_is_stored_with_empty_strings():
    latents = latent_layout()
    assert (latents.holds_latents, latents.codebook_id, latents.index_order) == (True, None, None)
    assert latents.to_dict() == {
        "tokenizer_id": "enc-a",
        "codebook_id": "",
        "codebook_size": 0,
        "modality": "audio",
        "index_order": "",
        "preprocessing": '{"a": 2, "b": 1}',
        "encoding": "packed",
        "passthrough": [],
        "schema_version": 1,
        "num_samples_dtype": "int64",
        "token_dtype": "float32",
    }
    assert ShardLayout.from_dict(latents.to_dict()) == latents


def test_latents_are_stored_as_little_endian_float32():
    values = np.array([[0.5, -2.0], [np.nan, 1e9]])
    table = written(latent_layout(), [TokenRow("a", 0, values, {})])
    assert table["tokens"].to_pylist() == [values.astype("<f4").tobytes()]
    assert table["shape"].to_pylist() == [[2, 2]]


@pytest.mark.parametrize("folder", ["out", "out_audio", "run/latents"])
def test_layout_and_footers_are_written_as_in_the_golden_outputs(folder: str):
    """Also the order of the keys."""
    golden = Path(__file__).parents[1] / "golden" / folder
    stored = json.loads((golden / "dataset.json").read_text())["layout"]
    layout = ShardLayout.from_dict(stored)
    assert list(layout.to_dict().items()) == list(stored.items())
    for file in (golden / "tokens").glob("*.parquet"):
        footer = pq.read_schema(file)
        expected = layout.schema(footer.metadata[b"source_shard"].decode())
        assert expected.equals(footer)
        assert list(expected.metadata.items()) == list(footer.metadata.items())[: len(expected.metadata)]


def clip(num_samples: int) -> TokenRow:
    return TokenRow("long", 0, np.array([1]), {"sample_rate": 44_100, "num_samples": num_samples})


def test_a_clip_of_more_than_13_5_hours_has_its_length():
    num_samples = 14 * 3600 * 44_100
    assert num_samples > 2**31
    table = written(layout(), [clip(num_samples)])
    assert table.schema.field("num_samples").type == pa.int64()
    assert table["num_samples"].to_pylist() == [num_samples]


def old_layout() -> ShardLayout:
    """As an output has it whose dataset.json does not state the type of num_samples."""
    stored = layout().to_dict()
    del stored["num_samples_dtype"]
    return ShardLayout.from_dict(stored)


def test_a_layout_that_does_not_state_the_type_of_num_samples_keeps_int32():
    assert "num_samples_dtype" not in old_layout().to_dict()
    table = written(old_layout(), [clip(2**31 - 1)])
    assert table.schema.field("num_samples").type == pa.int32()
    assert b"num_samples_dtype" not in table.schema.metadata


def test_a_clip_that_an_old_output_cannot_hold_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"key 'long' has 2147483648 samples.*up to 2147483647; choose another output"):
        old_layout().to_table([clip(2**31)], "in/a.tar")


@pytest.mark.parametrize("dtype", ["int16", "string", "", None])
def test_an_unknown_type_of_num_samples_is_refused(dtype: object):
    with pytest.raises(ValueError, match=r"num_samples_dtype is .*, not int32 or int64"):
        ShardLayout.from_dict({**layout().to_dict(), "num_samples_dtype": dtype})


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_layout_with_a_newer_schema_is_refused(version: object):
    with pytest.raises(UnsupportedSchema, match=r"schema_version is .* reads up to 1; upgrade tokenmill"):
        ShardLayout.from_dict({**layout().to_dict(), "schema_version": version})


def test_unknown_fields_of_a_layout_are_ignored():
    assert ShardLayout.from_dict({**layout().to_dict(), "added_later": 1}) == layout()


# -- readers of other libraries -----------------------------------------------------------------------------------


def with_pandas(file: Path) -> list[tuple]:
    table = pytest.importorskip("pandas").read_parquet(file)
    return [(row.key, list(row.tokens), list(row.shape)) for row in table[["key", "tokens", "shape"]].itertuples()]


def with_polars(file: Path) -> list[tuple]:
    return pytest.importorskip("polars").read_parquet(file).select("key", "tokens", "shape").rows()


def with_duckdb(file: Path) -> list[tuple]:
    return pytest.importorskip("duckdb").sql(f"select key, tokens, shape from '{file}'").fetchall()


def with_datasets(file: Path) -> list[tuple]:
    rows = pytest.importorskip("datasets").Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    return [(row["key"], row["tokens"], row["shape"]) for row in rows]


READERS: list[Callable[[Path], list[tuple]]] = [with_pandas, with_polars, with_duckdb, with_datasets]


def file_of(layout: ShardLayout, folder: Path) -> tuple[Path, list[TokenRow]]:
    rows = [token_row(f"k{i}", i, layout.codebook_size) for i in range(20)]
    (folder / "a.parquet").write_bytes(to_parquet(layout.to_table(rows, "in/a.tar")))
    return folder / "a.parquet", rows


@pytest.mark.parametrize("codebook_size", [256, 1024, 65537])
@pytest.mark.parametrize("reader", READERS)
def test_common_readers_give_the_same_tokens(tmp_path: Path, reader, codebook_size: int):
    file, rows = file_of(layout(codebook_size=codebook_size), tmp_path)
    expected = [(row.key, row.tokens.ravel().tolist(), list(row.tokens.shape)) for row in rows]
    assert [(key, list(tokens), list(shape)) for key, tokens, shape in reader(file)] == expected


@pytest.mark.parametrize("reader", READERS)
def test_common_readers_give_packed_tokens_as_bytes(tmp_path: Path, reader):
    file, rows = file_of(layout(encoding="packed"), tmp_path)
    with_bytes = reader.__name__ == "with_pandas"  # list() turned the bytes into integers
    found = [bytes(tokens) if with_bytes else tokens for _, tokens, _ in reader(file)]
    assert found == [row.tokens.astype("<u2").tobytes() for row in rows]
