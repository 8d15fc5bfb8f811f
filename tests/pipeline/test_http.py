"""Shards on a real HTTP server: listed, found, missing, refused, and a server that is down."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import find_shards
from pipeline.errors import NoShards, StorageError
from pipeline.storage import retries
from tests.corpus import write_tar


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. A name with `secret` is refused."""

    def send_head(self):
        if "secret" in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        """Keeps the output of the tests clean."""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    for name in ("a", "b", "secret"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.txt", name.encode())])
    handler = functools.partial(Server, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_glob_lists_the_servers_index(url: str):
    assert [shard.url for shard in find_shards(f"{url}/[ab].tar").shards] == [f"{url}/a.tar", f"{url}/b.tar"]


def test_a_query_is_part_of_the_url_and_not_a_pattern(url: str):
    [shard] = find_shards(f"{url}/a.tar?X-Signature=abc").shards
    assert shard.url == f"{url}/a.tar?X-Signature=abc"
    assert [sample.members for sample in read_samples(shard.url)] == [{"txt": b"a"}]


def test_a_missing_shard_is_an_error_that_names_it(url: str):
    with pytest.raises(NoShards, match=rf"{url}/missing.tar does not exist"):
        find_shards(f"{url}/missing.tar")


def test_a_refused_shard_is_not_reported_as_missing(url: str):
    with pytest.raises(PermissionError, match=r"refused to read .*secret.tar .status 403"):
        storage.read(f"{url}/secret.tar")


@pytest.mark.parametrize("pattern", ["http://127.0.0.1:1/a.tar", "http://127.0.0.1:1/*.tar"])
def test_a_server_that_is_down_is_an_error_and_not_a_missing_shard(pattern: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "RETRY_FOR_S", 0.5)
    with pytest.raises(StorageError, match=r"127.0.0.1:1.*check the endpoint and the network"):
        find_shards(pattern)
