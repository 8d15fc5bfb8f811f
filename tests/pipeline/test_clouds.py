"""Google's and Azure's object storage: real servers on this machine, with the code that S3 uses."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gcsfs.retry import validate_response

from pipeline import storage
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import find_shards
from pipeline.errors import StorageError
from pipeline.storage.client import request
from pipeline.tokens import Output, TokenDataset, commit_shard
from pipeline.tokens.index import write_index
from pipeline.tokens.verify import verify
from tests.clouds import CloudServer, cloud_server
from tests.corpus import layout, token_rows, write_corpus

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module", params=["gs", "az"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    server = cloud_server(request.param, tmp_path_factory.mktemp(request.param))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        server.use(patch)
        fs, path = storage.locate(server.url)
        fs.mkdir(path)
    yield server
    server.kill()


@pytest.fixture
def server(running: CloudServer, monkeypatch: pytest.MonkeyPatch) -> CloudServer:
    running.use(monkeypatch)
    return running


def test_an_object_is_created_once(server: CloudServer):
    url = f"{server.url}/once/a"
    storage.write_once(url, b"first")
    storage.write_once(url, b"first")  # our own write with a lost response
    with pytest.raises(FileExistsError, match=f"{url} already exists"):
        storage.write_once(url, b"second")
    assert storage.read(url) == b"first"


def test_creates_are_safe(server: CloudServer):
    storage.check_create_only(f"{server.url}/probe")
    assert storage.list_entries(f"{server.url}/probe") == []


def test_of_many_writers_one_wins(server: CloudServer):
    def write(i: int) -> bool:
        try:
            storage.write_once(f"{server.url}/race/{i // 8}", b"%d" % i)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(64)))
    winners = [i for i, one in enumerate(won) if one]
    assert [i // 8 for i in winners] == list(range(8))
    assert [storage.read(f"{server.url}/race/{i // 8}") for i in winners] == [b"%d" % i for i in winners]


def test_objects_are_read_listed_replaced_and_removed(server: CloudServer):
    folder = f"{server.url}/objects"
    storage.write_once(f"{folder}/a.txt", b"hello")
    storage.replace(f"{folder}/sub/b.txt", b"there")
    assert storage.read(f"{folder}/a.txt", 1, 3) == b"el"
    assert storage.open_stream(f"{folder}/a.txt").read() == b"hello"
    assert [found.url for found in storage.glob(f"{folder}/*.txt")] == [f"{folder}/a.txt"]
    assert storage.list_folders(folder) == [f"{folder}/sub"]
    before = storage.find(f"{folder}/a.txt")
    storage.replace(f"{folder}/a.txt", b"other")
    after = storage.find(f"{folder}/a.txt")
    assert before
    assert after
    assert (before.num_bytes, after.num_bytes) == (5, 5)
    assert before.version != after.version is not None
    assert storage.scan(folder) == [after]
    assert storage.write_chunks(f"{folder}/c", lambda: [b"x" * 1000, b"y"])[1] == 1001
    assert storage.age_s(f"{folder}/c") < 300
    storage.remove(f"{folder}/c")
    storage.remove(f"{folder}/c")
    assert storage.find(f"{folder}/c") is None
    with pytest.raises(FileNotFoundError):
        storage.read(f"{folder}/c")


def test_an_output_is_committed_verified_and_read(server: CloudServer, tmp_path: Path):
    write_corpus(tmp_path, (3, 4))
    for tar in sorted(tmp_path.glob("*.tar")):
        storage.write_once(f"{server.url}/corpus/{tar.name}", tar.read_bytes())
    inputs = find_shards(f"{server.url}/corpus/*.tar")
    assert len(list(read_samples(inputs.shards[0].url, inputs.shards[0].version))) == 3
    output = Output.create(f"{server.url}/out", layout(), inputs, {})
    for shard, count in zip(inputs.shards, (3, 4), strict=True):
        commit_shard(output, shard, token_rows(shard, count), [], seconds={}, now=0.0)
    write_index(output)
    assert verify(output, deep=True).problems == []
    dataset = TokenDataset(output.url, cache=str(tmp_path / "cache"))
    assert [row["key"] for row in dataset] == ["0000", "0001", "0002", "0100", "0101", "0102", "0103"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_missing_bucket_is_one_line(server: CloudServer):
    with pytest.raises((FileNotFoundError, StorageError)) as failed:
        storage.write_once(f"{server.url}-of-nobody/a", b"x")
    assert "of-nobody" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_wrong_key_is_refused_in_one_line_without_the_key(running: CloudServer, monkeypatch: pytest.MonkeyPatch):
    if running.kind == "gs":
        pytest.skip("fake-gcs-server takes any key")
    wrong = "d3Jvbmcgc2VjcmV0"
    running.use(monkeypatch, key=wrong)
    with pytest.raises(PermissionError, match=r"the server refused to read az://bucket/x \(status 403\)") as failed:
        storage.read(f"{running.url}/x")
    assert wrong not in str(failed.value)


def test_a_read_waits_for_a_server_that_restarts(server: CloudServer):
    url = f"{server.url}/outage"
    storage.write_once(url, b"kept")
    server.stop()
    restart = threading.Timer(1, server.start)
    restart.start()
    try:
        assert storage.read(url) == b"kept"
    finally:
        restart.join()


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (
            403,
            b"no access for\nthis account",
            PermissionError,
            r"refused to read gs://bucket/a: Forbidden: b/a no access",
        ),
        (401, b"who are you", PermissionError, r"refused to read gs://bucket/a \(status 401\)"),
        (
            400,
            b"invalid name",
            StorageError,
            r"gs://bucket/a: cannot read it: ValueError: Bad Request: b/a invalid name",
        ),
    ],
)
def test_what_gcsfs_raises_for_a_refusal_is_one_line(
    status: int, content: bytes, kind: type[Exception], message: str, running: CloudServer
):
    """The errors of gcsfs itself, since fake-gcs-server refuses nothing."""
    if running.kind != "gs":
        pytest.skip("of Google's client")

    def call() -> None:
        validate_response(status, content, "b/a")

    with pytest.raises(kind, match=message) as failed:
        request("read", "gs://bucket/a", call)
    assert "\n" not in str(failed.value)
