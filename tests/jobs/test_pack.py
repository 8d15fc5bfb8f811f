"""Folders to shards, and back: nothing is lost, changed or renamed on the way, and what is skipped is counted."""

import os
import signal
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import webdataset

from jobs.__main__ import main
from jobs.config import ConfigError
from jobs.packing.sample import Packed
from jobs.packing.shards import in_processes, write_shard
from tests.jobs.packs import PICTURES, logged, pack, packed

PICTURE = PICTURES["p0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures in two folders, with a caption each, and one file in capitals."""
    for i, (key, data) in enumerate(PICTURES.items()):
        place = tmp_path / "source" / ("a" if i < 3 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{key}.jpg").write_bytes(data)
        (place / f"{key}.txt").write_text(f"caption of {key}")
    (tmp_path / "source/a/p0.JSON").write_text("{}")
    return tmp_path / "source"


def folder_of(root: Path, *names: str) -> Path:
    """A folder with the same picture under each of these names."""
    for name in names:
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "source" / name).write_bytes(PICTURE)
    return root / "source"


def by_webdataset(target: Path) -> dict[str, dict[str, bytes]]:
    """Key to members, as webdataset's own reader finds them."""
    shards = [str(file) for file in sorted(target.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    found = {s["__key__"]: {n: v for n, v in s.items() if n not in ("__key__", "__url__")} for s in samples}
    assert len(found) == len(samples)
    for members in found.values():
        members.pop("__local_path__", None)
    return found


# -- what becomes a sample ----------------------------------------------------------------------------------------


def test_a_folder_comes_back_file_by_file(folder: Path, tmp_path: Path):
    assert pack(folder, tmp_path / "out") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["s-000.tar", "s-001.tar", "s-002.tar"]
    found = packed(tmp_path / "out")
    assert set(found) == {"a/p0", "a/p1", "a/p2", "b/c/p3", "b/c/p4"}
    for key, members in found.items():
        name = key.rsplit("/", 1)[1]
        assert members["jpg"] == PICTURES[name]
        assert members["txt"] == f"caption of {name}".encode()
    assert set(found["a/p0"]) == {"jpg", "txt", "json"}


def test_webdatasets_own_reader_finds_the_same(folder: Path, tmp_path: Path):
    pack(folder, tmp_path / "out")
    assert by_webdataset(tmp_path / "out") == packed(tmp_path / "out")


def test_the_last_dot_of_a_picture_ends_its_key(tmp_path: Path):
    names = ("Screenshot 2024-01-05 at 10.23.45", "Screenshot 2024-01-05 at 10.23.59", "a.v1", "a.v2", "a")
    assert pack(folder_of(tmp_path, *(f"{name}.jpg" for name in names)), tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert {unquote_to_bytes(key).decode() for key in found} == set(names)
    assert found["a%2Ev1"] == {"jpg": PICTURE}
    assert by_webdataset(tmp_path / "out") == found


def test_names_of_any_kind_are_the_same_for_every_reader_and_can_be_recovered(tmp_path: Path):
    odd = ["100%", "per%20cent", "%2E", "日本", "a\nb", "-dash", "q'\"", "x y", "b.c/d.e", "__data__/f", "__g__"]
    source = folder_of(tmp_path, *(f"{name}.jpg" for name in odd))
    (source / os.fsdecode(b"caf\xe9.jpg")).write_bytes(PICTURE)
    assert pack(source, tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert by_webdataset(tmp_path / "out") == found
    assert {unquote_to_bytes(key) for key in found} == {*(name.encode() for name in odd), b"caf\xe9"}


def test_other_files_belong_to_the_picture_with_the_longest_name_in_theirs(tmp_path: Path):
    source = folder_of(tmp_path, "a.jpg", "a.v1.jpg")
    for name in ("a.txt", "a.v1.txt", "a.v1.caption.txt", "a.jpg.json", "a._meta.json"):
        (source / name).write_text(name)
    assert pack(source, tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert set(found["a"]) == {"jpg", "txt", "jpg.json", "_meta.json"}
    assert set(found["a%2Ev1"]) == {"jpg", "txt", "caption.txt"}
    assert by_webdataset(tmp_path / "out") == found


def test_two_files_that_would_be_one_member_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "a/p0.JPG").write_bytes(b"another picture of the same name")
    assert pack(folder, tmp_path / "out") == 2
    assert "p0.jpg and " in (line := logged(capsys))
    assert "p0.JPG would become the same member" in line


def test_pictures_that_share_a_sample_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(folder_of(tmp_path, "a.jpg", "a.png", "b.jpg"), tmp_path / "out") == 0
    assert "samples with several members that hold image data: 1, such as a (jpg, png)" in capsys.readouterr().out


# -- what is skipped ----------------------------------------------------------------------------------------------


def test_files_that_are_no_samples_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    junk = ("README", "LICENSE", "notes.txt", ".DS_Store", ".git/x.jpg", "__MACOSX/._a.jpg", "Thumbs.db", "desktop.ini")
    unfinished = ("a.jpg.part", "a.jpg~", "b.jpg.crdownload")
    assert pack(folder_of(tmp_path, "a.jpg", "a.__key__", *junk, *unfinished), tmp_path / "out") == 0
    assert set(packed(tmp_path / "out")) == {"a"}
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "pack: skipped files and folders of the operating system: 3, such as Thumbs.db",
        "pack: skipped unfinished downloads and backups: 3, such as a.jpg.part",
        "pack: skipped files without an extension, which belong to no image file: 2, such as LICENSE",
        "pack: skipped hidden files and folders: 2, such as .DS_Store",
        "pack: skipped .txt files, which belong to no image file: 1, such as notes.txt",
        "pack: skipped names that webdataset reserves for itself: 1, such as a.__key__",
    ]


def test_links_are_followed_and_circles_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = folder_of(tmp_path, "real/a.jpg")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.jpg").write_bytes(PICTURE)
    links = {
        "away": tmp_path / "elsewhere",
        "file.jpg": source / "real/a.jpg",
        "real/up": source,
        "gone.jpg": source / "x",
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    assert pack(source, tmp_path / "out") == 0
    assert set(packed(tmp_path / "out")) == {"away/b", "file", "real/a"}
    out = capsys.readouterr().out
    assert "skipped links that lead nowhere: 1, such as gone.jpg" in out
    assert "skipped links to a folder that contains them: 1, such as real/up" in out


def test_pipes_and_sockets_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = folder_of(tmp_path, "a.jpg")
    os.mkfifo(source / "b.jpg")
    assert pack(source, tmp_path / "out") == 0
    assert "skipped neither files nor folders: 1, such as b.jpg" in capsys.readouterr().out


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert pack(tmp_path / "empty", tmp_path / "out") == 2
    assert "holds no samples" in logged(capsys)


def test_a_folder_of_another_modality_names_the_setting_that_packs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert pack(folder_of(tmp_path, "one.wav"), tmp_path / "out") == 2
    assert "it holds audio files: set model.modality=audio to pack them" in logged(capsys)


def test_a_folder_of_tables_says_how_to_pack_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pack(folder_of(tmp_path, "t.parquet"), tmp_path / "out") == 2
    assert "give a glob such as FOLDER/*.parquet" in logged(capsys)


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.parquet", "notes.doc"])
def test_a_source_that_is_neither_a_folder_nor_a_table_is_refused(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.doc").write_text("?")
    assert pack(tmp_path / source, tmp_path / "out") == 2
    assert source in logged(capsys)


# -- shards -------------------------------------------------------------------------------------------------------


def test_any_number_of_processes_writes_the_same_shards(folder: Path, tmp_path: Path):
    for workers in (1, 2, 3):
        assert pack(folder, tmp_path / str(workers), f"pack.workers={workers}", "pack.shuffle_seed=3") == 0
    shards = {file.name: file.read_bytes() for file in (tmp_path / "1").iterdir()}
    assert len(shards) == 3
    for workers in (2, 3):
        assert {file.name: file.read_bytes() for file in (tmp_path / str(workers)).iterdir()} == shards


def test_shuffling_changes_only_the_order(folder: Path, tmp_path: Path):
    pack(folder, tmp_path / "plain")
    pack(folder, tmp_path / "shuffled", "pack.shuffle_seed=3")
    plain, shuffled = packed(tmp_path / "plain"), packed(tmp_path / "shuffled")
    assert list(plain) == sorted(plain) != list(shuffled)
    assert plain == shuffled


def test_an_existing_shard_is_refused_and_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/s-000.tar").write_bytes(b"mine")
    assert pack(folder, tmp_path / "out") == 2
    assert "s-000.tar already exists with other content" in logged(capsys)
    assert (tmp_path / "out/s-000.tar").read_bytes() == b"mine"


def test_a_rerun_keeps_the_shards_that_are_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pack(folder, tmp_path / "out")
    (tmp_path / "out/s-001.tar").unlink()
    before = (tmp_path / "out/s-000.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert pack(folder, tmp_path / "out", "pack.workers=2") == 0
    assert "5 samples in 3 shards, 2 of which already existed with the same content" in capsys.readouterr().out
    assert (tmp_path / "out/s-000.tar").stat().st_mtime_ns == before
    assert len(packed(tmp_path / "out")) == 5


def test_a_shard_of_a_larger_corpus_is_not_left_beside_the_new_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A glob would match it, and its samples would be trained on and tokenized too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/s-003.tar").write_bytes(b"of an earlier pack")
    assert pack(folder, tmp_path / "out") == 2
    assert "s-003.tar is not part of them" in logged(capsys)


@pytest.mark.parametrize(
    ("name", "first"), [("photos", "photos-000000.tar"), ("photos.tar", "photos-000000.tar"), ("", "000000.tar")]
)
def test_a_name_without_a_number_gets_one(folder: Path, tmp_path: Path, name: str, first: str):
    assert pack(folder, tmp_path, f"pack.shards={tmp_path}/out/{name}") == 0
    assert min(file.name for file in (tmp_path / "out").iterdir()) == first


@pytest.mark.parametrize("name", ["100%/s", "s-%s.tar", "s-%d-%d.tar", "s%%.tar"])
def test_a_pattern_that_cannot_number_shards_is_refused(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    assert pack(folder, tmp_path, f"pack.shards={tmp_path}/{name}") == 2
    assert "must contain one number such as %06d" in logged(capsys)


@pytest.mark.parametrize("setting", ["samples_per_shard=0", "samples_per_shard=-2", "workers=-1", "shuffle_seed=-3"])
def test_numbers_that_make_no_sense_are_refused(
    folder: Path, tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["pack", f"pack.source={folder}", f"pack.shards={tmp_path}/out/s", f"pack.{setting}"]) == 2
    assert f"pack.{setting.replace('=', ' is ')}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_has_gone_since_is_named_and_its_shard_is_not_written(tmp_path: Path):
    gone = Packed("a", {"jpg": tmp_path / "gone.jpg"})
    with pytest.raises(ConfigError, match=r"gone\.jpg cannot be read"):
        write_shard(str(tmp_path / "s.tar"), [gone])
    assert not (tmp_path / "s.tar").exists()


def die(url: str, samples: list[Packed]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_reported():
    with pytest.raises(ConfigError, match=r"lower pack\.workers"):
        list(in_processes(die, iter([("a", []), ("b", [])]), workers=2))
