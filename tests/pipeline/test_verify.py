"""verify: a correct output passes, and every fault is reported with the file."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.tokens import Output, commit_retry, commit_shard
from pipeline.tokens.footer import TAIL, read_footer
from pipeline.tokens.schema import to_parquet
from pipeline.tokens.verify import verify
from tests.corpus import layout, quarantined, samples_of, token_rows, write_corpus, write_tar, write_tokens
from tests.s3 import S3Server

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
    """Changes a token file and updates the checksum in its entry, so that only the content can reveal the change."""
    path = file(output, "tokens")
    data = to_parquet(change(pq.read_table(path)))
    path.write_bytes(data)
    forge_entry(output, tokens_sha256=hashlib.sha256(data).hexdigest(), tokens_num_bytes=len(data), **entry)


def problems(output: Output) -> str:
    """The problems that the deep check reports. There must be at least one."""
    found = verify(output, deep=True).problems
    assert found
    return "\n".join(found)


def shallow_problems(output: Output) -> str:
    """The problems that the shallow check reports. There must be at least one, and the deep check must fail too."""
    found = verify(output).problems
    assert found
    problems(output)
    return "\n".join(found)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


# -- correct outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_correct_output_passes(output: Output, deep: bool):
    proof = verify(output, deep=deep)
    assert (proof.problems, proof.num_leftovers, proof.num_without_ranges) == ([], 0, 0)
    assert sorted(entry.num_rows for entry in proof.entries) == sorted(SIZES)


@pytest.fixture
def with_quarantine(tmp_path: Path) -> Output:
    """A shard of 4 samples. The second is in quarantine."""
    inputs = write_corpus(tmp_path / "in", (4,))
    output = Output.create(str(tmp_path / "out"), layout(), ShardList(inputs), config={})
    rows = token_rows(inputs[0], 4)
    commit_shard(output, inputs[0], [rows[0], *rows[2:]], [quarantined(inputs[0], 1)], seconds={}, now=0.0)
    return output


@pytest.mark.parametrize("deep", [False, True])
def test_quarantined_samples_are_not_missing(with_quarantine: Output, deep: bool):
    assert verify(with_quarantine, deep=deep).problems == []


def test_a_shard_with_all_samples_in_quarantine_passes(tmp_path: Path):
    [only] = write_corpus(tmp_path / "in", (2,))
    output = Output.create(str(tmp_path / "out"), layout(), ShardList([only]), config={})
    commit_shard(output, only, [], [quarantined(only, 0), quarantined(only, 1)], seconds={}, now=0.0)
    assert verify(output, deep=True).problems == []


# -- files --------------------------------------------------------------------------------------------------------


def test_a_deleted_token_file_is_reported(output: Output):
    file(output, "tokens").unlink()
    assert f"tokens/{shard(output).name}.parquet" in shallow_problems(output)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_bit_is_reported(output: Output, at: int):
    data = bytearray(file(output, "tokens").read_bytes())
    data[at] ^= 1
    file(output, "tokens").write_bytes(data)
    assert "checksum differs" in problems(output)


def test_swapped_token_files_are_reported(output: Output):
    first, third = file(output, "tokens"), file(output, "tokens", 2)
    data = first.read_bytes()
    first.write_bytes(third.read_bytes())
    third.write_bytes(data)
    assert problems(output).count("checksum differs") == 2
    assert shallow_problems(output).count("footer says source_shard") == 2


def test_a_deleted_quarantine_file_is_reported(with_quarantine: Output):
    file(with_quarantine, "quarantine").unlink()
    assert f"quarantine/{shard(with_quarantine).name}.parquet" in shallow_problems(with_quarantine)


def test_a_changed_quarantine_file_is_reported(with_quarantine: Output):
    with file(with_quarantine, "quarantine").open("ab") as target:
        target.write(b"more")
    assert "checksum differs" in problems(with_quarantine)


def test_the_deep_check_reports_a_deleted_file_instead_of_stopping(output: Output):
    file(output, "tokens").unlink()
    assert f"tokens/{shard(output).name}.parquet" in problems(output)


def test_an_invalid_manifest_entry_is_reported(output: Output):
    file(output, "manifest").write_text("{")
    assert f"manifest/{shard(output).name}.json" in shallow_problems(output)


def test_a_manifest_entry_under_a_second_name_is_reported(output: Output):
    shutil.copy(file(output, "manifest"), file(output, "manifest").with_name("copy-00000000.json"))
    shallow_problems(output)  # otherwise readers would get these rows twice


def test_files_without_an_entry_are_counted_but_not_a_problem(with_quarantine: Output):
    for folder in ("tokens", "quarantine"):
        kept = file(with_quarantine, folder)
        shutil.copy(kept, kept.with_name("left-000000000000.parquet"))
    proof = verify(with_quarantine)
    assert (proof.problems, proof.num_leftovers) == ([], 2)


def test_a_file_of_another_size_is_reported_from_the_listing(output: Output):
    with file(output, "tokens").open("ab") as target:
        target.write(b"more")
    assert "the manifest says" in shallow_problems(output)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_reported(output: Output, data: bytes):
    file(output, "tokens").write_bytes(data)
    assert f"tokens/{shard(output).name}.parquet: its {len(data)} bytes do not end in" in shallow_problems(output)


def test_a_footer_longer_than_the_first_request_is_read_completely(tmp_path: Path):
    """Row groups of one row each make a footer of more than 32 kB."""
    output = write_tokens(tmp_path, (200,))
    path = file(output, "tokens")
    pq.write_table(pq.read_table(path), path, row_group_size=1)
    forge_entry(output, tokens_num_bytes=path.stat().st_size)
    assert read_footer(str(path), path.stat().st_size).serialized_size > TAIL
    assert verify(output).problems == []


def test_files_without_statistics_are_counted(output: Output):
    path = file(output, "tokens")
    pq.write_table(pq.read_table(path), path, write_statistics=False)
    forge_entry(output, tokens_num_bytes=path.stat().st_size)
    proof = verify(output)
    assert (proof.problems, proof.num_without_ranges) == ([], 1)


def test_progress_counts_shards(output: Output):
    reported: list[tuple[int, int]] = []
    verify(output, progress=lambda done, total: reported.append((done, total)))
    assert reported == [(1, 3), (2, 3), (3, 3)]


# -- shards -------------------------------------------------------------------------------------------------------


def test_a_shard_without_an_entry_is_reported(output: Output):
    file(output, "manifest").unlink()
    assert f"{shard(output).url}: not tokenized" in shallow_problems(output)


def test_a_missing_shard_of_a_later_run_is_reported(output: Output, tmp_path: Path):
    later = find_shards(write_tar(tmp_path / "late" / "photos-007.tar", samples_of(1)))
    Output.create(output.url, output.layout, later, config={})
    assert "photos-007.tar: not tokenized" in shallow_problems(output)


def test_an_entry_of_a_shard_that_is_not_an_input_is_reported(output: Output, tmp_path: Path):
    other = Shard("/elsewhere/photos-000.tar", 10)
    commit_shard(output, other, [], [], seconds={}, now=0.0)
    assert "no run was given the shard /elsewhere/photos-000.tar" in shallow_problems(output)


def test_an_entry_with_another_source_shard_is_reported(output: Output):
    forge_entry(output, source_shard=shard(output, 2).url)
    assert "its name does not belong to its shard" in shallow_problems(output)


def test_a_copied_and_renamed_entry_is_reported(output: Output):
    entry = json.loads(file(output, "manifest").read_text())
    copy = file(output, "manifest").with_name("copy-000000000000.json")
    copy.write_text(json.dumps({**entry, "name": copy.stem}))
    assert "its name does not belong to its shard" in shallow_problems(output)


def test_an_entry_of_a_shard_of_another_size_is_reported(output: Output):
    forge_entry(output, source_num_bytes=512)
    assert "no run was given that version" in shallow_problems(output)


def test_a_shard_with_only_another_date_is_the_same_input(output: Output):
    forge_entry(output, source_version="1")
    assert not [what for what in verify(output).problems if "no run was given" in what]


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["num_rows", "num_samples", "num_quarantined", "num_tokens"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_forged_count_is_reported(output: Output, count: str, by: int):
    [entry] = [e for e in output.commits() if e.name == shard(output).name]
    forge_entry(output, **{count: getattr(entry, count) + by})
    assert shard(output).name in shallow_problems(output)


def test_a_row_that_is_counted_as_quarantined_is_reported(output: Output):
    forge_entry(output, num_rows=4, num_quarantined=1)
    assert "5 rows, the manifest says 4" in shallow_problems(output)
    assert "1 quarantined, but the checksum of their file is None" in shallow_problems(output)


def test_a_missing_row_is_reported(output: Output):
    def without_third(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table.slice(0, 2), table.slice(3)])

    lost = token_rows(shard(output), 5)[2].tokens.size
    [entry] = [e for e in output.commits() if e.name == shard(output).name]
    forge_tokens(output, without_third, num_rows=4, num_samples=4, num_tokens=entry.num_tokens - lost)
    assert "lost or doubled" in problems(output)


def test_a_missing_last_row_with_forged_counts_is_found_by_reading_the_input(output: Output):
    lost = token_rows(shard(output), 5)[4].tokens.size
    [entry] = [e for e in output.commits() if e.name == shard(output).name]
    forge_tokens(output, lambda t: t.slice(0, 4), num_rows=4, num_samples=4, num_tokens=entry.num_tokens - lost)
    assert "its keys are not those of the output" in problems(output)


def test_a_doubled_row_is_reported(output: Output):
    def doubled(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table.slice(0, 4), table.slice(0, 1)])

    forge_tokens(output, doubled)
    assert "a key occurs twice" in problems(output)
    assert "lost or doubled" in problems(output)


def test_a_doubled_key_is_reported(output: Output):
    forge_tokens(output, lambda t: with_column(t, "key", ["a", "b", "a", "d", "e"]))
    assert "a key occurs twice" in problems(output)


def test_a_sample_in_a_row_and_in_quarantine_is_reported(with_quarantine: Output):
    forge_tokens(with_quarantine, lambda t: with_column(t, "source_index", [0, 1, 3]))
    assert "lost or doubled" in problems(with_quarantine)


def test_rows_of_another_shard_are_reported(output: Output):
    forge_tokens(output, lambda t: with_column(t, "source_shard", ["elsewhere.tar"] * 5))
    assert "rows of another shard" in problems(output)


@pytest.mark.parametrize(
    ("name", "value"), [("tokenizer_id", "tok-b"), ("codebook_id", "book-b"), ("codebook_size", "999")]
)
def test_a_shard_of_another_tokenizer_is_reported_from_its_footer(output: Output, name: str, value: str):
    def with_footer(table: pa.Table) -> pa.Table:
        return table.replace_schema_metadata({**table.schema.metadata, name.encode(): value.encode()})

    forge_tokens(output, with_footer)
    assert f"footer says {name} {value}" in shallow_problems(output)


def test_an_entry_of_another_tokenizer_is_reported(output: Output):
    forge_entry(output, tokenizer_id="tok-b")
    assert "tokenizer_id tok-b is not the dataset's tok-a" in shallow_problems(output)


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_a_token_outside_the_codebook_is_reported(tmp_path: Path, encoding: str):
    output = write_tokens(tmp_path, SIZES, encoding=encoding)
    wider = layout(encoding=encoding, codebook_size=2000)  # the same token width
    rows = token_rows(shard(output), 5)
    rows[3].tokens[0, 1] = 1024

    def forged(table: pa.Table) -> pa.Table:
        return wider.to_table(rows, shard(output).url).replace_schema_metadata(table.schema.metadata)

    forge_tokens(output, forged)
    assert "token 1024 is not below 1024" in problems(output)


def test_a_shape_that_does_not_match_its_tokens_is_reported(output: Output):
    forge_tokens(output, lambda t: with_column(t, "shape", [[2, 3], [3, 3], [1, 3], [3, 3], [2, 3]]))
    assert "a different number of tokens than its shape says" in problems(output)


def test_overlapping_row_groups_are_reported_from_their_ranges(output: Output):
    path = file(output, "tokens")
    table = pq.read_table(path)
    rows = pa.concat_tables([table.slice(0, 3), table.slice(2, 2)])  # sample 2 twice, sample 4 lost
    pq.write_table(rows, path, row_group_size=3)
    forge_entry(output, tokens_num_bytes=path.stat().st_size)
    assert "2 rows of samples 2..3, after 2, of 5 samples" in shallow_problems(output)


def test_a_row_beyond_the_shard_is_reported_from_its_range(output: Output):
    forge_tokens(output, lambda t: with_column(t, "source_index", [0, 1, 2, 3, 5]))
    assert "samples 0..5" in shallow_problems(output)


def test_an_additional_column_is_reported(output: Output):
    forge_tokens(output, lambda t: t.append_column("more", pa.array([1] * 5)))
    assert "its columns are not those of the dataset" in shallow_problems(output)


# -- retries ------------------------------------------------------------------------------------------------------


def retried_output(url: str, inputs: list[Shard]) -> Output:
    """A shard of 4 samples: 0 is a row, 1 was recovered by the first retry, 2 by the second, 3 is in quarantine."""
    output = Output.create(url, layout(), ShardList(inputs), config={})
    rows, bad = token_rows(inputs[0], 4), [quarantined(inputs[0], i) for i in range(4)]
    commit_shard(output, inputs[0], rows[:1], bad[1:], seconds={}, now=0.0)
    for number in (1, 2):
        history = output.committed_shard(inputs[0].name)
        assert history is not None
        commit_retry(output, inputs[0], history, [rows[number]], bad[number + 1 :], seconds={}, now=0.0)
    return output


@pytest.fixture
def retried(tmp_path: Path) -> Output:
    return retried_output(str(tmp_path / "out"), write_corpus(tmp_path / "in", (4,)))


def of_retry(output: Output, folder: str, number: int) -> Path:
    path = file(output, folder)
    return path.with_name(f"{path.stem}+{number}{path.suffix}")


def forge_retry(output: Output, number: int, **changes) -> None:
    path = of_retry(output, "manifest", number)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("deep", [False, True])
def test_an_output_with_retries_passes(retried: Output, deep: bool):
    proof = verify(retried, deep=deep)
    assert (proof.problems, proof.num_leftovers, len(proof.entries)) == ([], 0, 3)


@pytest.mark.parametrize("folder", ["tokens", "quarantine"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_deleted_file_of_a_retry_is_reported(retried: Output, folder: str, number: int):
    of_retry(retried, folder, number).unlink()
    assert f"{folder}/{shard(retried).name}+{number}.parquet: the file is missing" in shallow_problems(retried)


def test_a_deleted_entry_between_two_others_is_reported(retried: Output):
    of_retry(retried, "manifest", 1).unlink()
    assert "the entry before this retry is missing" in shallow_problems(retried)


def test_a_retry_without_the_first_commit_is_reported(retried: Output):
    file(retried, "manifest").unlink()
    assert "not tokenized" in shallow_problems(retried)


def test_a_retry_entry_under_another_number_is_reported(retried: Output):
    shutil.copy(of_retry(retried, "manifest", 2), of_retry(retried, "manifest", 3))
    assert "is the entry of" in shallow_problems(retried)


@pytest.mark.parametrize("changes", [{"settled": [2]}, {"settled": []}, {"num_samples": 4}, {"num_quarantined": 1}])
def test_a_forged_retry_entry_is_reported(retried: Output, changes: dict):
    forge_retry(retried, 1, **changes)
    assert f"{shard(retried).name}+1" in shallow_problems(retried)


def test_a_sample_recovered_by_two_retries_is_reported(retried: Output):
    """The second retry repeats the row of the first, with a valid checksum and consistent counts."""
    first, second = (of_retry(retried, "tokens", number) for number in (1, 2))
    shutil.copy(first, second)
    entry = json.loads(of_retry(retried, "manifest", 1).read_text())
    same = {name: entry[name] for name in ("tokens_sha256", "tokens_num_bytes", "num_tokens", "settled")}
    forge_retry(retried, 2, **same)
    assert "two retries recovered the same sample" in shallow_problems(retried)


@pytest.mark.s3
def test_verify_works_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    s3.use(monkeypatch)
    inputs = write_corpus(tmp_path / "in", (4,))
    output = retried_output(f"{s3.url}/proof/out", inputs)
    assert verify(output).problems == []
    assert verify(output, deep=True).problems == []
    storage.write_once(output.tokens_url("left-000000000000"), b"of a run that died")
    assert verify(output).num_leftovers == 1
    name = f"{inputs[0].name}+2"
    storage.remove(output.quarantine_url(name))
    assert f"quarantine/{name}.parquet: the file is missing" in shallow_problems(output)


# -- compared with the input --------------------------------------------------------------------------------------


def test_wrong_keys_are_found_only_by_reading_the_input(output: Output):
    forge_tokens(output, lambda t: with_column(t, "key", [f"other-{i}" for i in range(5)]))
    assert verify(output).problems == []
    assert f"{shard(output).url}: its keys are not those of the output" in problems(output)


def test_an_input_shard_that_is_no_longer_readable_is_reported(output: Output):
    Path(shard(output).url).unlink()
    assert verify(output).problems == []
    assert "there is no such shard" in problems(output)
