"""Storage against a real S3 server (SeaweedFS), a proxy that injects faults, and a crash of the server."""

import random
import re
import socket
import threading
import tracemalloc
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import s3fs

from pipeline import storage
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import find_shards
from pipeline.errors import ReplacedObject, ShardError, StorageError, UnsafeStorage
from pipeline.storage import create, readahead, retries
from pipeline.storage import s3 as s3_settings
from tests.corpus import samples_of, tar_bytes
from tests.faults.proxy import (
    ERROR_500,
    RESET_AFTER,
    RESET_BEFORE,
    SLOW_DOWN,
    STALL,
    STALL_BODY,
    TRUNCATE,
    Plan,
    Proxy,
    Request,
    start_proxy,
)
from tests.s3 import S3Server, start_s3

pytestmark = pytest.mark.s3
BLOCK = 2**16
DATA = random.Random(0).randbytes(4 * BLOCK + 1)


@pytest.fixture(autouse=True)
def small_blocks_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setattr(retries, "RETRY_FOR_S", 20)
    monkeypatch.setitem(s3_settings.CLIENT, "read_timeout", 1)


@pytest.fixture
def root(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.use(monkeypatch)
    return f"{s3.url}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3: S3Server, root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with start_proxy(s3.port) as running:
        s3.use(monkeypatch, endpoint=running.endpoint)
        yield running


def client(server: S3Server) -> s3fs.S3FileSystem:
    """An independent client that bypasses the proxy."""
    access, secret = server.read_write
    return s3fs.S3FileSystem(key=access, secret=secret, endpoint_url=server.endpoint)


def next_ones(method: str, *kinds: str) -> Plan:
    """A plan that injects one of these faults into each of the next requests of the method."""
    left, lock = list(kinds), threading.Lock()

    def plan(request: Request) -> str:
        with lock:
            return left.pop(0) if left and request.method == method else ""

    return plan


def test_objects_are_written_read_listed_and_removed(root: str):
    storage.write_once(f"{root}/a/x", b"1")
    storage.replace(f"{root}/a/y", b"22")
    storage.replace(f"{root}/a/y", b"333")
    assert (storage.read(f"{root}/a/y"), storage.read(f"{root}/a/y", 1)) == (b"333", b"33")
    assert (storage.list_files(f"{root}/a"), storage.list_folders(root)) == (
        [f"{root}/a/x", f"{root}/a/y"],
        [f"{root}/a"],
    )
    storage.remove(f"{root}/a/y")
    storage.remove(f"{root}/a/y")
    assert (storage.exists(f"{root}/a/x"), storage.exists(f"{root}/a/y")) == (True, False)


def test_a_large_object_is_a_single_put(root: str):
    storage.write_once(f"{root}/x", bytes(101 * 2**20))  # by default s3fs writes more than 100 MiB in parts
    found = storage.find(f"{root}/x")
    assert found
    # the ETag of a multipart upload ends in the number of parts
    assert re.fullmatch("[0-9a-f]{32}", str(found.version))


def test_one_of_24_racing_writers_wins(root: str):
    ready = threading.Barrier(24)

    def write(i: int) -> bool:
        ready.wait()
        try:
            storage.write_once(f"{root}/x", bytes([i]) * 10_000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(24) as pool:
        won = list(pool.map(write, range(24)))
    assert sum(won) == 1
    assert storage.read(f"{root}/x") == bytes([won.index(True)]) * 10_000


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, len(DATA)])
def test_a_stream_has_the_bytes_of_the_object(root: str, num_bytes: int):
    storage.write_once(f"{root}/x", DATA[:num_bytes])
    with storage.open_stream(f"{root}/x") as stream:
        assert b"".join(iter(lambda: stream.read(10_000), b"")) == DATA[:num_bytes]


@pytest.mark.parametrize("other", [DATA[::-1], DATA[:10]], ids=["of the same size", "shorter"])
def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(root: str, other: bytes):
    storage.replace(f"{root}/x", DATA)
    with storage.open_stream(f"{root}/x") as stream:
        stream.read(1)
        storage.replace(f"{root}/x", other)
        with pytest.raises(ReplacedObject, match=f"{root}/x was replaced"):
            stream.read()


def test_another_version_than_the_listed_one_is_refused(root: str):
    storage.replace(f"{root}/x.tar", tar_bytes(samples_of(1)))
    [shard] = find_shards(f"{root}/*.tar").shards
    assert len(list(read_samples(shard.url, shard.version))) == 1
    storage.replace(f"{root}/x.tar", tar_bytes(samples_of(1, start=1)))
    with pytest.raises(ShardError, match="was replaced: its version"):
        list(read_samples(shard.url, shard.version))
    assert find_shards(f"{root}/*.tar").shards[0].version != shard.version


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_samples_on_s3_equal_those_on_disk(root: str, tmp_path: Path, mode: str):
    local, data = str(tmp_path / "x.tar"), tar_bytes(samples_of(40), mode)
    Path(local).write_bytes(data)
    storage.write_once(f"{root}/x.tar", data)
    assert list(read_samples(f"{root}/x.tar")) == list(read_samples(local))


