"""A pool of Ray Data actors that processes a list of shards.

Only descriptors and small results pass through Ray Data. It assigns the shards, grows the pool with the cluster, and
retries the work of an actor that died. This module adds two things: it detects actors that hang, and it gives up on a
shard that keeps killing its actors, because Ray Data would retry it forever.
"""

import collections
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

from jobs.actors.cluster import device_for, gave_up, on_this_node, room, waiting_line
from jobs.config import WorkersConfig

MAX_TRIES = 3  # for a shard whose worker dies or hangs
MAX_BLOCKS = 10_000  # Ray Data needs a minute to start with 100,000; with more shards than this, a block holds several
SAY_EVERY_S = 30.0
GIVE_UP = signal.SIGUSR1  # not ctrl-C's signal: a command in the background of a script ignores that one
TICK_S = 5.0  # while waiting for the device or for storage

# Kills the process that started it if nothing is written to it for this many seconds. Ends with that process.
WATCHDOG = """
import os, select, signal, sys
while select.select([0], [], [], float(sys.argv[2]))[0]:
    if not os.read(0, 4096):
        sys.exit()
os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


class Named(Protocol):
    """A shard or another unit of work. Names are unique."""

    @property
    def name(self) -> str: ...


class ShardWorker:
    """The work of an actor. Subclasses hold a model and call `tick` as a shard progresses.

    in_flight: how many shards a worker processes at a time, each in its own thread. The threads share the device
    through `device_lock`, so one shard is read and written while another is encoded.
    """

    in_flight: ClassVar[int] = 1

    def __init__(self, num_cpus: float, num_gpus: float):
        import torch

        torch.set_num_threads(max(1, int(num_cpus)))  # Ray would leave one thread per process
        self.device = device_for(num_gpus)
        self.device_lock = threading.Lock()
        self.ticked: dict[str, float] = {}  # name of a shard -> when its work last progressed

    def process(self, shard: Any) -> Any:
        raise NotImplementedError

    def failed(self, shard: Any, reason: str) -> Any:
        """The result of a shard whose workers died or hung MAX_TRIES times."""
        raise NotImplementedError

    def finished(self, shard: Any) -> Any:
        """The result of a shard that `process` finished, if the result was lost with its worker.

        None if it is unknown; the shard is then processed again.
        """
        return None

    def tick(self, shard: Named) -> None:
        """Reports progress on this shard. A worker without a tick for workers.stall_timeout_s is killed."""
        self.ticked[shard.name] = time.monotonic()

    @contextlib.contextmanager
    def ticking(self, shard: Named) -> Iterator[None]:
        """Inside, elapsed time counts as progress. For calls that have time limits of their own, such as storage."""
        done = threading.Event()

        def tick() -> None:
            while not done.wait(TICK_S):
                self.tick(shard)

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def map_shards(
    shards: Sequence[Named],
    worker: type[ShardWorker],
    settings: dict[str, Any],
    workers: WorkersConfig,
    *,
    job: str = "tokenmill",
) -> Iterator[Any]:
    """Yields `worker(**settings).process(shard)` for each shard, in the order in which the shards finish.

    If a worker dies or hangs, another one retries its shard; after MAX_TRIES the result is `failed(shard, reason)`. A
    worker that is lost with its node does not count as a try. job: the name in Ray's dashboard and metrics. Raises what
    `process` and `worker.__init__` raise, and NoRoom if no worker has started for workers.wait_s (in the main thread;
    in another one it continues to wait).
    """
    import ray.data
    from ray import cloudpickle

    if not shards:
        return
    options = {"num_cpus": workers.cpus or 1, "num_gpus": workers.gpus}
    at_most = min(workers.count or len(shards), len(shards))
    # a ledger that died is started again with an empty memory: a shard that kills its workers gets more tries then
    ledger: Any = (
        ray.remote(_Ledger)
        .options(num_cpus=0, scheduling_strategy=on_this_node(), max_restarts=-1, max_task_retries=-1)
        .remote()
    )
    source = ray.data.from_items(
        [{"shard": cloudpickle.dumps(shard)} for shard in shards], override_num_blocks=min(len(shards), MAX_BLOCKS)
    )
    configure(source.context)
    results = source.map(
        type(worker.__name__, (_Actor,), {}),  # the name that `ps` and Ray's dashboard show
        fn_constructor_args=(worker, {**settings, **options}, ledger, workers.stall_timeout_s),
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=min(workers.count or room(workers), at_most),
            max_size=at_most,
            max_concurrent_calls_per_actor=worker.in_flight,
            max_tasks_in_flight_per_actor=worker.in_flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=options["num_cpus"],
        num_gpus=workers.gpus or None,
    )
    results.set_name(job)
    over = threading.Event()
    watcher = threading.Thread(target=_watch_ledger, args=(job, workers, ledger, over), daemon=True)
    with _raising_no_room(workers):
        watcher.start()
        try:
            # no prefetch: it would hold a result back until the next one arrives
            for batch in results.iter_batches(prefetch_batches=0, batch_size=None, batch_format="numpy"):
                yield from map(cloudpickle.loads, batch["result"])
        finally:
            over.set()
            watcher.join(timeout=1)  # Ray prints a line about each call that is pending when its actor is killed
            ray.kill(ledger)


def configure(context: Any) -> None:
    """Sets Ray Data's options for this dataset only; the user's own datasets in this process keep theirs."""
    context.enable_progress_bars = context.print_on_execution_start = False  # the command shows its own
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # a cluster may be slow to start, and a shard may take hours
    context.max_consecutive_actor_init_deaths = MAX_TRIES - 1
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.issue_detectors_config.detectors = []
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # the others write Ray's log files
            handler.setLevel(logging.ERROR)


@contextlib.contextmanager
def _raising_no_room(workers: WorkersConfig) -> Iterator[None]:
    """Raises NoRoom in the main thread when it gets GIVE_UP. In other threads, which get no signals, does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        raise gave_up(workers)

    before = signal.signal(GIVE_UP, give_up)
    try:
        yield
    finally:
        signal.signal(GIVE_UP, before)


