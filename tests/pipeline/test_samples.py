"""Strict reading of tars: every fault in a shard raises an error or quarantines a sample, and none is ignored."""

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline import storage
from pipeline.corpus.samples import Sample, read_samples
from pipeline.errors import ShardError
from tests.corpus import Members, tar_bytes, write_tar

TWO = [("a.jpg", b"A" * 700), ("a.txt", b"one"), ("b.jpg", b"B" * 700), ("b.txt", b"two")]


def read(data: bytes, folder: Path) -> list[Sample]:
    (folder / "shard.tar").write_bytes(data)
    return list(read_samples(str(folder / "shard.tar")))


def read_members(members: Members, folder: Path) -> list[Sample]:
    return read(tar_bytes(members), folder)


def intact_length(data: bytes) -> int:
    """Length of the tar in bytes up to and including the first block of its end-of-archive mark."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.getmembers()
        return archive.offset


# -- intact shards ------------------------------------------------------------------------------------------------


def test_samples_are_complete_and_in_order(tmp_path: Path):
    samples = read_members(TWO, tmp_path)
    assert samples == [
        Sample(0, "a", {"jpg": b"A" * 700, "txt": b"one"}),
        Sample(1, "b", {"jpg": b"B" * 700, "txt": b"two"}),
    ]


def test_what_webdataset_writes_is_read_back(tmp_path: Path):
    path = str(tmp_path / "w.tar")
    with webdataset.TarWriter(path) as sink:
        sink.write({"__key__": "dir/x", "jpg": b"1", "cls": 7})
        sink.write({"__key__": "dir/y", "jpg": b"2", "cls": 8})
    assert [(s.key, s.members["cls"], s.quarantine_reason) for s in read_samples(path)] == [
        ("dir/x", b"7", None),
        ("dir/y", b"8", None),
    ]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_keys_match_those_of_webdataset(tmp_path: Path, kind: int):
    names = ["a.jpg", "b.seg.png", "dir/c.JPG", "x.y/d.txt", "./e.jpg", "dir/sub/f.tar.gz", "ü.jpg"]
    path = tmp_path / "shard.tar"
    path.write_bytes(tar_bytes([(name, b"x") for name in names], kind=kind))
    theirs = webdataset.DataPipeline(webdataset.SimpleShardList([str(path)]), webdataset.tarfile_to_samples())
    assert [s.key for s in read_samples(str(path))] == [sample["__key__"] for sample in theirs]


def test_long_names_survive(tmp_path: Path):
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "folder/" + "n" * 300 + ".jpg"
        [sample] = read(tar_bytes([(name, b"x")], kind=kind), tmp_path)
        assert (sample.key, sample.members, sample.quarantine_reason) == (name[:-4], {"jpg": b"x"}, None)


def test_global_pax_headers_are_not_samples(tmp_path: Path):
    data = tar_bytes(TWO, kind=tarfile.PAX_FORMAT, pax_headers={"comment": "made by a test"})
    assert [s.key for s in read(data, tmp_path)] == ["a", "b"]


def test_directories_within_a_sample_are_ignored(tmp_path: Path):
    members = [("d/", b""), ("d/a.jpg", b"x"), ("d/e/", b""), ("d/a.txt", b"y")]
    assert read_members(members, tmp_path) == [Sample(0, "d/a", {"jpg": b"x", "txt": b"y"})]


def test_same_name_in_two_folders_is_two_samples(tmp_path: Path):
    assert [s.key for s in read_members([("d/a.jpg", b"1"), ("e/a.jpg", b"2")], tmp_path)] == ["d/a", "e/a"]


def test_extensions_are_lower_case(tmp_path: Path):
    assert list(read_members([("A.JPG", b"x")], tmp_path)[0].members) == ["jpg"]


def test_tar_with_no_files_has_no_samples(tmp_path: Path):
    assert read_members([], tmp_path) == []


def test_empty_members_are_kept(tmp_path: Path):
    assert read_members([("a.jpg", b"")], tmp_path) == [Sample(0, "a", {"jpg": b""})]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_read(tmp_path: Path, mode: str):
    assert [s.key for s in read(tar_bytes(TWO, mode), tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_shards_of_other_file_systems_are_read(mode: str):
    url = f"memory://shards/{mode[2:]}/a.tar"
    storage.replace(url, tar_bytes(TWO, mode))
    assert [s.key for s in read_samples(url)] == ["a", "b"]


# -- truncated shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_truncation_of_a_tar_is_detected(tmp_path: Path, kind: int):
    data = tar_bytes([*TWO, ("long" * 40 + ".jpg", b"C" * 600)], kind=kind)
    for length in range(0, intact_length(data) + 512, 64):
        with pytest.raises(ShardError):
            read(data[:length], tmp_path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "empty"),
        (100, "shard.tar"),
        (512 + 1024 + 300, "broken header at byte 1536"),  # in the header of a.txt
        (512 + 300, "unexpected end of data"),  # in the data of a.jpg
        (512 + 1024 + 512 + 512, "no end-of-archive mark"),  # right after a.txt
    ],
)
def test_the_error_says_where_a_tar_is_truncated(tmp_path: Path, length: int, message: str):
    with pytest.raises(ShardError, match=message):
        read(tar_bytes(TWO)[:length], tmp_path)


def test_samples_before_a_truncation_are_yielded_first(tmp_path: Path):
    (tmp_path / "cut.tar").write_bytes(tar_bytes(TWO)[: 2560 + 600])
    samples = read_samples(str(tmp_path / "cut.tar"))
    assert next(samples).key == "a"
    with pytest.raises(ShardError):
        next(samples)


def test_a_damaged_header_raises_an_error(tmp_path: Path):
    data = bytearray(tar_bytes(TWO))
    data[1536 + 10] ^= 1  # in the name of a.txt
    with pytest.raises(ShardError, match="bad checksum"):
        read(bytes(data), tmp_path)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_every_truncation_of_a_compressed_tar_within_its_data_is_detected(tmp_path: Path, mode: str):
    noise = np.random.default_rng(0).bytes(3000)
    data = tar_bytes([("a.jpg", noise), ("b.jpg", noise)], mode)
    for length in range(4, len(data) - 120, 97):
        with pytest.raises(ShardError):
            read(data[:length], tmp_path)


def test_a_gzip_truncated_within_its_header_is_a_shard_error(tmp_path: Path):
    with pytest.raises(ShardError):
        read(tar_bytes(TWO, "w:gz")[:3], tmp_path)


def test_a_flipped_bit_in_a_gzip_tar_is_detected(tmp_path: Path):
    data = bytearray(tar_bytes([("a.jpg", np.random.default_rng(0).bytes(3000))], "w:gz"))
    data[2000] ^= 1
    with pytest.raises(ShardError):
        read(bytes(data), tmp_path)


def test_data_after_the_end_mark_is_an_error(tmp_path: Path):
    with pytest.raises(ShardError):  # cat a.tar b.tar
        read(tar_bytes(TWO) + tar_bytes([("c.jpg", b"x")]), tmp_path)


def test_random_bytes_are_a_shard_error(tmp_path: Path):
    with pytest.raises(ShardError, match=r"shard\.tar"):
        read(np.random.default_rng(0).bytes(5000), tmp_path)


def test_missing_shard_is_named(tmp_path: Path):
    with pytest.raises(ShardError, match=r"gone\.tar: there is no such shard"):
        list(read_samples(str(tmp_path / "gone.tar")))


def test_a_folder_is_a_shard_error(tmp_path: Path):
    with pytest.raises(ShardError, match=str(tmp_path)):
        list(read_samples(str(tmp_path)))


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Drops root for the duration of the context, because root may read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_forbidden_shard_is_named(tmp_path: Path):
    url = write_tar(tmp_path / "secret.tar", TWO)
    assert len(list(read_samples(url))) == 2
    os.chmod(url, 0)
    with unprivileged(), pytest.raises(ShardError, match=r"secret\.tar: no permission"):
        list(read_samples(url))


def test_damage_anywhere_is_a_shard_error_or_readable(tmp_path: Path):
    """Fuzzing: ShardError is the only exception that callers expect."""
    rng = np.random.default_rng(0)
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        intact = tar_bytes([*TWO, ("ü" * 80 + ".jpg", b"C" * 600)], kind=kind)
        for _ in range(150):
            data = bytearray(intact)
            for at in rng.integers(len(data), size=3):
                data[at] = rng.integers(256)
            with contextlib.suppress(ShardError):
                read(bytes(data), tmp_path)


# -- quarantined samples ------------------------------------------------------------------------------------------


def quarantine_reasons(members: Members, folder: Path) -> list[tuple[str, str | None]]:
    return [(s.key, s.quarantine_reason) for s in read_members(members, folder)]


def test_interleaved_keys_are_quarantined(tmp_path: Path):
    found = quarantine_reasons([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")], tmp_path)
    assert [key for key, _ in found] == ["a", "b", "a", "b"]
    assert "key 'a' occurred earlier" in str(found[2][1])
    assert "key 'b' occurred earlier" in str(found[3][1])


def test_a_repeated_key_is_quarantined(tmp_path: Path):
    found = quarantine_reasons([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")], tmp_path)
    assert [bool(reason) for _, reason in found] == [False, False, True]


def test_a_duplicate_member_is_quarantined(tmp_path: Path):
    [(key, reason)] = quarantine_reasons([("a.jpg", b"1"), ("a.jpg", b"2")], tmp_path)
    assert (key, reason) == ("a", "'jpg' occurs twice")


def test_indices_also_count_quarantined_samples(tmp_path: Path):
    samples = read_members([("a.jpg", b"1"), ("README", b"2"), ("b.jpg", b"3")], tmp_path)
    assert [(s.index, s.key) for s in samples] == [(0, "a"), (1, "README"), (2, "b")]


@pytest.mark.parametrize("name", ["README", ".hidden", "dir/.jpg", "jpg"])
def test_a_name_without_key_and_extension_is_quarantined(tmp_path: Path, name: str):
    [(key, reason)] = quarantine_reasons([(name, b"x")], tmp_path)
    assert key == name
    assert repr(name) in str(reason)


def test_a_name_that_is_not_utf_8_is_quarantined_with_a_readable_key(tmp_path: Path):
    data = tar_bytes([("caf\udce9.jpg", b"x"), ("b.jpg", b"y")], errors="surrogateescape")
    samples = read(data, tmp_path)
    assert [(s.key, bool(s.quarantine_reason)) for s in samples] == [("caf\\xe9", True), ("b", False)]
    assert str(samples[0].quarantine_reason).endswith("xe9.jpg' is not UTF-8")
    assert all(s.key.encode() for s in samples)  # can be stored in Parquet


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_or_device_is_quarantined(tmp_path: Path, kind: bytes):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    [sample] = read(out.getvalue(), tmp_path)
    assert (sample.members, sample.quarantine_reason) == ({}, "'jpg' is a link or a device, not a file")


def test_a_member_above_the_size_limit_is_quarantined_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.corpus.samples.MAX_MEMBER_BYTES", 600)
    first, second = read_members([("a.jpg", b"x" * 601), ("b.jpg", b"y")], tmp_path)
    assert (first.members, first.quarantine_reason) == ({}, "'jpg' has 601 bytes, more than 600")
    assert second.members == {"jpg": b"y"}