def test_a_stream_uses_constant_memory(root: str):
    storage.write_once(f"{root}/x", DATA * 40)  # 10 MB
    tracemalloc.start()
    with storage.open_stream(f"{root}/x") as stream:
        while stream.read(10_000):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * BLOCK + 2**20  # 2.3 MB: our blocks, network buffers and the HTTP client


def test_a_glob_lists_several_pages_without_a_request_per_shard(s3: S3Server, proxy: Proxy, root: str):
    path = root.removeprefix("s3://")
    client(s3).pipe({f"{path}/train-{i:04d}.tar": b"x" * (i % 7) for i in range(1001)}, batch_size=32)
    before = proxy.requests
    shards = find_shards(f"{root}/train-*.tar").shards
    assert proxy.requests - before <= 3
    assert [shard.url for shard in shards] == [f"{root}/train-{i:04d}.tar" for i in range(1001)]
    assert all(shard.num_bytes == i % 7 and shard.version for i, shard in enumerate(shards))


def test_braces_give_size_and_version_and_keep_a_missing_shard(root: str):
    for i in range(2):
        storage.write_once(f"{root}/{i}.tar", b"x" * i)
    shards = find_shards(f"{root}/{{0..2}}.tar").shards
    assert [shard.num_bytes for shard in shards] == [0, 1, None]
    assert shards[:2] == find_shards(f"{root}/*.tar").shards


def test_a_read_only_key_can_read_but_not_write(s3: S3Server, root: str, monkeypatch: pytest.MonkeyPatch):
    storage.write_once(f"{root}/x", b"1")
    s3.use(monkeypatch, read_only=True)
    assert storage.read(f"{root}/x") == b"1"
    with pytest.raises(PermissionError, match=f"access key {s3.read_only[0]} may not write {root}/y .*check AWS_"):
        storage.write_once(f"{root}/y", b"1")
    with pytest.raises(PermissionError, match=f"access key {s3.read_only[0]} may not write {root}/"):
        storage.check_create_only(root)


READS: list[Callable[[str], object]] = [storage.read, storage.open_stream, storage.list_files, storage.glob]


@pytest.mark.parametrize("call", READS, ids=lambda call: call.__name__)
@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_the_error_for_a_wrong_key_names_it(
    root: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, call: Callable
):
    storage.write_once(f"{root}/x", b"1")
    monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match=r"access key (test-read-write|nobody) may not (read|list) .*check AWS_"):
        call(f"{root}/x*" if call is storage.glob else f"{root}/x")


def test_a_missing_key_is_reported(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.aws
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match=r"the identity in the AWS settings may not read .*Unable to locate cred"):
        storage.read(f"{root}/x")


def test_options_of_the_configuration_reach_the_client(s3: S3Server, root: str, monkeypatch: pytest.MonkeyPatch):
    storage.write_once(f"{root}/x", b"1")
    for name in s3.environment():
        monkeypatch.delenv(name)
    key, secret = s3.read_write
    options = {"endpoint_url": s3.endpoint, "key": key, "secret": secret, "config_kwargs": {"read_timeout": 3}}
    for name, value in storage.environment({"s3": options}).items():
        monkeypatch.setenv(name, value)  # so that the changes of `configure` are undone
    monkeypatch.setattr("fsspec.config.conf", {})
    storage.configure({"s3": options})
    assert storage.read(f"{root}/x") == b"1"
    assert storage.locate(root)[0].s3.meta.config.read_timeout == 3


READ_FAULTS = [ERROR_500, SLOW_DOWN, RESET_BEFORE, RESET_AFTER, STALL, STALL_BODY, TRUNCATE]


@pytest.mark.parametrize("kind", READ_FAULTS)
@pytest.mark.parametrize("how", ["read", "stream"])
def test_a_broken_response_is_retried(proxy: Proxy, root: str, kind: str, how: str):
    storage.write_once(f"{root}/x", DATA)
    proxy.plan = next_ones("GET", kind, kind)
    if how == "read":
        assert storage.read(f"{root}/x") == DATA
    else:
        with storage.open_stream(f"{root}/x") as stream:
            assert stream.read() == DATA
    assert proxy.injected[kind] == 2


