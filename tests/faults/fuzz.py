"""Reads hostile files of every kind: `python -m tests.faults.fuzz [KIND ...]`, or `... KIND NUMBER` for one variant.

Each variant is a real file (`seeds.py`) after one to three mutations (`mutations.py`), and goes to the product as a
user's file would (`roads.py`). It must be read within the limits, or refused with a message that says what is wrong.
Everything else is a finding: another exception, a crash, more time or memory than allowed, output of a C library on
stderr, and content that differs although the format shows the damage. A worker process reads the variants one by one.
Adds the figures to results/faults/fuzz.json. KIND NUMBER also writes the variant to ./variant.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.faults.mutations import MUTATIONS
from tests.faults.seeds import Seed, seeds

RESULTS = Path(__file__).parents[2] / "results/faults/fuzz.json"
VARIANTS = 1500  # of each kind
MAX_CPU_S, MAX_WALL_S = 5.0, 60.0  # of one variant; the second stops a hang on a busy machine
MAX_BYTES = 256 * 2**20  # resident memory that one variant may add
MAX_ADDRESSES = 4 * 2**30  # more address space than at the start
REASONS = 6  # in the figures of a kind; the others are summed
WRAP = "with new checksums"

# where a cut file is noticed, or gives what the whole file gives; and where flipped bits are
CUT_IS_NOTICED = (
    *("jpeg", "png", "apng", "gif", "webp", "avif", "tiff", "bmp", "tga", "jpeg 2000", "pnm"),
    *("wav", "rf64", "aiff", "au", "caf", "w64", "sph", "flac", "m4a", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"),
)
FLIP_IS_NOTICED = ("png", "apng", "ogg", "opus", "tar.gz", "tar.bz2", "tar.xz")
ALL_IS_NOTICED = ("token Parquet", "manifest entries", "dataset.json")
# libsndfile offers no way to silence it; in jobs it reaches only the logs of Ray's workers
OF_LIBMPG123 = re.compile(r"(Note: |Warning: Xing |\[src/libmpg123/).*")


@dataclass
class Verdict:
    """What came of one variant. finding: what should not have happened, or an empty string.

    prints: whether libmpg123 wrote lines about the file to stderr.
    """

    kind: str
    number: int
    mutations: list[str]
    refusal: str | None = None
    finding: str = ""
    cpu_s: float = 0.0
    added_bytes: int = 0
    prints: bool = False


def variant_of(kind: str, number: int, seed: int, files: dict[str, list[Seed]]) -> tuple[Seed, bytes, list[str]]:
    """The seed file, the damaged file and the mutations. It depends on nothing else."""
    rng = random.Random(f"{seed} {kind} {number}")
    chosen = rng.choice(files[kind])
    inside = rng.random() < 0.5
    data = chosen.data if inside else chosen.file
    others = [other.data if inside else other.file for other in files[kind] + files[rng.choice(list(files))]]
    names = [rng.choice(list(MUTATIONS)) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for name in names:
        data = MUTATIONS[name](data, rng, others)
    return chosen, chosen.wrap(data) if inside else data, [*names, *([WRAP] if inside and chosen.wraps else [])]


def is_detectable(kind: str, mutations: list[str]) -> bool:
    if kind in ALL_IS_NOTICED:
        return True
    return (mutations == ["cut"] and kind in CUT_IS_NOTICED) or (
        mutations == ["bits flipped"] and kind in FLIP_IS_NOTICED
    )


# -- the worker -------------------------------------------------------------------------------------------------------


def work(connection: Connection, seed: int) -> None:
    """Answers each (kind, number) with a Verdict. What C libraries print to stderr is a finding."""
    from tests.faults.roads import Roads

    files = seeds()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        roads = Roads(Path(folder))
        os.dup2(printed.fileno(), 2)
        limit = _status("VmSize") + MAX_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while (asked := connection.recv()) is not None:
            verdict = judge(roads, files, *asked, seed)
            printed.seek(0)
            lines = [line for line in printed.read().decode(errors="backslashreplace").splitlines() if line.strip()]
            printed.seek(0)
            printed.truncate()
            others = [line for line in lines if not OF_LIBMPG123.fullmatch(line)]
            verdict.prints = len(others) < len(lines)
            if others:
                verdict.finding = verdict.finding or f"on stderr: {others}"
            connection.send(verdict)


def judge(roads: Any, files: dict[str, list[Seed]], kind: str, number: int, seed: int) -> Verdict:
    from tests.faults.roads import Variant, Wrong

    chosen, file, mutations = variant_of(kind, number, seed, files)
    verdict = Verdict(kind, number, mutations)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    before, start = _status("VmRSS"), time.process_time()
    try:
        noticed = is_detectable(kind, mutations)
        settings = 0 if noticed else number % 2
        verdict.refusal = roads.refusal(Variant(kind, chosen, file, noticed, settings))
    except Wrong as wrong:
        verdict.finding = str(wrong)
    except Exception as error:
        verdict.finding = f"{type(error).__name__}: {error}"
    verdict.cpu_s, verdict.added_bytes = time.process_time() - start, max(0, _status("VmHWM") - before)
    if verdict.cpu_s > MAX_CPU_S:
        verdict.finding = verdict.finding or f"{verdict.cpu_s:.1f} s"
    if verdict.added_bytes > MAX_BYTES:
        verdict.finding = verdict.finding or f"{verdict.added_bytes} bytes of memory"
    return verdict


def _status(name: str) -> int:
    """Bytes that /proc says about this process."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


