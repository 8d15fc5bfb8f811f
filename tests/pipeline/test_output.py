"""Commits: the manifest entry alone makes a shard done, and an output has one tokenizer."""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.errors import BrokenOutput, OutputMismatch, UnsupportedSchema
from pipeline.tokens import Commit, CommittedShard, Output, commit_retry, commit_shard
from pipeline.tokens.schema import to_parquet
from pipeline.tokens.verify import verify
from pipeline.tokens.writer import _create_file, _tokens_table, _write_entry
from tests.corpus import layout, quarantined, token_row, token_rows, write_corpus


@pytest.fixture
def inputs(tmp_path: Path) -> list[Shard]:
    return write_corpus(tmp_path / "in", (4, 3))


@pytest.fixture
def output(tmp_path: Path, inputs: list[Shard]) -> Output:
    return Output.create(str(tmp_path / "out"), layout(), ShardList(inputs), config={"a": 1})


def commit(output: Output, shard: Shard, rows, bad=(), now: float = 1.0) -> Commit:
    return commit_shard(output, shard, rows, list(bad), seconds={"encode": 0.5}, now=now)


def files(output: Output) -> dict[str, bytes]:
    root = Path(output.url)
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def rows_of(output: Output, shard: Shard) -> list[list[int]]:
    table = pq.read_table(io.BytesIO(output.read_tokens(shard.name)))
    return table["tokens"].to_pylist()


# -- commit -------------------------------------------------------------------------------------------------------


def test_a_commit_writes_tokens_quarantine_and_entry(output: Output, inputs: list[Shard]):
    entry = commit(output, inputs[0], token_rows(inputs[0], 3), [quarantined(inputs[0], 3)])
    name = inputs[0].name
    assert {n for n in files(output) if name in n} == {
        *(f"manifest/{name}.json", f"tokens/{name}.parquet", f"quarantine/{name}.parquet")
    }
    assert (entry.num_samples, entry.num_rows, entry.num_quarantined) == (4, 3, 1)
    assert entry.num_tokens == sum(row.tokens.size for row in token_rows(inputs[0], 3))
    assert output.commits() == [entry]
    assert output.committed_names() == {name}


def test_a_shard_without_quarantined_samples_has_no_quarantine_file(output: Output, inputs: list[Shard]):
    entry = commit(output, inputs[0], token_rows(inputs[0], 4))
    assert entry.quarantine_sha256 is None
    assert not any("quarantine" in name for name in files(output))


def test_a_quarantine_row_has_key_stage_and_reason(output: Output, inputs: list[Shard]):
    bad = [quarantined(inputs[0], i) for i in (2, 0)]
    commit(output, inputs[0], [token_row("0001", 1)], bad)
    table = pq.read_table(io.BytesIO(output.read_quarantine(inputs[0].name)))
    assert table.to_pylist()[0] == {
        **{"key": "0000", "source_shard": inputs[0].url, "source_index": 0},
        **{"stage": "decode", "error": "BadSample", "message": "broken on purpose"},
    }
    assert table["source_index"].to_pylist() == [0, 2]


def test_a_second_commit_changes_nothing(output: Output, inputs: list[Shard]):
    first = commit(output, inputs[0], token_rows(inputs[0], 4), now=1.0)
    before = files(output)
    assert commit(output, inputs[0], token_rows(inputs[0], 4), now=2.0) == first
    assert files(output) == before


def test_a_second_commit_with_other_samples_changes_nothing(output: Output, inputs: list[Shard]):
    first = commit(output, inputs[0], token_rows(inputs[0], 4))
    before = files(output)
    assert commit(output, inputs[0], token_rows(inputs[0], 3), [quarantined(inputs[0], 3)]) == first
    assert files(output) == before


def commit_and_die(output: Output, shard: Shard, rows, bad=()) -> None:
    """Everything that a commit writes except the last step, the manifest entry."""
    commit(output, shard, rows, bad)
    storage.remove(f"{output.url}/manifest/{shard.name}.json")


def test_the_token_file_of_a_run_that_died_is_reused(output: Output, inputs: list[Shard]):
    commit_and_die(output, inputs[0], token_rows(inputs[0], 4))
    path = Path(output.tokens_url(inputs[0].name))
    before = path.stat().st_mtime_ns
    commit(output, inputs[0], token_rows(inputs[0], 4))
    assert path.stat().st_mtime_ns == before


