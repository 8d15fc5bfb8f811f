"""Between the driver of a training and its rank 0: news one way, the wish to stop the other."""

import asyncio
from typing import Any

import ray

from jobs.actors.cluster import on_this_node


@ray.remote(num_cpus=0)
class Mailbox:
    """An actor. Outlives the ranks, which may be restarted: a wish to stop stands until it is met."""

    def __init__(self) -> None:
        self._news: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._to_stop = asyncio.Event()

    async def tell(self, news: dict[str, Any] | None) -> None:
        """News for the driver; None is the last."""
        self._news.put_nowait(news)

    async def hear(self) -> dict[str, Any] | None:
        """The next news, once there are some."""
        return await self._news.get()

    async def ask_to_stop(self) -> None:
        self._to_stop.set()

    async def until_asked_to_stop(self) -> None:
        await self._to_stop.wait()


def open_mailbox() -> Any:
    """On the node of the caller, so that it lives as long as the driver does, whatever other nodes die."""
    return Mailbox.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]


class StopWish:
    """For a rank: whether the driver asked to stop. Costs no call over the network to ask."""

    def __init__(self, mailbox: Any):
        self._asked = mailbox.until_asked_to_stop.remote()

    def __bool__(self) -> bool:
        return bool(ray.wait([self._asked], timeout=0)[0])
