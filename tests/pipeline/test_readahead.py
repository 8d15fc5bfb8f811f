"""Read-ahead fetches a bounded number of blocks in advance, and the blocks add up to the object."""

import io
import random
import threading
from collections.abc import Iterator

import pytest

from pipeline.storage import readahead
from pipeline.storage.readahead import ReadAhead

DATA = random.Random(0).randbytes(1000)


class Server:
    """Returns parts of DATA. Blocks from number `held` on wait for `release`."""

    def __init__(self, held: int = 10**9):
        self.held, self.release, self.changed = held, threading.Event(), threading.Condition()
        self.requested: list[int] = []

    def fetch(self, start: int, end: int, cancelled: threading.Event) -> bytes:
        with self.changed:
            self.requested.append(start // 100)
            self.changed.notify_all()
        if start // 100 >= self.held:
            assert self.release.wait(10)
        return DATA[start:end]

    def wait_until_requested(self, blocks: set[int]) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: set(self.requested) >= blocks, timeout=10)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 100)


@pytest.fixture
def held() -> Iterator[Server]:
    server = Server(held=1)
    yield server
    server.release.set()


@pytest.mark.parametrize("num_bytes", [0, 1, 99, 100, 101, 199, 200, 201, 1000])
@pytest.mark.parametrize("step", [1, 7, 100, 250, -1])
def test_the_blocks_add_up_to_the_object(num_bytes: int, step: int):
    with io.BufferedReader(ReadAhead(Server().fetch, num_bytes), 64) as stream:
        assert b"".join(iter(lambda: stream.read(step), b"")) == DATA[:num_bytes]


def test_exactly_two_blocks_are_fetched_in_advance(held: Server):
    with ReadAhead(held.fetch, 1000) as stream:
        assert stream.read(1) == DATA[:1]
        assert held.wait_until_requested({0, 1, 2})
        assert stream.read(99) == DATA[1:100]  # does not wait for the next blocks
        assert sorted(held.requested) == [0, 1, 2]


def test_each_block_is_fetched_once():
    server = Server()
    with io.BufferedReader(ReadAhead(server.fetch, 1000)) as stream:
        stream.read()
    assert sorted(server.requested) == list(range(10))


def test_any_position_can_be_read():
    with io.BufferedReader(ReadAhead(Server().fetch, 1000)) as stream:
        for position in (950, 3, 500, 499, 0):
            stream.seek(position)
            assert stream.read(120) == DATA[position : position + 120]
        assert stream.seek(-8, io.SEEK_END) == 992
        assert stream.read() == DATA[-8:]


def test_an_error_of_a_fetch_is_raised_by_the_read_that_needs_it():
    def fetch(start: int, end: int, cancelled: threading.Event) -> bytes:
        if start:
            raise OSError("the second block is broken")
        return DATA[start:end]

    with ReadAhead(fetch, 1000) as stream:
        assert stream.read(100) == DATA[:100]
        with pytest.raises(OSError, match="the second block is broken"):
            stream.read(1)


def test_closing_a_stream_cancels_its_fetches():
    events: list[threading.Event] = []

    def fetch(start: int, end: int, cancelled: threading.Event) -> bytes:
        events.append(cancelled)
        return DATA[start:end]

    stream = ReadAhead(fetch, 1000)
    stream.read(1)
    assert not events[0].is_set()
    stream.close()
    assert events[0].is_set()
