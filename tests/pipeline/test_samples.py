"""Strict reading of tars: every fault in a shard raises an error or quarantines a sample, and none is ignored."""

import bz2
import collections
import contextlib
import gc
import gzip
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
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


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


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


def test_a_tar_in_zstandard_is_read_whatever_its_frames(tmp_path: Path):
    data = tar_bytes(TWO)
    assert [s.key for s in read(zstd(data), tmp_path)] == ["a", "b"]
    assert [s.key for s in read(zstd(data[:2000]) + zstd(data[2000:]), tmp_path)] == ["a", "b"]


def test_what_the_zstd_command_writes_is_read_and_checked(tmp_path: Path):
    zstd_command = shutil.which("zstd")
    if zstd_command is None:
        pytest.skip("the command zstd is not installed")
    noise = np.random.default_rng(0).bytes(3000)
    data = subprocess.run(
        [zstd_command, "-q", "-c"], input=tar_bytes([("a.jpg", noise)]), stdout=subprocess.PIPE, check=True
    ).stdout
    assert read(data, tmp_path)[0].members == {"jpg": noise}
    for length in range(5, len(data), 97):
        with pytest.raises(ShardError):
            read(data[:length], tmp_path)
    with pytest.raises(ShardError):  # the frame has a checksum
        read(data[:1500] + bytes([data[1500] ^ 1]) + data[1501:], tmp_path)


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


def test_an_xz_tar_that_claims_to_need_4_gib_is_a_shard_error_where_there_are_less(tmp_path: Path):
    data = bytearray(lzma.compress(tar_bytes([("a.txt", b"a")])))
    header = slice(12, 12 + 4 * (data[12] + 1))  # of the block (xz file format 1.2.1, section 3.1)
    assert data[13:16] == b"\0\x21\1"  # one filter, LZMA2, with one byte of settings
    data[16] = 40
    data[header] = data[header][:-4] + zlib.crc32(data[header][:-4]).to_bytes(4, "little")
    (tmp_path / "x.tar.xz").write_bytes(data)
    code = (
        "import resource, sys; from pipeline.corpus.samples import read_samples, ShardError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))\n"
        "try: list(read_samples(sys.argv[1]))\n"
        "except ShardError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.tar.xz")], capture_output=True, text=True)
    assert "x.tar.xz: not enough memory to read it; a compressed shard may claim" in done.stdout, done.stderr


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


