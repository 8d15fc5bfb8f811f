"""Work that is dealt out shard by shard to Ray actors, and given to others when an actor dies or hangs.

Only descriptors and results pass through Ray. Ray Data would run such actors too, but it cannot tell a hung actor from
a slow one, and gives a shard that kills its actor to the next one for ever.
"""

import collections
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jobs.cluster import device_for, room
from jobs.config import WorkersConfig

MAX_TRIES = 3  # of a shard whose worker dies or hangs
POLL_S = 2.0
GROW_EVERY_S = 10.0  # how often a cluster that may have grown is asked for its size
TELL_EVERY_S = 30.0


class Named(Protocol):
    """A shard, or whatever else is dealt out: the name tells one from the other."""

    @property
    def name(self) -> str: ...


class ShardWorker:
    """What an actor runs. Subclasses hold a model, and call `tick` as they get on.

    in_flight: shards that one worker has at a time, each in a thread of its own, which holds `device_lock` to use the
    device: so one shard is read and written while another's batches are encoded.
    """

    in_flight = 1

    def __init__(self, num_cpus: float, num_gpus: float):
        import torch

        torch.set_num_threads(max(1, int(num_cpus)))  # Ray would leave one thread per process
        self.device = device_for(num_gpus)
        self.device_lock = threading.Lock()
        self.ticks: collections.Counter[str] = collections.Counter()

    def process(self, shard: Any, *arguments: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} lacks process")

    @staticmethod
    def failed(shard: Any, reason: str) -> Any:
        """The result of a shard whose workers died or hung MAX_TRIES times."""
        raise AssertionError("the worker lacks failed")

    def tick(self, shard: Named) -> None:
        """Says that work on this shard gets on. Without a tick for workers.stall_timeout_s the worker is killed."""
        self.ticks[shard.name] += 1


def map_shards(
    shards: Sequence[Named],
    worker: type[ShardWorker],
    settings: dict[str, Any],
    workers: WorkersConfig,
    arguments: Callable[[], tuple[Any, ...]] = tuple,
) -> Iterator[Any]:
    """What `worker(**settings).process` makes of each shard, in the order in which they are done.

    A shard whose worker dies or hangs is done again by another; after MAX_TRIES the result is `worker.failed(shard,
    reason)`. A worker that is lost with its node does not count. arguments: asked for each shard as it is dealt out,
    and given to `process` with it. Raises what `process` and `__init__` raise.
    """
    with ShardPool(worker, settings, workers, keep=False) as pool:
        yield from pool.map(shards, arguments)


@dataclass
class _Work:
    """A shard in the hands of an actor, and when that actor last showed that it gets on with it."""

    shard: Named
    ticks: int = -1
    since: float = field(default_factory=time.monotonic)


class _Member:
    """An actor, what it has in hand, and the one question to it that is under way."""

    def __init__(self, handle: Any, generation: int):
        self.handle, self.generation = handle, generation
        self.work: dict[Any, _Work] = {}  # by the reference to the result
        self.node = ""  # known once it answers; until then it gets no work
        self.question = handle.about.remote(0.0)


