"""The channel between a driver and its Ray workers: messages to the driver, and a stop signal to the workers."""

import asyncio
from typing import Any

import ray

from jobs.actors.cluster import on_this_node

Message = dict[str, Any]


@ray.remote(num_cpus=0)
class Channel:
    """An actor. It outlives workers that are restarted, so a request to stop reaches the new ones too."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._stop = asyncio.Event()

    async def send(self, message: Message | None) -> None:
        """Queues a message for the driver. None says that no more will come."""
        self._messages.put_nowait(message)

    async def receive(self) -> Message | None:
        """The next message. Waits for one."""
        return await self._messages.get()

    async def receive_all(self) -> list[Message | None]:
        """The messages that have arrived since the last call. Does not wait."""
        return [self._messages.get_nowait() for _ in range(self._messages.qsize())]

    async def request_stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> None:
        await self._stop.wait()


def open_channel() -> Any:
    """A channel on the caller's node, so that it lives as long as the driver, whichever other nodes die."""
    return Channel.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]


class StopSignal:
    """Tells a rank whether the driver requested a stop. Asking needs no network call."""

    def __init__(self, channel: Any):
        self._stop = channel.wait_for_stop.remote()

    def __bool__(self) -> bool:
        return bool(ray.wait([self._stop], timeout=0)[0])
