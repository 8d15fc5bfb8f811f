"""OUT/index.json: it saves reading the entries, and never changes what is read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.corpus.shards import find_shards
from pipeline.errors import BrokenOutput
from pipeline.tokens import Output, TokenDataset, commit_shard
from pipeline.tokens.index import counted, write_index
from tests.corpus import token_rows, write_tokens

COUNTS = [("photos-000", 5), ("photos-001", 0), ("photos-002", 7), ("photos-003", 3)]


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return write_tokens(tmp_path)


def counts(output: Output) -> list[tuple[str, int]]:
    return [(entry.name.rsplit("-", 1)[0], entry.num_rows) for entry in counted(output)]


def entries_read(output: Output, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many manifest entries `counted` reads."""
    read: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read", lambda url, _read=storage.read: (read.append(url), _read(url))[1])
        counted(output)
    return sum("/manifest/" in url for url in read)


def test_the_index_agrees_with_the_entries(output: Output):
    assert counts(output) == COUNTS
    write_index(output)
    assert counts(output) == COUNTS
    assert [(entry.name, entry.num_tokens) for entry in counted(output)] == [
        (entry.name, entry.num_tokens) for entry in output.commits()
    ]


def test_it_saves_reading_all_entries_but_new_ones(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert entries_read(output, monkeypatch) == 4
    write_index(output)
    assert entries_read(output, monkeypatch) == 0
    shutil.copy(tmp_path / "in/photos-000.tar", tmp_path / "in/photos-004.tar")
    [shard] = find_shards(str(tmp_path / "in/photos-004.tar")).shards
    commit_shard(output, shard, token_rows(shard, 2), [], seconds={}, now=0.0)
    assert entries_read(output, monkeypatch) == 1
    assert TokenDataset(output.url).num_rows == 17


def test_an_entry_that_was_removed_or_changed_is_not_taken_from_it(output: Output, monkeypatch: pytest.MonkeyPatch):
    write_index(output)
    first, second = (Path(output.entry_url(entry.name)) for entry in output.commits()[:2])
    first.unlink()
    second.write_text(second.read_text())
    os.utime(second, ns=(1, 1))
    assert counts(output) == COUNTS[1:]
    assert entries_read(output, monkeypatch) == 1


def test_a_damaged_entry_is_an_error_with_and_without_an_index(output: Output):
    entry = Path(output.entry_url(output.commits()[0].name))
    write_index(output)
    entry.unlink()
    entry.mkdir()
    with pytest.raises(BrokenOutput, match=f"manifest/{entry.name} is not a manifest entry"):
        TokenDataset(output.url)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text(file.read_text().replace(",5,", ",6,")),
        lambda file: file.write_text(file.read_text()[:-9]),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text(json.dumps({"sha256": 1, "entries": [1]})),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), file.symlink_to("nowhere")),
    ],
    ids=["another number", "cut", "a list", "other entries", "a folder", "a broken link"],
)
def test_a_damaged_index_is_ignored_and_made_again(output: Output, damage, monkeypatch: pytest.MonkeyPatch):
    write_index(output)
    damage(Path(output.index_url()))
    assert counts(output) == COUNTS
    assert entries_read(output, monkeypatch) == 4
    write_index(output)
    assert entries_read(output, monkeypatch) == 0