# -- hostile and damaged tars -------------------------------------------------------------------------------------


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def with_checksum(block: bytes) -> bytes:
    """The header block with the checksum that its other bytes have."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def pax(**records: bytes) -> bytes:
    """A pax header; an underscore in a name stands for a dot."""
    data = b""
    for name, value in records.items():
        rest = b" " + name.replace("_", ".").encode() + b"=" + value + b"\n"
        length = next(n for n in range(len(rest), len(rest) + 9) if len(str(n)) + len(rest) == n)
        data += str(length).encode() + rest
    return member("pax", data, tarfile.XHDTYPE)


A, B, END = member("a.jpg", b"A" * 700), member("b.jpg", b"B" * 700), bytes(1024)
SPARSE = {"GNU_sparse_major": b"1", "GNU_sparse_minor": b"0", "GNU_sparse_name": b"s.jpg"}
HOSTILE = {
    "pax size of 10 TB": (pax(size=b"10000000000000"), "unexpected end of data at byte 5120"),
    "negative pax size": (pax(size=b"-5"), "a member has '-5' bytes"),
    "pax size that is no number": (pax(size=b"xx"), "a member has 'xx' bytes"),
    "pax size of 5000 digits": (pax(size=b"1" * 5000), "a member has '1111"),
    "pax records that overlap": (
        member("x", b"2 " * 400_000 + b"=\n", tarfile.XHDTYPE),
        "broken pax record at byte 2048",
    ),
    "pax record of digits": (member("x", b"1" * 4_000_000, tarfile.XHDTYPE), "broken pax record at byte 2048"),
    "negative size": (with_checksum(B[:124] + b"\xff" * 12 + B[136:512]), "it claims -1 bytes"),
    "size of 2^88": (with_checksum(B[:124] + b"\x80" + b"\xff" * 11 + B[136:512]), "unexpected end of data"),
    "name of 8 GB": (header("x", 2**33 - 1, tarfile.GNUTYPE_LONGNAME), "claims 8589934591 bytes of names"),
    "name without its member": (member("x", b"name", tarfile.GNUTYPE_LONGNAME) + END, "extends a member"),
    "sparse pieces that are missing": (
        pax(**SPARSE, GNU_sparse_realsize=b"1000") + member("s", b"99999999999\n0\n".ljust(512, b"\0")),
        "sparse file 's.jpg' is broken",
    ),
    "sparse pieces of negative length": (
        pax(**SPARSE, GNU_sparse_realsize=b"1000") + member("s", b"1\n500\n-400\n".ljust(1024, b"\0")),
        "-400 bytes at byte 500 of 1000",
    ),
    "sparse size that is no number": (pax(**SPARSE, GNU_sparse_realsize=b"xx") + member("s", bytes(512)), "'xx' bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.timeout(60)
def test_a_hostile_header_is_a_shard_error_at_once(tmp_path: Path, case: str):
    hostile, message = HOSTILE[case]
    with pytest.raises(ShardError, match=message):
        read(A + hostile + B + END, tmp_path)


@pytest.mark.parametrize("extension", [member("x", b"n.jpg", tarfile.GNUTYPE_LONGNAME), pax(comment=b"c")])
def test_thousands_of_headers_before_one_member_do_not_recurse(tmp_path: Path, extension: bytes):
    assert len(read(A + 3000 * extension + B + END, tmp_path)) == 2


def test_a_sparse_file_is_expanded(tmp_path: Path):
    pieces = b"2\n0\n3\n1000\n2\n".ljust(512, b"\0") + b"abcde"
    sparse = pax(**SPARSE, GNU_sparse_realsize=b"1010") + member("ignored", pieces)
    assert read(A + sparse + B + END, tmp_path)[1].members["jpg"] == b"abc" + bytes(997) + b"de" + bytes(8)


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_a_sparse_file_of_gnu_tar_is_read(tmp_path: Path, kind: str):
    with open(tmp_path / "a.jpg", "wb") as file:
        for piece in range(30):  # more than fit into one header
            file.seek(piece * 2**16)
            file.write(b"piece")
        file.truncate(2**21)
    command = ["tar", "-C", str(tmp_path), "--sparse", f"--format={kind}", "-cf", "-", "a.jpg"]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert len(data) < 2**20
    assert read(data, tmp_path)[0].members == {"jpg": (tmp_path / "a.jpg").read_bytes()}


def test_a_sparse_file_of_mere_holes_is_quarantined(tmp_path: Path):
    hole = pax(**SPARSE, GNU_sparse_realsize=b"1000000000") + member("s", b"0\n".ljust(512, b"\0"))
    first, second, third = read(A + hole + B + END, tmp_path)
    assert "999999488 bytes in holes" in str(second.quarantine_reason)
    assert (first.key, third.key) == ("a", "b")


def test_names_out_of_the_folder_are_only_keys(tmp_path: Path):
    keys = [sample.key for sample in read(member("/etc/a.jpg", b"1") + member("../../b.jpg", b"2") + END, tmp_path)]
    assert keys == ["/etc/a", "../../b"]


def damaged(intact: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, or the end cut off. Half of the time, the headers get valid checksums again."""
    data = bytearray(intact)
    for at in rng.integers(len(data), size=rng.integers(1, 5)):
        data[at] = rng.choice([0, 1, 0x31, 0x7F, 0x80, 0xFF, rng.integers(256)])
    if rng.random() < 0.5:
        for at in range(0, len(data) - 511, 512):
            if intact[at + 257 : at + 262] == b"ustar":
                data[at : at + 512] = with_checksum(bytes(data[at : at + 512]))
    return bytes(data[: rng.integers(len(data))] if rng.random() < 0.2 else data)


def rich_tars() -> dict[str, bytes]:
    """Tars with every feature that the reader knows, plain and compressed."""
    long = [*TWO, ("d/" * 60 + "ü" * 80 + ".jpg", b"C" * 600), ("._a.jpg", b"fork")]
    links = header("l.jpg", 0, tarfile.LNKTYPE, "a.jpg") + header("m.jpg", 0, tarfile.SYMTYPE, "a.jpg")
    sparse = pax(**SPARSE, GNU_sparse_realsize=b"1010") + member("s", b"1\n1000\n2\n".ljust(512, b"\0") + b"de")
    plain = {
        "gnu": tar_bytes(long, kind=tarfile.GNU_FORMAT),
        "pax": tar_bytes(long, kind=tarfile.PAX_FORMAT, pax_headers={"comment": "shared"}),
        "odd": A + links + sparse + pax(path=b"p/q.jpg", size=b"700") + B + END,
    }
    compressed = {
        **{f"{name} gzip": gzip.compress(data, mtime=0) for name, data in plain.items()},
        **{f"{name} bzip2": bz2.compress(data) for name, data in plain.items()},
        **{f"{name} xz": lzma.compress(data) for name, data in plain.items()},
        **{f"{name} zstd": zstd(data) for name, data in plain.items()},
    }
    return plain | compressed


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", range(4))
def test_damage_gives_samples_or_a_shard_error_and_nothing_else(tmp_path: Path, seed: int):
    rng, slowest = np.random.default_rng(seed), 0.0
    outcomes: collections.Counter[bool] = collections.Counter()
    for intact in rich_tars().values():
        for _ in range(40):
            start = time.monotonic()
            try:
                outcomes[bool(read(damaged(intact, rng), tmp_path))] += 1
            except ShardError:
                outcomes[False] += 1
            slowest = max(slowest, time.monotonic() - start)
    assert slowest < 10
    assert min(outcomes[True], outcomes[False]) > 20  # both happen


