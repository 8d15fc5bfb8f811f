"""The status of an output, computed by hand."""

import json
from pathlib import Path

import pytest

from jobs.__main__ import main
from jobs.status import encoder_idle, summarise
from pipeline.corpus.shards import Shard, ShardList
from pipeline.tokens import Commit, Output, Quarantined, commit_retry, commit_shard
from tests.corpus import layout, quarantined, token_rows, write_corpus


@pytest.fixture
def inputs(tmp_path: Path) -> list[Shard]:
    return write_corpus(tmp_path / "in", (4, 3, 2, 2))


@pytest.fixture
def output(tmp_path: Path, inputs: list[Shard]) -> Output:
    """Two shards done in 10 s, with three bad samples of two kinds; one failed; one left."""
    output = Output.create(str(tmp_path / "out"), layout(), ShardList(inputs), config={})
    bad = [quarantined(inputs[0], 3), Quarantined("x", 2, "read", "BadSample", "no")]
    commit_shard(output, inputs[0], token_rows(inputs[0], 2), bad, {"encode": 1.0, "total": 4.0}, now=100.0)
    rows = token_rows(inputs[1], 2)
    commit_shard(output, inputs[1], rows, [quarantined(inputs[1], 2)], {"encode": 2.0, "total": 4.0}, now=110.0)
    output.record_failure(inputs[2], "photos-002.tar: cut short\nand more", now=111.0)
    return output


def test_counts_reasons_and_failures_are_reported(output: Output):
    summary = summarise(output)
    assert summary["shards"] == {"done": 2, "left": 2, "retries": 0}
    assert (summary["samples"], summary["quarantined"]) == (4, 3)
    assert summary["reasons"] == {"decode BadSample": 2, "read BadSample": 1}
    assert summary["failed"] == ["photos-002.tar: cut short"]


def test_rate_and_time_left_are_of_the_last_commits(output: Output):
    rate = summarise(output)["rate"]
    assert (rate["samples_per_s"], rate["left_s"], rate["commits"]) == (0.2, 20.0, 2)


def test_a_retry_moves_samples_out_of_quarantine(output: Output, inputs: list[Shard]):
    history = output.committed_shard(inputs[0].name)
    assert history is not None
    bad = [sample for sample in output.quarantined(history.last) if sample.source_index == 2]
    commit_retry(output, inputs[0], history, token_rows(inputs[0], 4)[3:], bad, seconds={}, now=0.0)
    summary = summarise(output)
    assert summary["shards"] == {"done": 2, "left": 2, "retries": 1}
    assert (summary["samples"], summary["quarantined"]) == (5, 2)
    assert summary["reasons"] == {"decode BadSample": 1, "read BadSample": 1}


def test_an_entry_without_reasons_is_said_to_have_none(output: Output, inputs: list[Shard]):
    path = Path(output.url) / "manifest" / f"{inputs[1].name}.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "reasons"}))
    assert summarise(output)["reasons"]["reason only in the quarantine file (older entry)"] == 1


def entry(at: float, seconds: dict[str, float], pid: int = 1) -> Commit:
    counts = {"num_samples": 1, "num_rows": 1, "num_quarantined": 0, "num_tokens": 1}
    ids = {"tokenizer_id": "t", "codebook_id": "c", "tokens_sha256": "", "quarantine_sha256": None}
    worker = {"host": "h", "pid": pid}
    return Commit("n", "s", None, **counts, **ids, committed_at=at, seconds=seconds, worker=worker)


@pytest.mark.parametrize(
    ("entries", "idle"),
    [
        ([entry(10, {"encode": 6, "total": 8})], 0.25),
        ([entry(10, {"encode": 3, "total": 8}), entry(12, {"encode": 3, "total": 8})], 0.4),  # two in hand: 2 to 12
        ([entry(10, {"encode": 4, "total": 8}), entry(30, {"encode": 4, "total": 8})], 0.5),  # the pause does not count
        ([entry(10, {"encode": 4, "total": 8}), entry(10, {"encode": 8, "total": 8}, pid=2)], 0.25),
        ([entry(10, {"encode": 3, "wait": 1})], 0.25),  # an entry without a total has the sum of its stages
        ([entry(10, {})], None),
        ([], None),
    ],
)
def test_the_encoder_is_idle_while_its_worker_has_a_shard_but_does_not_encode(entries: list[Commit], idle: float):
    assert encoder_idle(entries) == (None if idle is None else pytest.approx(idle))


def test_status_prints_it_all(output: Output, capsys: pytest.CaptureFixture[str]):
    assert main(["status", f"output={output.url}"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "2 done, 2 left (1 failed last time)",
        "2 decode BadSample",
        "20s left",
        "cut short",
        "encoder      idle",
    ):
        assert words in printed


def test_status_as_json_is_the_same(output: Output, capsys: pytest.CaptureFixture[str]):
    assert main(["status", f"output={output.url}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summarise(output)


def test_an_output_without_commits_has_no_rate(tmp_path: Path, inputs: list[Shard]):
    summary = summarise(Output.create(str(tmp_path / "new"), layout(), ShardList(inputs), config={}))
    assert (summary["rate"], summary["encoder_idle"], summary["shards"]["left"]) == (None, None, 4)