def _watch_ledger(job: str, workers: WorkersConfig, ledger: Any, over: threading.Event) -> None:
    """Prints what the job waits for as long as no worker has a shard. Restarts a ledger that does not answer.

    Sends GIVE_UP to the main thread when the job has waited for workers.wait_s.
    """
    import ray

    while not over.wait(min(SAY_EVERY_S, workers.wait_s)):
        with contextlib.suppress(ray.exceptions.RayError):  # the driver itself reports a lost cluster
            try:
                idle_s = ray.get(ledger.idle_s.remote(), timeout=SAY_EVERY_S)
            except ray.exceptions.GetTimeoutError:
                print(f"{job}: restarting the ledger of shards, which did not answer for {SAY_EVERY_S:g} s", flush=True)
                ray.kill(ledger, no_restart=False)
                continue
            if idle_s >= workers.wait_s and callable(signal.getsignal(GIVE_UP)):
                signal.pthread_kill(threading.main_thread().ident or 0, GIVE_UP)
                return
            if idle_s >= SAY_EVERY_S:
                print(waiting_line(job, workers, idle_s), flush=True)


class _Ledger:
    """Which shards began on which node and have not ended. Ray Data retries a shard only if its actor died."""

    def __init__(self) -> None:
        self.last_s = time.monotonic()  # when a shard last began or ended
        self.begun: dict[str, list[str]] = collections.defaultdict(list)  # name -> nodes of the tries that did not end
        self.stalls: collections.Counter[str] = collections.Counter()
        self.ended: set[str] = set()

    def look_up(self, name: str) -> tuple[int, int, bool]:
        """Workers that died with this shard (lost nodes do not count), how many of those stalled, did the shard end."""
        import ray

        if name not in self.begun:
            return 0, 0, name in self.ended
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(node in alive for node in self.begun[name]), self.stalls[name], name in self.ended

    def ping(self) -> None:
        """Workers call this: an answer means that their job is still running."""

    def idle_s(self) -> float:
        """How long no worker has had a shard."""
        import ray

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        busy = any(node in alive for nodes in self.begun.values() for node in nodes)
        return 0.0 if busy else time.monotonic() - self.last_s

    def begin(self, name: str, node: str) -> None:
        self.begun[name].append(node)
        self.last_s = time.monotonic()

    def end(self, name: str) -> None:
        self.begun.pop(name, None)
        self.last_s = time.monotonic()
        self.ended.add(name)

    def stall(self, stalled: list[str], others: list[str]) -> None:
        """A worker is about to be killed for its stalled shards. Its other shards are not blamed."""
        self.stalls.update(stalled)
        for name in others:
            if self.begun.get(name):
                self.begun[name].pop()