class ShardPool:
    """Actors for one `map` after another. keep: they stay until the end, and get the shards that they had before."""

    def __init__(
        self, worker: type[ShardWorker], settings: dict[str, Any], workers: WorkersConfig, *, keep: bool = True
    ):
        self.worker, self.settings, self.workers, self.keep = worker, settings, workers, keep
        self.waiting: collections.deque[Named] = collections.deque()
        self.arguments: Callable[[], tuple[Any, ...]] = tuple
        self.homes: dict[str, _Member] = {}  # who had a shard last, where actors are kept
        self.suspects: collections.deque[Named] = collections.deque()  # had a worker die; each runs alone in its worker
        self.tries: collections.Counter[str] = collections.Counter()
        self.members: list[_Member] = []
        self.generation = 0  # actors are started some at a time
        # generations since the last that came up, of which actors died in starting
        self.lost_at_start: set[int] = set()
        self.ever_up = False
        self.grown = self.told = -float("inf")
        self.actor = _actor_class(worker, workers)

    def __enter__(self) -> "ShardPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def map(self, shards: Sequence[Named], arguments: Callable[[], tuple[Any, ...]] = tuple) -> Iterator[Any]:
        """As map_shards. One at a time, and to its end."""
        import ray

        self.waiting, self.arguments = collections.deque(shards), arguments
        self.tries.clear()
        yield from self._bury()
        self.grown = -float("inf")
        while self.waiting or self.suspects or any(member.work for member in self.members):
            self._grow()
            self._deal()
            asked = [reference for member in self.members for reference in (member.question, *member.work)]
            if not asked:  # all died in starting; `_grow` tries again later
                time.sleep(POLL_S)
                continue
            done, _ = ray.wait(asked, num_returns=1, timeout=POLL_S)
            # the rest of what is done, so that many small shards do not mean many waits
            done, _ = ray.wait(asked, num_returns=len(asked), timeout=0) if done else (done, [])
            for member in list(self.members):
                yield from self._collect(member, set(done))
            yield from self._end_the_stalled()
            self._tell()

    def _bury(self) -> Iterator[Any]:
        """Takes note of actors that died since the last map, so that they get no shard, and none is blamed for it."""
        import ray

        for member in list(self.members):
            done, _ = ray.wait([member.question], timeout=0)
            yield from self._collect(member, set(done))

    def close(self) -> None:
        for member in self.members:
            self._dismiss(member)
        self.members = []

    # -- actors ---------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Starts actors up to what is asked for and useful. A cluster that grew or lost a node is measured again."""
        now = time.monotonic()
        if now - self.grown < GROW_EVERY_S:
            return
        self.grown = now
        left = len(self.waiting) + len(self.suspects) + sum(bool(member.work) for member in self.members)
        wanted = self.workers.count or room(self.workers)
        missing = min(wanted, left) - len(self.members)
        self.generation += missing > 0
        for _ in range(missing):
            self.members.append(_Member(self.actor.remote(self.worker, self._all_settings()), self.generation))

    def _all_settings(self) -> dict[str, Any]:
        return {**self.settings, "num_cpus": self.workers.cpus or 1, "num_gpus": self.workers.gpus}

    def _deal(self) -> None:
        """Gives shards to the actors that answer, and sends home those for which there is nothing left."""
        for place in range(self.worker.in_flight):  # everyone gets a first shard before anyone gets a second
            for member in list(self.members):
                if not member.node or len(member.work) != place or self._runs_a_suspect(member):
                    continue
                if self.suspects and not member.work:
                    self._give(member, self.suspects.popleft())
                elif self.waiting:
                    self._give(member, self._next_for(member))
                elif not member.work and not self.keep:
                    self._dismiss(member)
                    self.members.remove(member)

    def _next_for(self, member: _Member) -> Named:
        """The first that it had before; or else that nobody had; or else the first."""
        if not self.keep:
            return self.waiting.popleft()
        owners = [self.homes.get(shard.name) for shard in self.waiting]
        wanted = next((owner for owner in (member, None) if owner in owners), owners[0])
        shard = self.waiting[owners.index(wanted)]
        self.waiting.remove(shard)
        self.homes[shard.name] = member
        return shard

    def _runs_a_suspect(self, member: _Member) -> bool:
        return any(self.tries[work.shard.name] for work in member.work.values())

    def _give(self, member: _Member, shard: Named) -> None:
        member.work[member.handle.process.remote(shard, *self.arguments())] = _Work(shard)

    def _dismiss(self, member: _Member) -> None:
        import ray

        ray.kill(member.handle)

    # -- what comes back ------------------------------------------------------------------------------------------

    def _collect(self, member: _Member, done: set[Any]) -> Iterator[Any]:
        """The results of one member that are there; its death, if that is what came."""
        import ray

        death: ray.exceptions.RayError | None = None
        for reference in [one for one in (*member.work, member.question) if one in done]:
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:  # the actor died, or its node, or the way to it
                death = error
                continue
            if reference == member.question:
                self._hear(member, *result)
            else:
                del member.work[reference]
                yield result
        if death is not None:
            self._dismiss(member)
            yield from self._lose(member, death)

    def _hear(self, member: _Member, node: str, ticks: dict[str, int]) -> None:
        if not member.node:
            self.lost_at_start.clear()
        member.node, self.ever_up = node, True
        for work in member.work.values():
            if ticks.get(work.shard.name, 0) != work.ticks:
                work.ticks, work.since = ticks.get(work.shard.name, 0), time.monotonic()
        # the rest between two questions keeps a thousand actors from keeping the driver busy
        member.question = member.handle.about.remote(min(1 + len(self.members) / 100, self.workers.stall_timeout_s / 8))

    def _end_the_stalled(self) -> Iterator[Any]:
        limit = self.workers.stall_timeout_s
        for member in list(self.members):
            stalled = [work for work in member.work.values() if time.monotonic() - work.since > limit]
            if stalled:
                self._dismiss(member)
                yield from self._lose(member, f"no progress for {limit:g} s (workers.stall_timeout_s)", stalled)

    def _lose(self, member: _Member, cause: Any, blamed: list[_Work] | None = None) -> Iterator[Any]:
        """Takes back the shards of an actor that is gone."""
        import ray

        self.members.remove(member)
        self.homes = {name: home for name, home in self.homes.items() if home is not member}
        if member.node:
            self.grown = -float("inf")  # another at once; after one that never came up, at the next measuring
        else:
            self.lost_at_start.add(member.generation)
            in_vain = getattr(cause, "actor_init_failed", False) and not self.ever_up
            if in_vain or len(self.lost_at_start) >= MAX_TRIES:
                raise cause  # the reason lies in the settings, not in a shard
        with_node = member.node not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        blamed = list(member.work.values()) if blamed is None else blamed
        for work in member.work.values():
            self.tries[work.shard.name] += work in blamed and not with_node
            if self.tries[work.shard.name] < MAX_TRIES:
                again = self.suspects if self.tries[work.shard.name] else self.waiting
                again.appendleft(work.shard)
                continue
            reason = f"its worker died or hung {MAX_TRIES} times; the last time: {_first_line(cause)}"
            yield self.worker.failed(work.shard, reason)

    def _tell(self) -> None:
        if time.monotonic() - self.told < TELL_EVERY_S or any(member.node for member in self.members):
            return
        if self.told > 0:
            print("still waiting for an actor to start: is there room for workers.cpus and workers.gpus?", flush=True)
        self.told = time.monotonic()


def _actor_class(worker: type[ShardWorker], workers: WorkersConfig) -> Any:
    import ray

    class Actor:
        def __init__(self, worker: type[ShardWorker], settings: dict[str, Any]):
            self.worker = worker(**settings)

        def process(self, shard: Named, *arguments: Any) -> Any:
            try:
                return self.worker.process(shard, *arguments)
            finally:
                self.worker.ticks.pop(shard.name, None)

        @ray.method(concurrency_group="watch")
        def about(self, rest_s: float) -> tuple[str, dict[str, int]]:
            """Its node, and the ticks of its shards, after a rest."""
            time.sleep(rest_s)
            return ray.get_runtime_context().get_node_id(), dict(self.worker.ticks)

    Actor.__name__ = Actor.__qualname__ = worker.__name__  # what `ps` and Ray's dashboard show
    decorate: Any = ray.remote  # whose types lack this keyword
    remote = decorate(concurrency_groups={"watch": 1})(Actor)
    return remote.options(max_concurrency=worker.in_flight, num_cpus=workers.cpus or 1, num_gpus=workers.gpus)


def _first_line(cause: Any) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    told = [line for line in lines if "died" in line or "exit" in line or "memory" in line]
    return (told or lines or [type(cause).__name__])[-1]
