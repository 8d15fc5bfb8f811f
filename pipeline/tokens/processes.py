"""Which of the processes that read a dataset together this one is: its rank, and its DataLoader worker."""

import os
from collections.abc import Iterator
from typing import Any

from pipeline.errors import OutputMismatch

try:  # torch's DataLoader treats every other class as a map-style dataset
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError:
    IterableDataset = object  # type: ignore[assignment, misc]

    def get_worker_info() -> None:
        return None


class SharedCalls:
    """Calls of set_epoch, which reach the workers of a DataLoader through memory that all processes share."""

    def __init__(self) -> None:
        self._memory: Any = None  # int64: epoch, number of calls, whether a worker reads
        self._received = 0
        if IterableDataset is not object:
            import torch

            self._memory = torch.zeros(3, dtype=torch.int64).share_memory_()

    def send(self, epoch: int) -> None:
        if self._memory is not None:
            self._memory[0] = epoch
            self._memory[1] += 1
            self._memory[2] = 0
            self._received = int(self._memory[1])  # also for workers that start later, as copies of this dataset

    def receive(self) -> int | None:
        """In a worker that begins to read: the epoch of a call that it has not received, if there is one."""
        self._memory[2] = 1
        calls = int(self._memory[1])
        new, self._received = calls > self._received, calls
        return int(self._memory[0]) if new else None

    def read_here(self) -> None:
        if self._memory is not None:
            self._memory[2] = 0

    def read_by_workers(self) -> bool:
        return self._memory is not None and bool(self._memory[2])


def place() -> tuple[int, int]:
    """Rank and world size of this process."""
    if IterableDataset is not object:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def worker_of() -> tuple[int, int]:
    """Number of this DataLoader worker, and the number of workers; (0, 0) outside a worker."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 0)


def states_in(states: Any, marks: set[str]) -> Iterator[dict[str, Any]]:
    """The states of streams within states of any depth, such as those of torchdata. marks: keys that they have."""
    if isinstance(states, dict) and marks <= states.keys():
        yield states
    elif isinstance(states, dict | list | tuple):
        if isinstance(states, dict) and states.get("_steps_since_snapshot"):
            raise OutputMismatch(
                "a StatefulDataLoader saved this state with snapshot_every_n_steps above 1, so its workers were ahead "
                "of it; load it into a loader of the same kind, or save with snapshot_every_n_steps=1"
            )
        for inner in states.values() if isinstance(states, dict) else states:
            yield from states_in(inner, marks)


def split(start: int, stop: int, part: int, parts: int) -> tuple[int, int]:
    """Bounds of the part-th of `parts` consecutive parts of start..stop. Their lengths differ by at most one."""
    length = stop - start
    return start + part * length // parts, start + (part + 1) * length // parts
