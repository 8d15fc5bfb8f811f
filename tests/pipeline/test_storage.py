"""Objects are written whole and once. All kinds of fsspec URLs behave the same."""

import os
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from ray import cloudpickle

from pipeline import storage
from pipeline.errors import ReplacedObject, UnknownStorage


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def in_parallel(count: int, work: Callable[[int], object]) -> list[object]:
    """Runs work(0) .. work(count - 1) in threads that start together; returns results, or the errors raised."""
    ready = threading.Barrier(count)

    def run(i: int) -> object:
        ready.wait()
        try:
            return work(i)
        except OSError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_written_data_is_read_back(root: str):
    storage.write_once(storage.join(root, "a", "b.bin"), b"\x00data")
    assert storage.read(f"{root}/a/b.bin") == b"\x00data"
    with storage.open_stream(f"{root}/a/b.bin") as stream:
        assert stream.read() == b"\x00data"


def test_write_once_keeps_an_existing_object(root: str):
    storage.write_once(f"{root}/x", b"first")
    with pytest.raises(FileExistsError, match="x already exists"):
        storage.write_once(f"{root}/x", b"second")
    assert storage.read(f"{root}/x") == b"first"


def test_exactly_one_of_many_writers_wins_and_its_object_is_complete(tmp_path: Path):
    for round_ in range(20):
        url = str(tmp_path / f"raced-{round_}")
        results = in_parallel(12, lambda i, url=url: storage.write_once(url, bytes([i]) * 100_000))
        winners = [i for i, result in enumerate(results) if result is None]
        assert len(winners) == 1
        assert all(isinstance(result, FileExistsError) for result in results if result is not None)
        assert storage.read(url) == bytes(winners) * 100_000


def test_readers_never_see_a_half_replaced_object(tmp_path: Path):
    url = str(tmp_path / "report")
    storage.replace(url, bytes(200_000))
    seen: list[bytes] = []

    def work(i: int) -> None:
        for _ in range(10):
            if i % 2:
                seen.append(storage.read(url))
            else:
                storage.replace(url, bytes([i]) * 200_000)

    assert in_parallel(6, work) == [None] * 6
    assert all(len(data) == 200_000 and len(set(data)) == 1 for data in seen)


def test_replace_overwrites(root: str):
    storage.replace(f"{root}/x", b"first")
    storage.replace(f"{root}/x", b"second")
    assert storage.read(f"{root}/x") == b"second"


def test_no_temporary_file_is_left_behind(tmp_path: Path):
    storage.write_once(str(tmp_path / "x"), b"1")
    storage.replace(str(tmp_path / "x"), b"2")
    with pytest.raises(FileExistsError):
        storage.write_once(str(tmp_path / "x"), b"3")
    assert os.listdir(tmp_path) == ["x"]


def test_lists_are_sorted_and_not_recursive(root: str):
    for name in ("b", "a", "deeper/c"):
        storage.write_once(storage.join(root, name), b"")
    assert storage.list_files(root) == [f"{root}/a", f"{root}/b"]
    assert storage.list_folders(root) == [f"{root}/deeper"]


def test_listing_a_missing_folder_gives_nothing(root: str):
    assert storage.list_files(f"{root}/gone") == storage.list_folders(f"{root}/gone") == []


def test_listings_are_not_cached(root: str):
    assert storage.list_files(root) == []
    storage.write_once(f"{root}/a", b"")
    assert storage.list_files(root) == [f"{root}/a"]


def test_glob_returns_urls_that_can_be_read(root: str):
    for name in ("t-1.tar", "t-0.tar", "other.txt"):
        storage.write_once(storage.join(root, name), name.encode())
    found = storage.glob(f"{root}/t-?.tar")
    assert [one.url for one in found] == [f"{root}/t-0.tar", f"{root}/t-1.tar"]
    assert [storage.read(one.url) for one in found] == [b"t-0.tar", b"t-1.tar"]


def test_finding_a_missing_object_gives_none(root: str):
    storage.write_once(f"{root}/x", b"12345")
    found = storage.find(f"{root}/x")
    assert found
    assert (found.url, found.num_bytes, storage.find(f"{root}/y")) == (f"{root}/x", 5, None)
    assert (storage.exists(f"{root}/x"), storage.exists(f"{root}/y")) == (True, False)


def test_removing_twice_is_not_an_error(root: str):
    storage.write_once(f"{root}/x", b"")
    storage.remove(f"{root}/x")
    storage.remove(f"{root}/x")
    assert not storage.exists(f"{root}/x")


def test_reading_a_missing_object_fails_at_once(root: str):
    with pytest.raises(FileNotFoundError):
        storage.read(f"{root}/gone")


def test_read_if_exists_gives_none_for_a_missing_object(root: str):
    storage.write_once(f"{root}/x", b"1")
    assert (storage.read_if_exists(f"{root}/x"), storage.read_if_exists(f"{root}/gone")) == (b"1", None)


def test_all_spellings_of_a_path_are_normalised_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spellings = ["data/x", "./data/x", "data/../data/x/", f"file://{tmp_path}/data/x", f"{tmp_path}/data/x"]
    assert {storage.normalise(url) for url in spellings} == {f"{tmp_path}/data/x"}
    assert storage.normalise("s3://bucket/x/") == storage.normalise("S3://bucket/x") == "s3://bucket/x"