def test_a_token_file_with_one_other_token_is_made_anew(output: Output, inputs: list[Shard]):
    """Its keys and footer are right, and nothing but the tokens themselves can prove the tokens."""
    other_rows = token_rows(inputs[0], 4)
    other_rows[2].tokens[0, 0] = (other_rows[2].tokens[0, 0] + 1) % 1024
    commit_and_die(output, inputs[0], other_rows)
    entry = commit(output, inputs[0], token_rows(inputs[0], 4))
    assert rows_of(output, inputs[0]) == [row.tokens.ravel().tolist() for row in token_rows(inputs[0], 4)]
    assert entry.tokens_sha256 == hashlib.sha256(output.read_tokens(inputs[0].name)).hexdigest()


@pytest.mark.parametrize("encoding", ["list", "packed"])
def test_no_flipped_byte_of_a_token_file_is_committed(tmp_path: Path, inputs: list[Shard], encoding: str):
    output = Output.create(str(tmp_path / encoding), layout(encoding=encoding), ShardList(inputs), config={})
    rows = token_rows(inputs[0], 4)
    commit_and_die(output, inputs[0], rows)
    good = output.read_tokens(inputs[0].name)
    for at in range(0, len(good), 97):
        damaged = bytearray(good)
        damaged[at] ^= 16
        Path(output.tokens_url(inputs[0].name)).write_bytes(damaged)
        commit_and_die(output, inputs[0], rows)
        assert output.read_tokens(inputs[0].name) == good


def test_a_file_that_was_replaced_is_put_back_if_its_writer_commits_first(output: Output, inputs: list[Shard]):
    """Another driver rounds differently. It wrote its tokens before ours, and its entry after our tokens."""
    other_rows = token_rows(inputs[0], 4)
    other_rows[2].tokens[0, 0] = (other_rows[2].tokens[0, 0] + 1) % 1024
    first = commit(output, inputs[0], other_rows)
    theirs, entry = output.read_tokens(inputs[0].name), storage.read(output.entry_url(inputs[0].name))
    storage.remove(output.entry_url(inputs[0].name))
    table = _tokens_table(output, inputs[0], token_rows(inputs[0], 4))
    ours = _create_file(output, inputs[0].name, output.tokens_url(inputs[0].name), to_parquet(table))
    storage.write_once(output.entry_url(inputs[0].name), entry)
    assert output.read_tokens(inputs[0].name) == ours.data != theirs
    assert _write_entry(output, replace(first, tokens_sha256="ours"), ours, None) == first
    assert output.read_tokens(inputs[0].name) == theirs


def test_the_quarantine_file_of_a_run_that_died_is_made_anew(output: Output, inputs: list[Shard]):
    bad = [quarantined(inputs[0], 3)]
    commit_and_die(output, inputs[0], token_rows(inputs[0], 3), bad)
    bad[0].message = "another message"
    entry = commit(output, inputs[0], token_rows(inputs[0], 3), bad)
    assert [sample.message for sample in output.quarantined(entry)] == ["another message"]


@pytest.mark.parametrize("torn", [b"", b"PAR1 and nothing", None])
def test_a_torn_token_file_is_replaced(output: Output, inputs: list[Shard], torn: bytes | None):
    rows = token_rows(inputs[0], 4)
    half = to_parquet(output.layout.to_table(rows, inputs[0].url))[:300]
    storage.write_once(output.tokens_url(inputs[0].name), half if torn is None else torn)
    commit(output, inputs[0], rows)
    assert rows_of(output, inputs[0]) == [row.tokens.ravel().tolist() for row in rows]


def test_the_old_shard_with_another_time_names_the_way_back(tmp_path: Path):
    """The printed command gives a local file the time that it had."""
    [shard] = write_corpus(tmp_path / "in", (2,))
    shards = find_shards(shard.url)
    output = Output.create(str(tmp_path / "out"), layout(), shards, {})
    commit(output, shards.shards[0], token_rows(shards.shards[0], 2))
    os.utime(shard.url, (1, 1))
    with pytest.raises(OutputMismatch, match=r"only its time has changed, run `touch -d @\d+\.\d{9} ") as refused:
        output.refuse_replaced(find_shards(shard.url).shards)
    subprocess.run(str(refused.value).split("`")[1], shell=True, check=True)
    output.refuse_replaced(find_shards(shard.url).shards)
    Path(shard.url).write_bytes(b"other")
    with pytest.raises(OutputMismatch, match=r"has 5 bytes now, .* or choose another output$"):
        output.refuse_replaced(find_shards(shard.url).shards)