@pytest.mark.parametrize("kind", ["", " gzip", " bzip2", " xz", " zstd"])
def test_a_broken_shard_leaves_no_file_open(tmp_path: Path, kind: str):
    rich = rich_tars()
    for data in (rich[f"odd{kind}"], rich[f"gnu{kind}"][:200], rich[f"pax{kind}"][:-20] + b"\1" * 20):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            with contextlib.suppress(ShardError):
                read(data, tmp_path)
            gc.collect()
        assert [str(one.message) for one in caught] == []


# -- hard links ---------------------------------------------------------------------------------------------------

LINKS = [
    member("a.jpg", b"A" * 700),
    member("b.jpg", b"B" * 5),
    header("c.jpg", 0, tarfile.LNKTYPE, "b.jpg"),
    header("d.jpg", 0, tarfile.LNKTYPE, "a.jpg"),  # before the file that was read last
    header("e.jpg", 0, tarfile.LNKTYPE, "d.jpg"),  # a link to a link
    member("f.jpg", b"F"),
]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_hard_links_have_the_bytes_of_the_file_that_they_name(tmp_path: Path, compress: Callable[[bytes], bytes]):
    contents = {sample.key: sample.members["jpg"] for sample in read(compress(b"".join(LINKS) + END), tmp_path)}
    a, b = b"A" * 700, b"B" * 5
    assert contents == {"a": a, "b": b, "c": b, "d": a, "e": a, "f": b"F"}


def test_hard_links_of_gnu_tar_are_read(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"once")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    command = ["tar", "-C", str(tmp_path), "-cf", "-", "a.jpg", "b.jpg"]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert [sample.members for sample in read(data, tmp_path)] == [{"jpg": b"once"}] * 2


def test_a_hard_link_to_a_later_file_is_quarantined(tmp_path: Path):
    first, second = read(header("a.jpg", 0, tarfile.LNKTYPE, "b.jpg") + B + END, tmp_path)
    assert "'b.jpg', which is not an earlier file" in str(first.quarantine_reason)
    assert second.quarantine_reason is None


def test_a_compressed_shard_is_not_decompressed_again_for_each_of_many_links(tmp_path: Path):
    links = [header(f"{i:03d}.jpg", 0, tarfile.LNKTYPE, "ba"[i % 2] + ".jpg") for i in range(300)]
    samples = read(gzip.compress(A + B + b"".join(links) + END), tmp_path)
    reasons = [sample.quarantine_reason for sample in samples if sample.quarantine_reason]
    assert 0 < len(reasons) < 200
    assert all("decompress it, or write it with `tar --hard-dereference`" in reason for reason in reasons)


# -- members of no sample -----------------------------------------------------------------------------------------


def test_metadata_of_macos_and_webdataset_is_passed_over_and_counted(tmp_path: Path):
    members = [("__meta__", b"m"), ("__meta__.json", b"m"), ("d/._a.jpg", b"fork"), ("d/a.jpg", b"x")]
    members += [("d/._a.txt", b"fork"), ("d/a.txt", b"y"), ("__MACOSX/d/._a.jpg", b"fork"), (".DS_Store", b"Bud1")]
    url = write_tar(tmp_path / "shard.tar", members)
    passed_over: collections.Counter[str] = collections.Counter()
    samples = list(read_samples(url, passed_over=passed_over))
    assert samples == [Sample(0, "d/a", {"jpg": b"x", "txt": b"y"})]
    assert sorted(passed_over.values()) == [2, 4]
    assert all("macOS" in what or "WebDataset" in what for what in passed_over)


@pytest.mark.parametrize("name", ["_a.jpg", "__init__.jpg", "a._b.jpg", "__meta__a.jpg", "d/a.DS_Store"])
def test_names_that_only_look_like_metadata_are_samples(tmp_path: Path, name: str):
    [sample] = read_members([(name, b"x")], tmp_path)
    assert sample.quarantine_reason is None


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


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "is a symbolic link"),
        (tarfile.LNKTYPE, "is a hard link to '/etc/passwd', which is not an earlier file of this shard"),
        (tarfile.FIFOTYPE, "is a device or another special file"),
        (tarfile.CHRTYPE, "is a device or another special file"),
    ],
)
def test_a_link_out_of_the_shard_or_a_device_is_quarantined(tmp_path: Path, kind: bytes, reason: str):
    [sample] = read(header("a.jpg", 0, kind, "/etc/passwd") + END, tmp_path)
    assert sample.members == {}
    assert f"'jpg' {reason}" in str(sample.quarantine_reason)


def test_a_member_above_the_size_limit_is_quarantined_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.corpus.samples.MAX_MEMBER_BYTES", 600)
    first, second = read_members([("a.jpg", b"x" * 601), ("b.jpg", b"y")], tmp_path)
    assert (first.members, first.quarantine_reason) == ({}, "'jpg' has 601 bytes, more than 600")
    assert second.members == {"jpg": b"y"}