@pytest.mark.parametrize("kind", [ERROR_500, SLOW_DOWN, RESET_BEFORE, RESET_AFTER, STALL])
@pytest.mark.parametrize("times", [1, 3])
def test_a_create_with_a_lost_response_counts_as_our_own(proxy: Proxy, root: str, kind: str, times: int):
    proxy.plan = next_ones("PUT", *[kind] * times)
    storage.write_once(f"{root}/x", b"mine")
    assert proxy.injected[kind] == times
    assert storage.read(f"{root}/x") == b"mine"
    with pytest.raises(FileExistsError, match=f"{root}/x already exists"):
        storage.write_once(f"{root}/x", b"other")


def test_lists_lookups_and_removals_are_retried(proxy: Proxy, root: str):
    storage.write_once(f"{root}/x", b"1")
    for method, call in [("GET", storage.list_files), ("HEAD", storage.exists), ("DELETE", storage.remove)]:
        proxy.plan = next_ones(method, SLOW_DOWN, RESET_BEFORE)
        call(root if method == "GET" else f"{root}/x")
    assert proxy.injected == {SLOW_DOWN: 3, RESET_BEFORE: 3}
    assert not storage.exists(f"{root}/x")


def test_a_shard_fails_if_retries_do_not_help(proxy: Proxy, root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "RETRY_FOR_S", 0.2)
    storage.write_once(f"{root}/x.tar", tar_bytes(samples_of(1)))
    proxy.plan = lambda request: TRUNCATE if request.method == "GET" else ""
    with pytest.raises(ShardError, match=r"StorageError: .*x.tar: .*Not enough data.* after \d+ tries"):
        list(read_samples(f"{root}/x.tar"))


def test_a_write_to_a_server_that_does_not_read_times_out(s3: S3Server, root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(create, "WRITE_S", 0.5)
    monkeypatch.setattr(create, "WRITE_BYTES_PER_S", 1e9)
    monkeypatch.setattr(retries, "RETRY_FOR_S", 0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        s3.use(monkeypatch, endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(StorageError, match=f"{root}/x: FSTimeoutError"):
            storage.replace(f"{root}/x", bytes(2**25))


def test_the_probe_passes_and_leaves_no_files(s3: S3Server, root: str):
    storage.check_create_only(root)
    assert not any("probe" in name for name in client(s3).find(root))


def overwriting(server: S3Server) -> Plan:
    """Imitates a server that ignores If-None-Match: removes the existing object before a create-only write."""
    fs = client(server)

    def plan(request: Request) -> str:
        if request.method == "PUT" and b"if-none-match:" in request.head.lower():
            fs.rm_file(urllib.parse.unquote(request.path.split("?")[0]))
        return ""

    return plan


def test_the_probe_detects_a_server_that_overwrites(s3: S3Server, proxy: Proxy, root: str):
    proxy.plan = overwriting(s3)
    with pytest.raises(UnsafeStorage, match=f"{root}: the server overwrites .* set storage.create_only=checked"):
        storage.check_create_only(root)
    assert storage.list_files(root) == []


def test_the_checked_mode_keeps_the_first_object_on_a_server_that_overwrites(
    s3: S3Server, proxy: Proxy, root: str, monkeypatch: pytest.MonkeyPatch
):
    proxy.plan = overwriting(s3)
    monkeypatch.setenv(storage.CREATE_ONLY, storage.CHECKED)
    storage.write_once(f"{root}/x", b"first")
    with pytest.raises(FileExistsError):
        storage.write_once(f"{root}/x", b"second")
    assert storage.read(f"{root}/x") == b"first"


def test_a_read_continues_after_the_server_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with start_s3(tmp_path) as server:
        server.use(monkeypatch)
        storage.write_once(f"{server.url}/x", DATA)
        with storage.open_stream(f"{server.url}/x") as stream:
            start = stream.read(BLOCK)
            server.kill()
            restart = threading.Timer(0.5, server.start)
            restart.start()
            assert start + stream.read() == DATA
            restart.join()
        storage.write_once(f"{server.url}/y", b"after")


# -- objects written in parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["s3", "disk"])
def test_an_object_written_in_chunks_is_there_whole_or_not_at_all(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.setattr(create, "STREAM_BYTES", 5 * 2**20)  # the least that S3 allows
    url = f"{root}/big" if place == "s3" else str(tmp_path / "big")
    data = bytes(range(256)) * 2**12

    def breaking():
        yield from [data] * 12  # two parts and a bit
        raise KeyError("broken on purpose")

    for whole in ([data] * 12, [b"short"], []):
        with pytest.raises(KeyError):
            storage.write_chunks(url, breaking)
        assert not storage.exists(url)
        content = b"".join(whole)
        assert storage.write_chunks(url, lambda whole=whole: whole) == (sha256(content).hexdigest(), len(content))
        assert storage.read(url) == content
        storage.remove(url)
