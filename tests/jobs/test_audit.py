"""The audit reproduces the rows, and finds a single wrong token."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.audit import AuditWorker, Compared, draw
from jobs.config import TokensConfig
from pipeline.corpus.shards import Shard, find_shards
from pipeline.tokens import Commit, Output
from pipeline.tokens.commit import hash_samples
from pipeline.tokens.schema import to_parquet, tokens_as_lists
from tests.corpus import tar_bytes
from tests.jobs.helpers import here, jpegs, save_tiny_tokenizer, tokenize_without_ray


@pytest.fixture(params=["list", "packed"])
def output(request: pytest.FixtureRequest, tokenizer: str, tmp_path: Path) -> Output:
    """Two shards; the second has images of two sizes."""
    (tmp_path / "a.tar").write_bytes(tar_bytes(jpegs(3)))
    (tmp_path / "b.tar").write_bytes(tar_bytes([*jpegs(4, 80, 64), ("small.jpg", jpegs(1, 24, 24)[0][1])]))
    options = TokensConfig(encoding=request.param)
    return tokenize_without_ray(f"{tmp_path}/*.tar", tokenizer, tmp_path / "out", options)


def shard(output: Output, index: int = 0) -> Shard:
    return find_shards(output.inputs()[index].url).shards[0]


def audit(output: Output, tokenizer: str, index: int = 0, rows: tuple[int, ...] = (0, 2)) -> Compared:
    """Runs the job's worker on these rows of a shard."""
    drawn = {shard(output, index).name: list(rows)}
    found = here(AuditWorker, tokenizer, output_url=output.url, drawn=drawn).process(shard(output, index))
    assert isinstance(found, Compared)
    return found


def forge(output: Output, row: int, change: int = 1) -> None:
    """Changes the first token of a row of the first shard, and updates the checksums in the entry, as if a worker had
    computed another token."""
    name = shard(output).name
    path, entry = Path(output.tokens_url(name)), Path(output.url) / "manifest" / f"{name}.json"
    table = pq.read_table(path)
    column, dtype = table["tokens"].combine_chunks(), output.layout.token_dtype
    lists = tokens_as_lists(column, dtype).to_pylist()
    lists[row][0] = (lists[row][0] + change) % output.layout.codebook_size
    tokens = [np.array(row, dtype).tobytes() for row in lists]
    values = tokens if pa.types.is_binary(column.type) else lists
    at = table.column_names.index("tokens")
    data = to_parquet(table.set_column(at, table.schema.field("tokens"), pa.array(values, column.type)))
    path.write_bytes(data)
    digest = {"tokens_sha256": hashlib.sha256(data).hexdigest(), "tokens_num_bytes": len(data)}
    digest["samples_sha256"] = hash_samples(zip(table["key"].to_pylist(), tokens, strict=True))
    entry.write_text(json.dumps({**json.loads(entry.read_text()), **digest}))


# -- one shard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "rows"), [(0, (0, 2)), (0, (1,)), (1, (0, 1, 2, 3, 4)), (1, (4,))])
def test_rows_made_again_are_the_same(output: Output, tokenizer: str, index: int, rows: tuple[int, ...]):
    result = audit(output, tokenizer, index, rows)
    assert (result.num_rows, result.num_tokens_differing, result.differing, result.failure) == (len(rows), 0, [], None)
    assert result.num_tokens > 0


def test_one_wrong_token_is_found_and_its_key_named(output: Output, tokenizer: str):
    forge(output, row=2)
    result = audit(output, tokenizer)
    assert result.num_tokens_differing == 1
    [difference] = result.differing
    assert difference.startswith("0002 (sample 2 of ")
    assert difference.endswith("1 of 30 tokens differ")


def test_a_row_that_was_not_drawn_is_not_looked_at(output: Output, tokenizer: str):
    forge(output, row=1)
    assert audit(output, tokenizer).differing == []


def test_a_sample_that_became_unreadable_differs(output: Output, tokenizer: str):
    broken = [*jpegs(2), ("0002.jpg", b"no picture")]
    Path(shard(output).url).write_bytes(tar_bytes(broken))
    [difference] = audit(output, tokenizer).differing
    assert "can no longer be tokenized (decode: not a picture" in difference


