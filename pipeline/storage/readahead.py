"""Front-to-back reading of an object in blocks that are fetched before they are asked for."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

BLOCK_BYTES = 8 * 2**20
BLOCKS_AHEAD = 2  # besides the one being read, so that a stream holds 24 MiB
Fetch = Callable[[int, int, threading.Event], bytes]


class ReadAhead(io.RawIOBase):
    """A file of `num_bytes` whose blocks come from `fetch(start, end, closed)`, up to BLOCKS_AHEAD at a time.

    The reader waits only where the block at its place is still on the way. Seeking works, for formats with a footer:
    blocks off the new place are dropped. What fetch raises comes out of the read that needs the block.
    """

    def __init__(self, fetch: Fetch, num_bytes: int):
        super().__init__()
        self._fetch, self._num_bytes, self._block_bytes = fetch, num_bytes, BLOCK_BYTES
        self._at = 0
        self._blocks: dict[int, Future[bytes]] = {}  # by their number
        self._gone = threading.Event()  # set when closed: no fetch is tried again
        self._threads = ThreadPoolExecutor(BLOCKS_AHEAD, thread_name_prefix="read-ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to byte {start + offset}: a place in a file is 0 or more")
        self._at = start + offset
        return self._at

    def readinto(self, buffer, /) -> int:
        if self._at >= self._num_bytes:
            return 0
        number, offset = divmod(self._at, self._block_bytes)
        part = memoryview(self._block(number))[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._gone.set()
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._blocks.clear()
        super().close()

    def _block(self, number: int) -> bytes:
        last = (self._num_bytes - 1) // self._block_bytes
        wanted = range(number, min(number + BLOCKS_AHEAD, last) + 1)
        for other in self._blocks.keys() - set(wanted):
            self._blocks.pop(other).cancel()
        for one in wanted:
            if one not in self._blocks:
                self._blocks[one] = self._threads.submit(self._fetch_block, one)
        return self._blocks[number].result()

    def _fetch_block(self, number: int) -> bytes:
        start = number * self._block_bytes
        return self._fetch(start, min(start + self._block_bytes, self._num_bytes), self._gone)
