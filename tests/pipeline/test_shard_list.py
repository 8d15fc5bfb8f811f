"""The shards that a job reads: from data.shards to a ShardList with an id."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.errors import NoShards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("train-000.tar", "train-001.tar", "train-002.tar", "more/train-000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def names(shard_list: ShardList, root: Path) -> list[str]:
    return [str(Path(shard.url).relative_to(root)) for shard in shard_list.shards]


def test_braces_expand_to_each_shard(shards: Path):
    assert names(find_shards(f"{shards}/train-{{000..001}}.tar"), shards) == ["train-000.tar", "train-001.tar"]


def test_glob_finds_shards_in_order(shards: Path):
    expected = ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert names(find_shards(f"{shards}/train-*.tar"), shards) == expected


def test_double_star_searches_folders(shards: Path):
    assert len(find_shards(f"{shards}/**/*.tar").shards) == 4


def test_a_list_of_patterns_is_joined_without_duplicates(shards: Path):
    found = find_shards([f"{shards}/train-00[01].tar", f"{shards}/more/../train-001.tar", f"{shards}/more/*.tar"])
    assert names(found, shards) == ["more/train-000.tar", "train-000.tar", "train-001.tar"]


def test_order_of_the_list_does_not_matter(shards: Path):
    urls = [f"{shards}/train-00{i}.tar" for i in range(3)]
    assert find_shards(urls).id == find_shards(urls[::-1]).id


def test_urls_keep_their_protocol():
    storage.write_once("memory://corpus/a.tar", b"123")
    assert find_shards("memory://corpus/*.tar").shards == [Shard("memory://corpus/a.tar", 3)]


def test_a_missing_shard_between_braces_stays_in_the_list(shards: Path):
    found = find_shards(f"{shards}/{{train-000,gone}}.tar")
    assert [(Path(s.url).name, s.num_bytes) for s in found.shards] == [("gone.tar", None), ("train-000.tar", 13)]


def test_a_glob_without_matches_is_an_error(shards: Path):
    with pytest.raises(ValueError, match=r"nothing matches .*gone-\*\.tar"):
        find_shards([f"{shards}/train-*.tar", f"{shards}/gone-*.tar"])


def test_a_name_that_leads_to_nothing_is_an_error_with_the_nearest_name(shards: Path):
    with pytest.raises(NoShards, match=r"/train-00\.tar does not exist; did you mean .*/train-00\d\.tar\?"):
        find_shards([f"{shards}/train-000.tar", f"{shards}/train-00.tar"])
    with pytest.raises(NoShards, match=r"/gone/\{\.\.\}|/gone/0\.tar does not exist"):
        find_shards(f"{shards}/gone/{{0..9}}.tar")


def test_a_folder_is_an_error_with_the_shards_in_it_or_below(shards: Path):
    with pytest.raises(NoShards, match=rf"{shards} is a folder, not a shard; did you mean {shards}/\*\.tar\?"):
        find_shards(str(shards))
    with pytest.raises(NoShards, match=rf"did you mean {shards}/more/\*\.tar\?"):
        find_shards([f"{shards}/more"])
    with pytest.raises(NoShards, match=rf"nothing matches .*; did you mean {shards}/more/\*\.tar\?"):
        find_shards(f"{shards}/more/*.tgz")
    (shards / "empty").mkdir()
    with pytest.raises(NoShards, match=r"empty is a folder, not a shard; a folder of pictures"):
        find_shards(f"{shards}/empty/")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '[{"num_bytes": 3}]', '[{"url": null}]'])
def test_a_damaged_list_is_an_error(text: str):
    with pytest.raises(ValueError):  # noqa: PT011  the caller names the file
        ShardList.from_json(text)


@pytest.mark.parametrize("nothing", [[], ()])
def test_an_empty_list_is_an_error(nothing: list[str]):
    with pytest.raises(ValueError, match=r"data\.shards names no shards"):
        find_shards(nothing)


def test_id_changes_with_size_and_list(shards: Path):
    ids = [find_shards(f"{shards}/train-*.tar").id, find_shards(f"{shards}/train-*.tar").id]
    (shards / "train-001.tar").write_bytes(b"longer than before")
    ids.append(find_shards(f"{shards}/train-*.tar").id)
    (shards / "train-002.tar").unlink()
    ids.append(find_shards(f"{shards}/train-*.tar").id)
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_a_shard_list_round_trips_through_json(shards: Path):
    shard_list = find_shards([f"{shards}/train-*.tar", f"{shards}/{{train-000,gone}}.tar"])
    assert ShardList.from_json(shard_list.to_json()) == shard_list


def test_a_replaced_shard_of_the_same_size_changes_its_version_but_not_the_id(shards: Path):
    before = find_shards(f"{shards}/train-*.tar")
    (shards / "train-001.tar").write_bytes(b"other content"[:13])
    os.utime(shards / "train-001.tar", ns=(1, 1))
    after = find_shards(f"{shards}/train-*.tar")
    assert [a == b for a, b in zip(before.shards, after.shards, strict=True)] == [True, False, True]
    assert (before.id, after.shards[1].version) == (after.id, "1")


def test_lists_without_versions_keep_their_id():
    text = '[\n {\n  "url": "/a.tar",\n  "num_bytes": 3\n }\n]'  # as older versions wrote it
    assert ShardList.from_json(text).shards == [Shard("/a.tar", 3)]
    assert ShardList.from_json(text).id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_unknown_fields_of_a_newer_version_are_ignored():
    text = '[{"url": "/a.tar", "num_bytes": 3, "version": "7", "added_later": 1}]'
    assert ShardList.from_json(text).shards == [Shard("/a.tar", 3, "7")]


def test_many_named_shards_are_looked_up(shards: Path):
    found = find_shards(f"{shards}/train-{{000..499}}.tar").shards
    assert [(shard.num_bytes, bool(shard.version)) for shard in found] == [(13, True)] * 3 + [(None, False)] * 497


def test_the_same_stem_in_two_folders_gives_two_names(shards: Path):
    first, second = find_shards(f"{shards}/**/train-000.tar").shards
    assert first.name != second.name
    assert first.name.startswith("train-000-")
    assert second.name.startswith("train-000-")


def test_the_name_does_not_depend_on_the_spelling_of_the_path(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shards)
    assert find_shards("train-000.tar").shards == find_shards(f"file://{shards}/./train-000.tar").shards


def test_the_names_of_100_000_shards_are_unique():
    names = {Shard(f"s3://corpus/v1.0-{i:06d}.tar", 1).name for i in range(100_000)}
    assert len(names) == 100_000


@pytest.mark.parametrize("name", ["a.jpg", "b.WAV", "c.parquet"])
def test_pictures_sounds_and_tables_are_no_shards(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"data")
    for pattern in (f"{tmp_path}/{name}", f"{tmp_path}/*", [f"{tmp_path}/{name}"]):
        with pytest.raises(NoShards, match=rf"{name} is no WebDataset tar; .*tokenmill pack pack\.source="):
            find_shards(pattern)


def test_a_relative_pattern_says_where_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoShards, match=rf"nothing matches 'corpus/\*\.tar'; relative paths start in {tmp_path}"):
        find_shards("corpus/*.tar")
