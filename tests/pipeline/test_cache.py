"""The local cache of remote objects: it saves downloads, stays below its bound, and never returns damaged bytes."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.corpus.shards import find_shards
from pipeline.errors import StorageError
from pipeline.storage.cache import FileCache
from pipeline.tokens import Output, TokenDataset, commit_shard
from tests.corpus import layout, token_rows, write_corpus
from tests.s3 import S3Server


@pytest.fixture
def objects(tmp_path: Path) -> list[str]:
    """Four objects of 100 bytes."""
    for i in range(4):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 100)
    return [str(tmp_path / f"{i}") for i in range(4)]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_an_object_is_downloaded_once_per_version(objects: list[str], tmp_path: Path):
    cache = FileCache(tmp_path / "cache", 1000)
    assert cache.read(objects[1], "a") == bytes([1]) * 100
    Path(objects[1]).write_bytes(b"new")
    assert cache.read(objects[1], "a") == bytes([1]) * 100
    assert cache.read(objects[1], "b") == b"new"


def test_what_was_read_longest_ago_goes_first(objects: list[str], tmp_path: Path):
    cache = FileCache(tmp_path / "cache", 300)  # room for two objects with their checksums
    for url in (objects[0], objects[1], objects[0], objects[2]):
        cache.read(url, "a")
        for age, file in enumerate(sorted((tmp_path / "cache").iterdir(), key=os.path.getmtime, reverse=True)):
            os.utime(file, (1000 - age, 1000 - age))  # clocks of file systems are coarse
        assert size_of(tmp_path / "cache") <= 300
    for url in objects[:3]:
        os.remove(url)
    assert cache.read(objects[0], "a") == bytes([0]) * 100
    assert cache.read(objects[2], "a") == bytes([2]) * 100
    with pytest.raises(FileNotFoundError):
        cache.read(objects[1], "a")


def test_an_object_above_the_bound_is_not_kept(objects: list[str], tmp_path: Path):
    assert FileCache(tmp_path / "cache", 99).read(objects[0], "a") == bytes(100)
    assert not (tmp_path / "cache").exists()


def test_files_of_others_in_the_folder_stay(objects: list[str], tmp_path: Path):
    folder = tmp_path / "cache"
    (folder / "run").mkdir(parents=True)
    (folder / "thesis.tex").write_bytes(bytes(500))
    (folder / ".tmp-of-another").write_bytes(bytes(500))
    for file in ("thesis.tex", ".tmp-of-another"):
        os.utime(folder / file, (0, 0))
    cache = FileCache(folder, 300)
    for url in objects:
        assert cache.read(url, "a") == Path(url).read_bytes()
    assert {"run", "thesis.tex", ".tmp-of-another"} < {file.name for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in folder.glob("*.copy")) <= 300


def test_an_unfinished_file_goes_when_its_writer_must_have_died(objects: list[str], tmp_path: Path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age in (("old", 7200), ("new", 60)):
        (folder / f".tmp-cache-{name}").write_bytes(b"unfinished")
        os.utime(folder / f".tmp-cache-{name}", (time.time() - age, time.time() - age))
    FileCache(folder, 1000).read(objects[0], "a")
    assert [file.name for file in folder.glob(".tmp-cache-*")] == [".tmp-cache-new"]


def read_often(arguments: tuple[Path, list[str], int]) -> int:
    """Reads the objects in a random order through a small cache; how many reads gave the right bytes."""
    folder, urls, seed = arguments
    cache, rng = FileCache(folder, 250), random.Random(seed)
    return sum(cache.read(url, "a") == Path(url).read_bytes() for url in rng.choices(urls, k=200))


def test_processes_share_a_folder_that_is_too_small(objects: list[str], tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(read_often, [(tmp_path / "cache", objects, seed) for seed in range(4)])
    assert found == [200] * 4
    assert size_of(tmp_path / "cache") <= 250


@pytest.mark.parametrize("damage", [b"", b"cut", None])
def test_a_damaged_copy_is_downloaded_again(objects: list[str], tmp_path: Path, damage: bytes | None):
    cache = FileCache(tmp_path / "cache", 1000)
    cache.read(objects[3], "a")
    [copy] = (tmp_path / "cache").iterdir()
    copy.write_bytes(copy.read_bytes()[:-1] + b"x" if damage is None else damage)
    assert cache.read(objects[3], "a") == bytes([3]) * 100
    assert copy.stat().st_size == 132


def test_a_folder_that_cannot_be_used_is_named(objects: list[str], tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"cache: the local cache cannot be used .*choose another folder"):
        FileCache(tmp_path / "cache", 1000).read(objects[0], "a")


@pytest.mark.s3
def test_a_second_pass_reads_no_token_file_from_storage(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch)
    write_corpus(tmp_path / "in", (3, 4))
    inputs = find_shards(str(tmp_path / "in/*.tar"))
    output = Output.create(f"{s3.url}/cached", layout(), inputs, {})
    for shard, count in zip(inputs.shards, (3, 4), strict=True):
        commit_shard(output, shard, token_rows(shard, count), [], seconds={}, now=0.0)
    dataset = TokenDataset(output.url, cache=str(tmp_path / "cache"), cache_gb=1)
    first = [row["key"] for row in dataset]
    for entry in output.commits():
        storage.remove(output.tokens_url(entry.name))
    assert [row["key"] for row in dataset] == first
    assert len(dataset.lengths()) == 7
