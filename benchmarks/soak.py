"""Many small shards through one actor: memory of driver and actor over time. More shards must not need more memory."""

import io
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import ray  # noqa: F401  puts its bundled psutil on the path

import psutil  # isort: skip
from matplotlib.figure import Figure

from benchmarks.measure import Table
from benchmarks.tokenize import ROOT, TimedWorker, make_tokenizer, settings_of
from jobs.actors import cluster
from jobs.actors.pool import map_shards
from jobs.artifacts import token_layout
from jobs.config import WorkersConfig, load_config
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import find_shards
from pipeline.tokens import Output
from tokenizer.tokenizer import Tokenizer

SHARDS = 500
SAMPLES_PER_SHARD = 4
EVERY_S = 0.5
WARM_UP = 0.2  # share of the shards after which memory must stay flat
PLOT = Path(__file__).parent / "results" / "soak.png"


class Memory(threading.Thread):
    """Resident MB of this process and of the actor, sampled every half second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.actor: psutil.Process | None = None
        self.rows: list[tuple[int, float, float]] = []  # shards done, MB of the driver, MB of the actor
        self.done = 0
        self.stop = threading.Event()

    def run(self) -> None:
        driver = psutil.Process()
        while not self.stop.wait(EVERY_S):
            if self.actor is not None:
                self.rows.append((self.done, *(p.memory_info().rss / 1e6 for p in (driver, self.actor))))


def run() -> Table:
    cluster.start()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = load_config([str(ROOT / "configs/demo.yaml")])
        make_tokenizer(config, work / "tokenizer")
        write_shards(work / "shards")
        inputs = find_shards(f"{work}/shards/*.tar")
        layout = token_layout(Tokenizer.from_pretrained(work / "tokenizer"), config.tokens)
        output = Output.create(str(work / "out"), layout, inputs, {})
        settings = settings_of(work, output, config.tokens)
        memory, start = Memory(), time.monotonic()
        memory.start()
        for one in map_shards(inputs.shards, TimedWorker, settings, WorkersConfig(count=1)):
            assert one.result.failure is None, one.result
            memory.actor = memory.actor or psutil.Process(one.pid)
            memory.done += 1
        memory.stop.set()
        memory.join()
        return report(memory.rows, time.monotonic() - start)


def write_shards(folder: Path) -> None:
    """The photos of samples/train, repeated, in small shards."""
    folder.mkdir()
    photos = [
        (sample.key, sample.members["jpg"])
        for shard in find_shards(str(ROOT / "samples/train/*.tar")).shards
        for sample in read_samples(shard.url)
    ]
    for i in range(SHARDS):
        with tarfile.open(folder / f"small-{i:04d}.tar", "w") as archive:
            for j in range(SAMPLES_PER_SHARD):
                key, data = photos[(i * SAMPLES_PER_SHARD + j) % len(photos)]
                member = tarfile.TarInfo(f"{key}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def report(rows: list[tuple[int, float, float]], seconds: float) -> Table:
    warm = [row for row in rows if row[0] >= WARM_UP * SHARDS]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    table = Table(
        "memory over many small shards",
        [f"{SHARDS} shards of {SAMPLES_PER_SHARD} photos through one actor in {seconds:.0f} s. See soak.png."],
        ["process", f"MB after {WARM_UP:.0%} of the shards", "MB at the end", "MB at most", "growth, kB per shard"],
    )
    for column, name in ((1, "driver"), (2, "actor")):
        axis.plot([row[0] for row in rows], [row[column] for row in rows], label=name)
        first, last = warm[0], warm[-1]
        growth = (last[column] - first[column]) * 1e3 / max(1, last[0] - first[0])
        most = max(row[column] for row in rows)
        table.rows.append([name, f"{first[column]:.0f}", f"{last[column]:.0f}", f"{most:.0f}", f"{growth:.1f}"])
    axis.set(xlabel="shards done", ylabel="resident memory (MB)", ylim=(0, None))
    axis.legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
    table.raw = {"shards_done, driver_mb, actor_mb": rows}
    return table