class Worker:
    """A process that reads variants, and another one after a crash or a hang."""

    def __init__(self, seed: int):
        self.seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=work, args=(there, self.seed), daemon=True)
        self._process.start()
        there.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def judge(self, kind: str, number: int) -> Verdict:
        what = f"no end within {MAX_WALL_S:g} s"
        with contextlib.suppress(EOFError, ConnectionError):  # the process is gone
            self._connection.send((kind, number))
            if self._connection.poll(MAX_WALL_S):
                return self._connection.recv()
            self._process.kill()
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            what = f"the process ended with {self._process.exitcode}"
        self._start()
        return Verdict(kind, number, variant_of(kind, number, self.seed, seeds())[2], finding=what)

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join()


# -- figures ----------------------------------------------------------------------------------------------------------


def attack(worker: Worker, variants: dict[str, int]) -> dict[str, list[Verdict]]:
    """The verdicts by kind. variants: how many of each kind."""
    return {kind: [worker.judge(kind, number) for number in range(count)] for kind, count in variants.items()}


def figures(verdicts: list[Verdict]) -> dict[str, Any]:
    reasons = collections.Counter(_group(verdict.refusal) for verdict in verdicts if verdict.refusal)
    common = dict(reasons.most_common(REASONS))
    return {
        "variants": len(verdicts),
        "read": sum(verdict.refusal is None and not verdict.finding for verdict in verdicts),
        "refused": sum(reasons.values()),
        "reasons": {**common, "others": sum(reasons.values()) - sum(common.values())},
        "slowest_s": round(max(verdict.cpu_s for verdict in verdicts), 3),
        "peak_mib": round(max(verdict.added_bytes for verdict in verdicts) / 2**20, 1),
        "with_lines_of_libmpg123": sum(verdict.prints for verdict in verdicts),
        "findings": dict(collections.Counter(_group(v.finding.partition(":")[0]) for v in verdicts if v.finding)),
    }


def _group(message: str) -> str:
    """The message without the values of one file."""
    short = re.sub(r"/\S+/", "", message)
    return re.sub(r"b?(['\"]).*?\1", "X", re.sub(r"\d+", "N", short))[:80]


def main() -> None:
    *kinds, last = sys.argv[1:] or [""]
    if last.isdigit():
        show(kinds[0], int(last))
        return
    worker = Worker(seed=0)
    for kind in [*kinds, last] if last else list(seeds()):
        verdicts = attack(worker, {kind: VARIANTS})[kind]
        for verdict in verdicts:
            if verdict.finding:
                print(kind, verdict.number, ", ".join(verdict.mutations), verdict.finding[:300], sep=" | ", flush=True)
        _save(kind, figures(verdicts))
    worker.stop()


def _save(kind: str, found: dict[str, Any]) -> None:
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    first = saved.get(kind, {}).get("findings_of_the_first_run", found["findings"])
    saved[kind] = {**found, "findings_of_the_first_run": first}
    RESULTS.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
    print(f"{kind}: {found['variants']} variants, {found['read']} read, findings: {found['findings']}", flush=True)


def show(kind: str, number: int, seed: int = 0) -> None:
    """Reads one variant in this process."""
    from tests.faults.roads import Roads

    Path("variant").write_bytes(variant_of(kind, number, seed, seeds())[1])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asdict(judge(Roads(Path(folder)), seeds(), kind, number, seed)), indent=1))


if __name__ == "__main__":
    main()
