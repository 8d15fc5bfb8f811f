"""The proof of an output: it passes what is sound and names whatever is not."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.manifest import Manifest, Shard, find_shards
from pipeline.tokens import Output
from pipeline.tokens.layout import to_parquet
from pipeline.tokens.verify import verify
from tests.corpus import layout, quarantined, samples_of, token_rows, write_corpus, write_tar, write_tokens

SIZES = (5, 0, 4)


@pytest.fixture(params=["list", "packed"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    return write_tokens(tmp_path, SIZES, encoding=request.param)


def shard(output: Output, index: int = 0) -> Shard:
    return output.inputs()[index]


def file(output: Output, folder: str, index: int = 0) -> Path:
    ending = "json" if folder == "manifest" else "parquet"
    return Path(output.url) / folder / f"{shard(output, index).name}.{ending}"


def forge_entry(output: Output, index: int = 0, **changes) -> None:
    path = file(output, "manifest", index)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forge_tokens(output: Output, change: Callable[[pa.Table], pa.Table], **entry) -> None:
    """Another token file with an entry whose checksum is right, so that what is in it must give it away."""
    path = file(output, "tokens")
    data = to_parquet(change(pq.read_table(path)))
    path.write_bytes(data)
    forge_entry(output, tokens_sha256=hashlib.sha256(data).hexdigest(), **entry)


def problems(output: Output, **settings) -> str:
    """What verify finds, of which there must be something."""
    found, _ = verify(output, **settings)
    assert found
    return "\n".join(found)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


# -- sound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_output_passes(output: Output, deep: bool):
    found, entries = verify(output, against_input=deep)
    assert found == []
    assert sorted(entry.num_rows for entry in entries) == sorted(SIZES)


@pytest.fixture
def with_bad(tmp_path: Path) -> Output:
    """A shard of 4 samples, of which the second is in quarantine."""
    inputs = write_corpus(tmp_path / "in", (4,))
    output = Output.create(str(tmp_path / "out"), layout(), Manifest(inputs), config={})
    rows = token_rows(inputs[0], 4)
    output.commit(inputs[0], [rows[0], *rows[2:]], [quarantined(inputs[0], 1)], seconds={}, now=0.0)
    return output


@pytest.mark.parametrize("deep", [False, True])
def test_quarantined_samples_count(with_bad: Output, deep: bool):
    assert verify(with_bad, against_input=deep)[0] == []


def test_a_shard_that_is_quarantined_to_the_last_sample_is_sound(tmp_path: Path):
    [only] = write_corpus(tmp_path / "in", (2,))
    output = Output.create(str(tmp_path / "out"), layout(), Manifest([only]), config={})
    output.commit(only, [], [quarantined(only, 0), quarantined(only, 1)], seconds={}, now=0.0)
    assert verify(output, against_input=True)[0] == []


# -- files --------------------------------------------------------------------------------------------------------


def test_a_deleted_token_file_is_named(output: Output):
    file(output, "tokens").unlink()
    assert f"tokens/{shard(output).name}.parquet" in problems(output)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_bit_is_noticed(output: Output, at: int):
    data = bytearray(file(output, "tokens").read_bytes())
    data[at] ^= 1
    file(output, "tokens").write_bytes(data)
    assert "checksum differs" in problems(output)


def test_swapped_token_files_are_noticed(output: Output):
    first, third = file(output, "tokens"), file(output, "tokens", 2)
    data = first.read_bytes()
    first.write_bytes(third.read_bytes())
    third.write_bytes(data)
    assert problems(output).count("checksum differs") == 2


def test_a_removed_quarantine_file_is_named(with_bad: Output):
    file(with_bad, "quarantine").unlink()
    assert f"quarantine/{shard(with_bad).name}.parquet" in problems(with_bad)


def test_a_changed_quarantine_file_is_named(with_bad: Output):
    with file(with_bad, "quarantine").open("ab") as target:
        target.write(b"more")
    assert "checksum differs" in problems(with_bad)


def test_deep_verification_names_a_deleted_file_instead_of_stopping(output: Output):
    file(output, "tokens").unlink()
    assert f"tokens/{shard(output).name}.parquet" in problems(output, against_input=True)


def test_a_manifest_entry_that_is_none_is_a_finding(output: Output):
    file(output, "manifest").write_text("{")
    assert f"manifest/{shard(output).name}.json" in problems(output)


def test_a_manifest_entry_under_a_second_name_is_noticed(output: Output):
    shutil.copy(file(output, "manifest"), file(output, "manifest").with_name("copy-00000000.json"))
    problems(output)  # every reader would get these rows twice


# -- shards -------------------------------------------------------------------------------------------------------


def test_a_shard_without_entry_is_named(output: Output):
    file(output, "manifest").unlink()
    assert f"{shard(output).url}: not tokenized" in problems(output)


def test_a_shard_that_only_a_later_run_was_given_is_missing_too(output: Output, tmp_path: Path):
    later = find_shards(write_tar(tmp_path / "late" / "photos-007.tar", samples_of(1)))
    Output.create(output.url, output.layout, later, config={})
    assert "photos-007.tar: not tokenized" in problems(output)


def test_an_entry_of_a_shard_that_was_never_given_is_named(output: Output, tmp_path: Path):
    other = Shard("/elsewhere/photos-000.tar", 10)
    output.commit(other, [], [], seconds={}, now=0.0)
    assert "no run was given the shard /elsewhere/photos-000.tar" in problems(output)


def test_an_entry_that_names_another_shard_is_noticed(output: Output):
    forge_entry(output, source_shard=shard(output, 2).url)
    assert "the name is not that of its shard" in problems(output)


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["num_rows", "num_samples", "num_quarantined", "num_tokens"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_forged_count_is_noticed(output: Output, count: str, by: int):
    [entry] = [e for e in output.commits() if e.name == shard(output).name]
    forge_entry(output, **{count: getattr(entry, count) + by})
    assert shard(output).name in problems(output)


def test_a_row_that_is_forged_into_quarantine_is_noticed(output: Output):
    forge_entry(output, num_rows=4, num_quarantined=1)
    assert "5 rows, the manifest says 4" in problems(output)
    assert "0 rows, not 1" in problems(output)


def test_a_row_that_is_lost_within_the_shard_is_noticed(output: Output):
    def without_third(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table.slice(0, 2), table.slice(3)])

    lost = token_rows(shard(output), 5)[2].tokens.size
    [entry] = [e for e in output.commits() if e.name == shard(output).name]
    forge_tokens(output, without_third, num_rows=4, num_samples=4, num_tokens=entry.num_tokens - lost)
    assert "lost or doubled" in problems(output)


def test_a_lost_last_row_with_forged_counts_is_noticed_against_the_input(output: Output):
    lost = token_rows(shard(output), 5)[4].tokens.size
    [entry] = [e for e in output.commits() if e.name == shard(output).name]
    forge_tokens(output, lambda t: t.slice(0, 4), num_rows=4, num_samples=4, num_tokens=entry.num_tokens - lost)
    assert "its keys are not those of the output" in problems(output, against_input=True)


def test_a_doubled_row_is_noticed(output: Output):
    def doubled(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table.slice(0, 4), table.slice(0, 1)])

    forge_tokens(output, doubled)
    assert "a key is there twice" in problems(output)
    assert "lost or doubled" in problems(output)


def test_a_doubled_key_is_noticed(output: Output):
    forge_tokens(output, lambda t: with_column(t, "key", ["a", "b", "a", "d", "e"]))
    assert "a key is there twice" in problems(output)


def test_a_sample_that_is_in_a_row_and_in_quarantine_is_noticed(with_bad: Output):
    forge_tokens(with_bad, lambda t: with_column(t, "source_index", [0, 1, 3]))
    assert "lost or doubled" in problems(with_bad)


def test_rows_of_another_shard_are_noticed(output: Output):
    forge_tokens(output, lambda t: with_column(t, "source_shard", ["elsewhere.tar"] * 5))
    assert "rows of another shard" in problems(output)


@pytest.mark.parametrize(
    ("name", "value"), [("tokenizer_id", "tok-b"), ("codebook_id", "book-b"), ("codebook_size", "999")]
)
def test_another_tokenizers_shard_is_noticed_by_its_footer(output: Output, name: str, value: str):
    def with_footer(table: pa.Table) -> pa.Table:
        return table.replace_schema_metadata({**table.schema.metadata, name.encode(): value.encode()})

    forge_tokens(output, with_footer)
    assert f"footer says {name} {value}" in problems(output)


def test_another_tokenizers_entry_is_noticed(output: Output):
    forge_entry(output, tokenizer_id="tok-b")
    assert "tokenizer_id tok-b is not the dataset's tok-a" in problems(output)


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_a_token_that_is_no_code_is_noticed(tmp_path: Path, encoding: str):
    output = write_tokens(tmp_path, SIZES, encoding=encoding)
    wider = layout(encoding=encoding, codebook_size=2000)  # of the same width
    rows = token_rows(shard(output), 5)
    rows[3].tokens[0, 1] = 1024

    def forged(table: pa.Table) -> pa.Table:
        return wider.to_table(rows, shard(output).url).replace_schema_metadata(table.schema.metadata)

    forge_tokens(output, forged)
    assert "token 1024 is not below 1024" in problems(output)


def test_a_shape_that_does_not_fit_its_tokens_is_noticed(output: Output):
    forge_tokens(output, lambda t: with_column(t, "shape", [[2, 3], [3, 3], [1, 3], [3, 3], [2, 3]]))
    assert "another number of tokens than its shape says" in problems(output)


# -- against the input --------------------------------------------------------------------------------------------


def test_keys_that_the_input_does_not_have_are_noticed_only_against_it(output: Output):
    forge_tokens(output, lambda t: with_column(t, "key", [f"other-{i}" for i in range(5)]))
    assert verify(output)[0] == []
    assert f"{shard(output).url}: its keys are not those of the output" in problems(output, against_input=True)


def test_an_input_shard_that_cannot_be_read_any_more_is_named(output: Output):
    Path(shard(output).url).unlink()
    assert verify(output)[0] == []
    assert "there is no such shard" in problems(output, against_input=True)