def test_a_shard_that_lost_its_end_differs(output: Output, tokenizer: str):
    Path(shard(output).url).write_bytes(tar_bytes(jpegs(2)))
    [difference] = audit(output, tokenizer).differing
    assert "the shard ends before it" in difference


def test_another_sample_in_the_place_differs(output: Output, tokenizer: str):
    Path(shard(output).url).write_bytes(tar_bytes([("new.jpg", jpegs(1)[0][1]), *jpegs(3)[1:]]))
    [difference] = audit(output, tokenizer).differing
    assert difference.startswith("0000")
    assert "the shard now has 'new' there" in difference


def test_a_missing_file_is_reported_and_nothing_compared(output: Output, tokenizer: str):
    listed = shard(output)
    Path(output.tokens_url(listed.name)).unlink()
    result = audit(output, tokenizer)
    assert result.num_rows == 0
    assert result.failure
    assert listed.name in result.failure


# -- the draw -----------------------------------------------------------------------------------------------------


def entry(name: str, num_rows: int) -> Commit:
    counts = {"num_samples": num_rows, "num_rows": num_rows, "num_quarantined": 0, "num_tokens": 0}
    ids = {"tokenizer_id": "t", "codebook_id": "c", "tokens_sha256": "", "quarantine_sha256": None}
    return Commit(name, "s", None, **counts, **ids)


ENTRIES = [entry("a", 3), entry("b", 5), entry("b+1", 2)]


def pairs(drawn: dict[str, list[int]]) -> list[tuple[str, int]]:
    return [(name, row) for name, rows in drawn.items() for row in rows]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 4), (10, 10), (100, 10)])
def test_as_many_rows_as_asked_for_are_drawn_or_all(count: int, expected: int):
    drawn = pairs(draw(ENTRIES, count, seed=0))
    assert len(drawn) == len(set(drawn)) == expected
    assert all(0 <= row < {"a": 3, "b": 5, "b+1": 2}[name] for name, row in drawn)


def test_every_row_is_as_likely_as_any_other():
    times = Counter(pair for seed in range(1000) for pair in pairs(draw(ENTRIES, 3, seed)))
    assert len(times) == 10
    assert all(240 < count < 360 for count in times.values())  # 300, give or take 4 standard deviations


def test_a_seed_always_draws_the_same():
    assert draw(ENTRIES, 4, seed=3) == draw(ENTRIES, 4, seed=3) != draw(ENTRIES, 4, seed=4)


def test_an_empty_output_gives_no_rows():
    assert draw([], 4, seed=0) == {}


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_passes_equal_rows_and_names_different_ones(
    output: Output, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    command = ["audit", f"output={output.url}", f"tokenizer={tokenizer}", "workers.count=1"]
    before = sorted(path for path in Path(output.url).rglob("*"))
    assert main(command) == 0
    assert "audit: 8 of 8 rows are the same as in" in capsys.readouterr().out
    assert sorted(path for path in Path(output.url).rglob("*")) == before
    forge(output, row=1)
    assert main(["verify", f"output={output.url}", "verify.deep=true"]) == 0  # no other check could find it
    assert main(command) == 3
    printed = capsys.readouterr().out
    assert "audit: differs: 0001 (sample 1 of" in printed
    assert "audit: 7 of 8 rows are the same as in" in printed


def test_another_tokenizer_is_refused(output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    assert main(["audit", f"output={output.url}", f"tokenizer={other}"]) == 2
    assert "was written by tokenizer" in capsys.readouterr().err


def test_a_replaced_shard_is_refused(output: Output, tokenizer: str, capsys: pytest.CaptureFixture[str]):
    Path(shard(output).url).write_bytes(tar_bytes(jpegs(2)))
    assert main(["audit", f"output={output.url}", f"tokenizer={tokenizer}"]) == 2
    assert "it was replaced" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["0", "-1"])
def test_an_audit_of_no_rows_is_refused(output: Output, rows: str, capsys: pytest.CaptureFixture[str]):
    assert main(["audit", f"output={output.url}", f"audit.rows={rows}"]) == 2
    assert f"audit.rows is {rows}" in capsys.readouterr().err