class _Actor:
    """The class that Ray Data calls: a `ShardWorker`, its watchdog, and the limit on tries."""

    def __init__(self, worker: type[ShardWorker], settings: dict[str, Any], ledger: Any, stall_timeout_s: float):
        import ray

        self.worker, self.ledger, self.limit = worker(**settings), ledger, stall_timeout_s
        self.node = ray.get_runtime_context().get_node_id()
        self.in_hand: set[str] = set()
        self.places, self.turn = threading.Semaphore(worker.in_flight), threading.Lock()
        command = [sys.executable, "-S", "-c", WATCHDOG, str(os.getpid()), str(stall_timeout_s)]
        self.watchdog = subprocess.Popen(command, stdin=subprocess.PIPE)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Kills this process if a shard stalls. The watchdog does it if this thread cannot run: when the process is
        stopped, or a call into C holds Python's lock. Also ends with the job: after an exception Ray Data keeps its
        actors until the driver exits."""
        import ray

        assert self.watchdog.stdin is not None
        answer = self.ledger.ping.remote()
        while True:
            if ray.wait([answer], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.ActorUnavailableError):  # it is being restarted
                    try:
                        ray.get(answer)
                    except ray.exceptions.ActorDiedError:  # the job is over and killed it
                        ray.kill(ray.get_runtime_context().current_actor)
                answer = self.ledger.ping.remote()
            in_hand, limit = list(self.in_hand), time.monotonic() - self.limit
            stalled = [name for name in in_hand if self.worker.ticked[name] < limit]
            if stalled:
                others = [name for name in in_hand if name not in stalled]
                with contextlib.suppress(ray.exceptions.RayError):  # then the others are blamed too, and retried alone
                    ray.get(self.ledger.stall.remote(stalled, others), timeout=self.limit)
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(self.watchdog.stdin.fileno(), b".")
            time.sleep(min(5.0, self.limit / 8))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray
        from ray import cloudpickle

        shard = cloudpickle.loads(row["shard"])
        deaths, stalls, ended = ray.get(self.ledger.look_up.remote(shard.name))
        if deaths >= MAX_TRIES:
            reason = f"its worker died or hung {deaths} times"
            if stalls:
                reason += f", {stalls} of them without progress for {self.limit:g} s (workers.stall_timeout_s)"
            return _packed(self.worker.failed(shard, reason))
        if ended and (result := self.worker.finished(shard)) is not None:
            return _packed(result)
        with self._place(alone=deaths > 0):
            ray.get(self.ledger.begin.remote(shard.name, self.node))
            self.worker.tick(shard)
            self.in_hand.add(shard.name)
            try:
                return _packed(self.worker.process(shard))
            finally:
                self.in_hand.discard(shard.name)
                ray.get(self.ledger.end.remote(shard.name))

    @contextlib.contextmanager
    def _place(self, alone: bool) -> Iterator[None]:
        """A shard that may have killed a worker is retried alone, so that no other shard is blamed."""
        places = self.worker.in_flight if alone else 1
        with self.turn:
            for _ in range(places):
                self.places.acquire()
        try:
            yield
        finally:
            self.places.release(places)


def _packed(result: Any) -> dict[str, Any]:
    from ray import cloudpickle

    return {"result": cloudpickle.dumps(result)}