def test_a_folder_is_uploaded_and_downloaded(root: str, tmp_path: Path):
    (tmp_path / "model").mkdir()
    for name in ("b", "a"):
        (tmp_path / "model" / name).write_text(name * 3)
    storage.upload(tmp_path / "model", f"{root}/kept")
    with storage.downloaded(f"{root}/kept") as folder:
        assert {file.name: file.read_text() for file in folder.iterdir()} == {"a": "aaa", "b": "bbb"}


def test_downloading_a_missing_folder_is_an_error(root: str):
    with pytest.raises(FileNotFoundError, match="gone"), storage.downloaded(f"{root}/gone"):
        pass


def test_part_of_an_object_is_read(root: str):
    storage.write_once(f"{root}/x", b"0123456789")
    assert storage.read(f"{root}/x", 3, 6) == b"345"
    assert storage.read(f"{root}/x", 7) == b"789"


def test_glob_gives_the_same_size_and_version_as_find(root: str):
    for name in ("b.tar", "a.tar", "a.txt", "deeper/c.tar"):
        storage.write_once(storage.join(root, name), name.encode())
    found = storage.glob(f"{root}/**/*.tar")
    assert [one.url for one in found] == [f"{root}/a.tar", f"{root}/b.tar", f"{root}/deeper/c.tar"]
    assert found == [storage.find(one.url) for one in found]


def test_a_link_is_listed_with_the_size_and_version_of_its_target(tmp_path: Path):
    (tmp_path / "real").write_bytes(b"12345")
    os.utime(tmp_path / "real", ns=(1, 123_456_789))
    (tmp_path / "link.tar").symlink_to(tmp_path / "real")
    (tmp_path / "broken.tar").symlink_to(tmp_path / "gone")
    broken, link = storage.glob(f"{tmp_path}/*.tar")
    assert (link.num_bytes, link.version, broken.num_bytes) == (5, "123456789", None)


def test_a_local_file_of_another_version_is_refused(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"1")
    found = storage.find(str(tmp_path / "x"))
    assert found
    storage.open_stream(found.url, found.version).close()
    os.utime(found.url, ns=(1, 1))
    with pytest.raises(ReplacedObject, match=f"its version is 1 instead of {found.version}"):
        storage.open_stream(found.url, found.version)


def test_the_probe_passes_and_leaves_no_files(root: str):
    storage.check_create_only(root)
    assert storage.list_files(root) == []
    assert list(Path(root).glob("*")) == []  # also no hidden or temporary file, on a local disk


def test_the_probe_fails_if_the_folder_is_not_writable(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        storage.check_create_only(str(tmp_path / "file"))


def test_options_are_passed_in_environment_variables():
    given = storage.environment({"s3": {"endpoint_url": "http://here", "profile": "lab"}}, create_only="checked")
    assert given == {
        "FSSPEC_S3": '{"endpoint_url": "http://here", "profile": "lab"}',
        "TOKENMILL_CREATE_ONLY": "checked",
    }


@pytest.mark.parametrize(("options", "how"), [({"s3": {"key": b"x"}}, "server"), ({}, "no")])
def test_options_that_json_cannot_hold_are_refused(options: dict, how: str):
    with pytest.raises(ValueError, match=r"storage options|choose 'server' or 'checked'"):
        storage.environment(options, create_only=how)


def test_the_checked_mode_keeps_an_existing_object(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(storage.CREATE_ONLY, storage.CHECKED)
    url = f"memory://{uuid.uuid4().hex}/x"
    storage.write_once(url, b"first")
    with pytest.raises(FileExistsError, match="x already exists"):
        storage.write_once(url, b"second")
    assert storage.read(url) == b"first"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://bucket/a", "unknown protocol 'foo'; use a local path, s3://"),
        ("oss://bucket/a", "oss:// needs another package. Install ossfs"),
        ("zip://a.txt::no.zip", r"not a zip file; check the URL and storage.options.zip \(keys given: none\)"),
    ],
)
def test_a_url_that_cannot_be_opened_names_the_cause(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("no.zip").write_bytes(b"text")
    with pytest.raises(UnknownStorage, match=message):
        storage.read(url)


def test_an_option_that_the_client_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"colour": "red"})
    with pytest.raises(UnknownStorage, match=r"colour.*storage.options.s3 \(keys given: colour\)"):
        storage.read("s3://bucket/a")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_files_have_the_permissions_that_the_umask_allows(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        storage.write_once(f"{tmp_path}/created", b"x")
        storage.replace(f"{tmp_path}/replaced", b"x")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}
    assert len(list(tmp_path.iterdir())) == 2


def test_options_travel_in_a_function_that_needs_only_fsspec(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"secret": "s3cret"}})
    monkeypatch.setenv(storage.CREATE_ONLY, storage.CHECKED)
    setter = storage.setter()
    assert setter is not None
    code = (
        "import pickle, sys, os, fsspec; pickle.load(sys.stdin.buffer)();"
        "print(fsspec.config.conf['s3'], os.environ['TOKENMILL_CREATE_ONLY'], 'pipeline' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=cloudpickle.dumps(setter), cwd="/", env={}, capture_output=True, check=True
    )
    assert done.stdout.decode() == "{'secret': 's3cret'} checked False\n"


def test_without_options_there_is_nothing_to_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.delenv(storage.CREATE_ONLY, raising=False)
    assert storage.setter() is None


def test_an_error_about_options_does_not_show_them():
    with pytest.raises(ValueError, match="storage options of s3: Object of type bytes") as caught:
        storage.environment({"s3": {"secret": "s3cret", "key": b"x"}})
    assert "s3cret" not in str(caught.value)
