"""Writes samples into tar files, in several processes."""

import collections
import io
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from jobs.config import ConfigError
from jobs.packing.names import printable
from jobs.packing.sample import Content, Packed
from pipeline import storage

R = TypeVar("R")
MAX_WORKERS = 8  # by default; each holds a shard in memory
NUMBER = re.compile(r"%0?\d*d")


@dataclass(frozen=True)
class Written:
    """is_new: False if the shard was already there with the same bytes."""

    num_samples: int
    is_new: bool


def shard_pattern(text: str) -> str:
    """A pattern for the % operator with a number. Without a number in the name, one is added to it."""
    if "%" not in text:
        return f"{text}%06d.tar" if text.endswith("/") else f"{text.removesuffix('.tar')}-%06d.tar"
    if len(NUMBER.findall(text)) != 1 or text.count("%") != 1:
        raise ConfigError(f"pack.shards is {text!r}; it must contain one number such as %06d, and no other %")
    return text


def write_shards(parts: Iterator[list[Packed]], pattern: str, workers: int) -> Iterator[Written]:
    """Writes one shard for each part; yields in their order. The shards are the same for any number of workers.

    workers: 0 takes one for each CPU core that this process may use, up to MAX_WORKERS. Raises ConfigError if another
    file has the name of a shard.
    """
    jobs = ((storage.normalise(pattern % number), part) for number, part in enumerate(parts))
    first = list(islice(jobs, 2))
    workers = num_workers(workers)
    if workers == 1 or len(first) < 2:
        return (write_shard(*job) for job in chain(first, jobs))
    return in_processes(write_shard, chain(first, jobs), workers)


def write_shard(url: str, samples: list[Packed]) -> Written:
    """Raises ConfigError if the file already exists with other content, or if a file of a sample cannot be read."""
    data = _to_tar(samples)
    try:
        storage.write_once(url, data)
    except FileExistsError as error:
        if storage.read(url) != data:
            raise ConfigError(
                f"{url} already exists with other content; choose another pack.shards, or remove it"
            ) from error
        return Written(len(samples), is_new=False)
    return Written(len(samples), is_new=True)


def in_processes(
    function: Callable[..., R],
    jobs: Iterator[tuple[Any, ...]],
    workers: int,
    advice: str = "lower pack.workers or pack.samples_per_shard",
) -> Iterator[R]:
    """The results of the function in the order of the jobs, which are its arguments.

    Prepares at most one job more than there are workers, because jobs from tables hold their bytes. Raises ConfigError
    with the advice if a process dies.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of other threads
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(storage.url_secrets(),))
    pending: collections.deque[Future[R]] = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a process that writes shards died, probably for lack of memory; {advice}, and rerun the command"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the shards that are being written


def _begin(url_secrets: dict[str, str]) -> None:
    """Prepares a worker. Storage options come by environment variables, but secrets of URLs do not.

    Workers leave ctrl-C to the parent. They end when it is killed, since they would wait for work for ever.
    """
    storage.set_url_secrets(url_secrets)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def num_workers(asked: int) -> int:
    """The number that was asked for; for 0 one for each CPU core that this process may use, up to MAX_WORKERS."""
    return asked or min(_num_cores(), MAX_WORKERS)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_tar(samples: list[Packed]) -> bytes:
    """The bytes of one shard. They depend on the samples only, not on the time or the user."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|") as archive:
        for sample in samples:
            for member, content in sorted(sample.members.items()):
                data = _read(content)
                archive.addfile(tar_header(f"{sample.key}.{member}", len(data)), io.BytesIO(data))
    return out.getvalue()


def tar_header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = size, 0o444, 0
    header.uname = header.gname = "tokenmill"
    return header


def _read(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes() if isinstance(content, Path) else storage.read(content)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ConfigError(
            f"{printable(str(content))} cannot be read ({error.strerror or error}); nothing of its shard was written"
        ) from error