def test_an_uncommitted_token_file_of_another_tokenizer_is_replaced(output: Output, inputs: list[Shard]):
    rows = token_rows(inputs[0], 4)
    other = to_parquet(layout(tokenizer_id="tok-b").to_table(rows, inputs[0].url))
    storage.write_once(output.tokens_url(inputs[0].name), other)
    commit(output, inputs[0], rows)
    table = pq.read_table(io.BytesIO(output.read_tokens(inputs[0].name)))
    assert table.schema.metadata[b"tokenizer_id"] == b"tok-a"


def test_the_token_file_of_an_older_version_of_the_shard_is_not_reused(output: Output, inputs: list[Shard]):
    old = [token_row(f"{i:04d}", i, shape=(5, 5)) for i in range(4)]
    commit_and_die(output, Shard(inputs[0].url, 12345), old)
    new = token_rows(inputs[0], 4)
    commit(output, inputs[0], new)
    assert rows_of(output, inputs[0]) == [row.tokens.ravel().tolist() for row in new]


def test_an_invalid_token_is_refused_and_nothing_written(output: Output, inputs: list[Shard]):
    rows = token_rows(inputs[0], 4)
    rows[1].tokens[0, 0] = 1024
    before = files(output)
    with pytest.raises(ValueError, match="'0001'"):
        commit(output, inputs[0], rows)
    assert files(output) == before


# -- checks before a commit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "bad", "what"),
    [
        ([0, 1, 3], [], "lost: 2; twice: none; unknown: none"),
        ([0, 1, 3], [1, 2], "lost: none; twice: 1; unknown: none"),
        ([0, 1, 2, 2, 3], [], "lost: none; twice: 2"),
        ([0, 1, 2, 3], [4], "lost: none; twice: none; unknown: 4"),
        ([], [], "lost: 0, 1, 2, 3"),
    ],
)
def test_a_lost_or_doubled_sample_is_refused_and_nothing_written(
    output: Output, inputs: list[Shard], rows: list[int], bad: list[int], what: str
):
    before = files(output)
    rows_made = [token_row(f"{i:04d}", i) for i in rows]
    broken = [quarantined(inputs[0], i) for i in bad]
    with pytest.raises(ValueError, match=f"4 samples .*{what}"):
        commit_shard(output, inputs[0], rows_made, broken, seconds={}, now=0.0, num_samples=4)
    assert files(output) == before


def test_an_entry_has_its_source_worker_and_times(output: Output, inputs: list[Shard]):
    seconds = {"read": 1.0, "encode": 2.0, "total": 3.0}
    bad = [quarantined(inputs[0], 3)]
    entry = commit_shard(output, inputs[0], token_rows(inputs[0], 3), bad, seconds, now=1.0, num_samples=4)
    assert (entry.source_num_bytes, entry.source_version) == (inputs[0].num_bytes, inputs[0].version)
    assert entry.tokens_num_bytes == len(output.read_tokens(entry.name))
    assert entry.worker == {"host": socket.gethostname(), "pid": os.getpid()}
    assert entry.seconds["total"] == pytest.approx(3.0 + entry.seconds["write"], abs=1e-3)
    assert entry.reasons == {"decode BadSample": 1}


def test_entries_of_older_versions_load(output: Output, inputs: list[Shard]):
    entry = commit(output, inputs[0], token_rows(inputs[0], 4))
    path = Path(output.url) / "manifest" / f"{entry.name}.json"
    newer = ("source_version", "tokens_num_bytes", "worker", "reasons", "retry", "settled")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in newer}))
    [old] = output.commits()
    assert (old.num_rows, old.source_version, old.retry) == (4, None, 0)


def test_unknown_fields_of_newer_entries_are_ignored(output: Output, inputs: list[Shard]):
    entry = commit(output, inputs[0], token_rows(inputs[0], 4))
    path = Path(output.url) / "manifest" / f"{entry.name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_later": 1}))
    assert output.commits() == [entry]


@pytest.mark.parametrize("value", [-1, "4", 4.0, None])
def test_an_entry_with_an_invalid_count_is_an_error(output: Output, inputs: list[Shard], value: object):
    entry = commit(output, inputs[0], token_rows(inputs[0], 4))
    path = Path(output.url) / "manifest" / f"{entry.name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_rows": value}))
    with pytest.raises(BrokenOutput, match=r"num_rows is .*, not a count"):
        output.commits()


