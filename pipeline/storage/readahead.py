"""Reads an object from front to back in blocks, and fetches the next blocks in advance."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 8 * 2**20
BLOCKS_AHEAD = 2  # beyond the current one, so a stream holds 24 MiB
Fetch = Callable[[int, int, threading.Event], bytes]


class ReadAhead(io.RawIOBase):
    """A file of `num_bytes` bytes. Its blocks come from `fetch(start, end, cancelled)`, up to BLOCKS_AHEAD in advance.

    A read waits only if the block at its position has not arrived yet. Seeking drops blocks that are not near the new
    position; formats with a footer need it. An error of a fetch is raised by the read that needs the block.
    """

    def __init__(self, fetch: Fetch, num_bytes: int):
        super().__init__()
        self._fetch, self._num_bytes, self._block_bytes = fetch, num_bytes, BLOCK_BYTES
        self._position = 0
        self._blocks: dict[int, Future[bytes]] = {}  # by block number
        self._closing = threading.Event()  # stops retries of fetches
        self._threads = ThreadPoolExecutor(BLOCKS_AHEAD, thread_name_prefix="read-ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to byte {start + offset}; a position in a file must be 0 or more")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if self._position >= self._num_bytes:
            return 0
        number, offset = divmod(self._position, self._block_bytes)
        target = memoryview(buffer).cast("B")
        part = memoryview(self._block(number))[offset : offset + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._closing.set()
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
        return self._fetch(start, min(start + self._block_bytes, self._num_bytes), self._closing)
