"""Blocks come before they are asked for, in bounded number, and make up the object."""

import io
import random
import threading
from collections.abc import Iterator

import pytest

from pipeline.storage import readahead
from pipeline.storage.readahead import ReadAhead

DATA = random.Random(0).randbytes(1000)


class Server:
    """Hands out parts of DATA; holds back those of blocks from `held` on until `release`."""

    def __init__(self, held: int = 10**9):
        self.held, self.release, self.changed = held, threading.Event(), threading.Condition()
        self.asked: list[int] = []

    def fetch(self, start: int, end: int, cancelled: threading.Event) -> bytes:
        with self.changed:
            self.asked.append(start // 100)
            self.changed.notify_all()
        if start // 100 >= self.held:
            assert self.release.wait(10)
        return DATA[start:end]

    def wait_until_asked(self, blocks: set[int]) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: set(self.asked) >= blocks, timeout=10)


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
def test_the_blocks_make_up_the_object(num_bytes: int, step: int):
    with io.BufferedReader(ReadAhead(Server().fetch, num_bytes), 64) as stream:
        assert b"".join(iter(lambda: stream.read(step), b"")) == DATA[:num_bytes]


def test_the_next_two_blocks_are_asked_for_before_they_are_needed_and_no_more(held: Server):
    with ReadAhead(held.fetch, 1000) as stream:
        assert stream.read(1) == DATA[:1]
        assert held.wait_until_asked({0, 1, 2})
        assert stream.read(99) == DATA[1:100]  # without waiting for those under way
        assert sorted(held.asked) == [0, 1, 2]


def test_each_block_is_asked_for_once():
    server = Server()
    with io.BufferedReader(ReadAhead(server.fetch, 1000)) as stream:
        stream.read()
    assert sorted(server.asked) == list(range(10))


def test_any_place_can_be_read():
    with io.BufferedReader(ReadAhead(Server().fetch, 1000)) as stream:
        for place in (950, 3, 500, 499, 0):
            stream.seek(place)
            assert stream.read(120) == DATA[place : place + 120]
        assert stream.seek(-8, io.SEEK_END) == 992
        assert stream.read() == DATA[-8:]


def test_what_a_fetch_raises_comes_out_of_the_read_that_needs_it():
    def fetch(start: int, end: int, cancelled: threading.Event) -> bytes:
        if start:
            raise OSError("the second block is broken")
        return DATA[start:end]

    with ReadAhead(fetch, 1000) as stream:
        assert stream.read(100) == DATA[:100]
        with pytest.raises(OSError, match="the second block is broken"):
            stream.read(1)


def test_a_closed_stream_tells_its_fetches_to_give_up():
    told: list[threading.Event] = []

    def fetch(start: int, end: int, cancelled: threading.Event) -> bytes:
        told.append(cancelled)
        return DATA[start:end]

    stream = ReadAhead(fetch, 1000)
    stream.read(1)
    assert not told[0].is_set()
    stream.close()
    assert told[0].is_set()