# -- retries ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_quarantine(output: Output, inputs: list[Shard]) -> CommittedShard:
    """Samples 1, 2 and 3 of 4 are in quarantine."""
    commit(output, inputs[0], token_rows(inputs[0], 1), [quarantined(inputs[0], i) for i in (1, 2, 3)])
    commit(output, inputs[1], token_rows(inputs[1], 3))
    history = output.committed_shard(inputs[0].name)
    assert history is not None
    return history


def retry(
    output: Output, history: CommittedShard, shard: Shard, recovered: list[int], now: float = 2.0
) -> Commit | None:
    """A retry that recovers these samples from quarantine."""
    rows = [row for row in token_rows(shard, 4) if row.source_index in recovered]
    bad = [quarantined(shard, q.source_index) for q in output.quarantined(history.last)]
    still = [sample for sample in bad if sample.source_index not in recovered]
    return commit_retry(output, shard, history, rows, still, seconds={}, now=now)


def in_quarantine(output: Output, name: str) -> list[int]:
    history = output.committed_shard(name)
    assert history is not None
    return [sample.source_index for sample in output.quarantined(history.last)]


def test_a_retry_adds_an_entry_and_changes_no_file(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    before = files(output)
    entry = retry(output, with_quarantine, inputs[0], [1, 3])
    assert entry is not None
    name = f"{inputs[0].name}+1"
    assert files(output).items() >= before.items()
    assert files(output).keys() - before.keys() == {
        *(f"tokens/{name}.parquet", f"quarantine/{name}.parquet", f"manifest/{name}.json")
    }
    assert (entry.name, entry.retry, entry.settled) == (name, 1, [1, 3])
    assert (entry.num_samples, entry.num_rows, entry.num_quarantined) == (3, 2, 1)
    assert in_quarantine(output, inputs[0].name) == [2]


def test_a_second_retry_continues_the_first(output: Output, inputs: list[Shard], with_quarantine: CommittedShard):
    retry(output, with_quarantine, inputs[0], [3])
    second = output.committed_shard(inputs[0].name)
    assert second is not None
    retry(output, second, inputs[0], [1, 2])
    assert in_quarantine(output, inputs[0].name) == []
    [shard] = [one for one in output.committed_shards() if one.first.name == inputs[0].name]
    assert [(entry.retry, entry.settled) for entry in shard.entries] == [(0, []), (1, [3]), (2, [1, 2])]
    assert (shard.num_rows, shard.num_quarantined) == (4, 0)
    assert verify(output, deep=True).problems == []


def test_a_retry_that_recovers_nothing_writes_nothing(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    before = files(output)
    assert retry(output, with_quarantine, inputs[0], []) is None
    assert files(output) == before


def test_the_first_of_two_retries_wins(output: Output, inputs: list[Shard], with_quarantine: CommittedShard):
    retry(output, with_quarantine, inputs[0], [1])
    before = files(output)
    assert retry(output, with_quarantine, inputs[0], [2, 3]) is None
    assert files(output) == before
    assert verify(output, deep=True).problems == []


def retry_and_die(output: Output, history: CommittedShard, shard: Shard, recovered: list[int]) -> Path:
    """Leaves the token file of a retry that was killed before its entry. Returns its path."""
    retry(output, history, shard, recovered)
    storage.remove(output.entry_url(f"{shard.name}+1"))
    return Path(output.tokens_url(f"{shard.name}+1"))


def test_the_rows_of_a_retry_that_died_are_committed_if_this_one_has_them_too(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    file = retry_and_die(output, with_quarantine, inputs[0], [1])
    kept = file.read_bytes()
    entry = retry(output, with_quarantine, inputs[0], [1, 2, 3])
    assert file.read_bytes() == kept
    assert entry is not None
    assert (entry.settled, in_quarantine(output, inputs[0].name)) == ([1], [2, 3])
    assert verify(output, deep=True).problems == []


def test_rows_of_another_retry_that_this_one_cannot_prove_wait_until_its_file_is_old(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    """The other retry may still be running, and its entry may be written at any moment."""
    file = retry_and_die(output, with_quarantine, inputs[0], [1])
    kept = file.read_bytes()
    assert retry(output, with_quarantine, inputs[0], [2, 3]) is None
    assert file.read_bytes() == kept
    os.utime(file, (0, 0))
    entry = retry(output, with_quarantine, inputs[0], [2, 3])
    assert entry is not None
    assert entry.settled == [2, 3]
    assert verify(output, deep=True).problems == []


def test_a_retry_replaces_a_file_with_another_token(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    file = retry_and_die(output, with_quarantine, inputs[0], [1])
    rows = [row for row in token_rows(inputs[0], 4) if row.source_index == 1]
    rows[0].tokens[0, 0] = (rows[0].tokens[0, 0] + 1) % 1024
    file.write_bytes(to_parquet(_tokens_table(output, inputs[0], rows)))
    entry = retry(output, with_quarantine, inputs[0], [1, 2])
    assert entry is not None
    assert entry.settled == [1, 2]
    assert verify(output, deep=True).problems == []


def test_a_torn_file_of_a_retry_that_died_is_replaced(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    storage.write_once(output.tokens_url(f"{inputs[0].name}+1"), b"PAR1 and nothing")
    entry = retry(output, with_quarantine, inputs[0], [2, 3])
    assert entry is not None
    assert entry.settled == [2, 3]
    assert verify(output, deep=True).problems == []


def test_many_retries_in_parallel_keep_every_sample_once(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard
):
    subsets = [[1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3], [3]]
    with ThreadPoolExecutor(len(subsets)) as pool:
        results = list(pool.map(lambda recovered: retry(output, with_quarantine, inputs[0], recovered), subsets))
    assert len([entry for entry in results if entry]) == 1
    assert verify(output, deep=True).problems == []


@pytest.mark.parametrize("recovered", [[0], [1, 1]])
def test_a_retry_of_samples_that_are_not_in_quarantine_is_refused(
    output: Output, inputs: list[Shard], with_quarantine: CommittedShard, recovered: list[int]
):
    rows = [token_row(f"{i:04d}", i) for i in recovered]
    bad = [quarantined(inputs[0], i) for i in (1, 2, 3) if i not in recovered]
    with pytest.raises(ValueError, match="Nothing was committed"):
        commit_retry(output, inputs[0], with_quarantine, rows, bad, seconds={}, now=0.0)


# -- failed shards ------------------------------------------------------------------------------------------------


def test_a_failure_note_has_the_last_reason_and_a_commit_removes_it(output: Output, inputs: list[Shard]):
    output.record_failure(inputs[0], "first", now=1.0)
    output.record_failure(inputs[0], "second", now=2.0)
    [note] = output.failures()
    assert (note["source_shard"], note["message"]) == (inputs[0].url, "second")
    commit(output, inputs[0], token_rows(inputs[0], 4))
    assert output.failures() == []


def test_a_failure_note_is_not_a_commit(output: Output, inputs: list[Shard]):
    output.record_failure(inputs[0], "broken", now=1.0)
    assert output.committed_names() == set()


# -- opening an output --------------------------------------------------------------------------------------------


def test_reopening_with_the_same_layout_is_the_same_output(output: Output, inputs: list[Shard]):
    before = files(output)
    again = Output.create(output.url, layout(), ShardList(inputs), config={"another": "machine"})
    assert again.layout == output.layout
    assert files(output) == before


def test_an_output_of_an_earlier_version_keeps_the_type_of_num_samples(output: Output, inputs: list[Shard]):
    place = Path(output.url) / "dataset.json"
    about = json.loads(place.read_text())
    del about["layout"]["num_samples_dtype"]
    place.write_text(json.dumps(about))
    again = Output.create(output.url, layout(), ShardList(inputs), config={})
    assert again.layout == Output.open(output.url).layout
    commit(again, inputs[0], token_rows(inputs[0], 4))
    [entry] = again.commits()
    assert pq.read_schema(again.tokens_url(entry.name)).field("num_samples").type == pa.int32()


def test_another_tokenizer_is_refused_by_both_names(output: Output, inputs: list[Shard]):
    with pytest.raises(OutputMismatch, match="tokenizer_id is tok-a there and tok-b here"):
        Output.create(output.url, layout(tokenizer_id="tok-b"), ShardList(inputs), config={})


@pytest.mark.parametrize(
    "change", [{"encoding": "packed"}, {"passthrough": ("txt",)}, {"codebook_size": 512}, {"member": "left.jpg"}]
)
def test_other_settings_are_refused(output: Output, inputs: list[Shard], change: dict):
    with pytest.raises(OutputMismatch, match=next(iter(change))):
        Output.create(output.url, layout(**change), ShardList(inputs), config={})


def test_an_output_with_a_newer_schema_is_refused(output: Output):
    path = Path(output.url) / "dataset.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "layout": {**about["layout"], "schema_version": 2}}))
    with pytest.raises(UnsupportedSchema, match=r"dataset\.json: schema_version is 2; this version of tokenmill reads"):
        Output.open(output.url)


def test_a_folder_without_dataset_json_is_not_an_output(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is not an output of `tokenmill tokenize`"):
        Output.open(str(tmp_path))


def test_an_output_records_every_input_shard(output: Output, inputs: list[Shard], tmp_path: Path):
    more = write_corpus(tmp_path / "more", (2,))
    Output.create(output.url, layout(), ShardList([inputs[0], *more]), config={})
    assert {shard.url for shard in output.inputs()} == {shard.url for shard in [*inputs, *more]}


def test_a_committed_shard_that_was_replaced_is_refused(output: Output, inputs: list[Shard]):
    commit(output, inputs[0], token_rows(inputs[0], 4))
    replaced = Shard(inputs[0].url, (inputs[0].num_bytes or 0) + 512)
    with pytest.raises(OutputMismatch, match=f"{inputs[0].url} has {replaced.num_bytes} bytes now"):
        Output.create(output.url, layout(), ShardList([replaced, inputs[1]]), config={})


def test_a_committed_shard_of_the_same_size_but_another_version_is_refused(output: Output, inputs: list[Shard]):
    commit(output, inputs[0], token_rows(inputs[0], 4))
    replaced = Shard(inputs[0].url, inputs[0].num_bytes, version="etag-2")
    with pytest.raises(OutputMismatch, match=f"is version etag-2 now, but was {inputs[0].version}.*another output"):
        Output.create(output.url, layout(), ShardList([replaced, inputs[1]]), config={})


def test_a_shard_that_changed_before_its_commit_is_accepted(output: Output, inputs: list[Shard]):
    replaced = Shard(inputs[0].url, (inputs[0].num_bytes or 0) + 512)
    Output.create(output.url, layout(), ShardList([replaced, inputs[1]]), config={})


def test_a_missing_shard_that_was_committed_is_accepted(output: Output, inputs: list[Shard]):
    commit(output, inputs[0], token_rows(inputs[0], 4))
    Output.create(output.url, layout(), ShardList([Shard(inputs[0].url, None)]), config={})


def test_a_shard_committed_without_its_size_does_not_count_as_replaced(output: Output, inputs: list[Shard]):
    commit(output, Shard(inputs[0].url, None), token_rows(inputs[0], 4))
    Output.create(output.url, layout(), ShardList(inputs), config={})


def test_an_entry_that_is_not_json_is_an_error_with_its_name(output: Output):
    storage.write_once(storage.join(output.url, "manifest", "x.json"), b'{"name": ')
    with pytest.raises(ValueError, match=r"manifest/x\.json is not a manifest entry"):
        output.commits()


def test_an_entry_with_a_count_that_no_shard_can_have_is_an_error(output: Output, inputs: list[Shard]):
    """Sums of such counts would overflow in readers."""
    commit(output, inputs[0], token_rows(inputs[0], 4))
    path = Path(output.entry_url(inputs[0].name))
    path.write_text(path.read_text().replace('"num_rows": 4', f'"num_rows": {10**19}'))
    with pytest.raises(BrokenOutput, match="num_rows is 10000000000000000000, not a count"):
        output.commits()


def test_everything_works_on_another_file_system(tmp_path: Path):
    inputs = write_corpus(tmp_path / "in", (2,))
    output = Output.create("memory://an-output", layout(), ShardList(inputs), config={})
    first = commit(output, inputs[0], token_rows(inputs[0], 2))
    assert commit(output, inputs[0], token_rows(inputs[0], 2), now=9.0) == first
    assert verify(Output.open("memory://an-output"), deep=True).problems == []


def test_dataset_json_has_layout_inputs_and_configuration(output: Output, inputs: list[Shard]):
    about = json.loads(storage.read(f"{output.url}/dataset.json"))
    assert about == output.about()
    assert about["layout"]["tokenizer_id"] == "tok-a"
    assert about["input_manifest_id"] == ShardList(inputs).id
    assert about["config"] == {"a": 1}


def test_the_bytes_of_a_token_shard_do_not_depend_on_the_run(output: Output, inputs: list[Shard]):
    commit(output, inputs[0], token_rows(inputs[0], 4), now=1.0)
    kept = output.read_tokens(inputs[0].name)
    shutil.rmtree(output.url)
    again = Output.create(output.url, layout(), ShardList(inputs), config={"another": "machine"})
    commit(again, inputs[0], token_rows(inputs[0], 4), now=2.0)
    assert again.read_tokens(inputs[0].name) == kept
