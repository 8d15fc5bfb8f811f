"""Two real processes that train together over gloo."""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

RANKS = 2
Measure = Callable[[int], Any]  # runs on each rank; must be a module-level function, which the processes import by name


def measured_by_ranks(measure: Measure, folder: Path) -> list[Any]:
    """Runs measure(rank) on each rank and returns the results.

    Raises what a rank raises. Ranks time out after a minute.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])
        if sys.platform == "linux":
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve
        torch.multiprocessing.spawn(_work, (measure, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _work(rank: int, measure: Measure, folder: str) -> None:
    torch.set_num_threads(1)
    meet, limit = f"file://{folder}/meet", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=RANKS, timeout=limit)
    try:
        torch.save(measure(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
