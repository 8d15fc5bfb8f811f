"""Rounds in which every side runs once, and their results: medians, and ratios of runs of the same round."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "ray", "pyarrow", "numpy", "scipy", "pillow", "webdataset", "datasets")


@dataclass
class Table:
    """The result of one benchmark. notes: how it was measured, and what was checked first."""

    title: str
    notes: list[str]
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    raw: dict[str, object] = field(default_factory=dict)  # every single measurement, only for the JSON file


@dataclass
class Timing:
    """Seconds of one run: wall time, and CPU time of this process on all cores."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(sides: dict[str, Callable[[], object]], rounds: int, warmups: int = 1) -> dict[str, list[Timing]]:
    """Runs each side once per round. Each round starts with a different side, so a busy minute affects all of them."""
    for _ in range(warmups):
        for work in sides.values():
            work()
    names = list(sides)
    found: dict[str, list[Timing]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            found[name].append(timed(sides[name]))
    return found


def ratio_text(over: list[float], under: list[float]) -> str:
    """Median and range of the ratios of two sides in the same round: "0.95 (0.91..0.97)"."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):.3g} ({min(ratios):.3g}..{max(ratios):.3g})"


def about_this_run(command: str) -> dict[str, str]:
    """Date, machine, versions and command, which every published number needs."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{models[0] if models else platform.processor()}, {len(models)} cores",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{p} {_version(p)}" for p in PACKAGES)]),
        "command": command,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a borrowed machine has only what its benchmarks need
        return "not installed"
