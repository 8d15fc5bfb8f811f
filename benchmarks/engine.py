"""`tokenize` with Ray Data compared to the scheduler that it replaced: the same workers, shards and cores.

The old scheduler is the last version of jobs/shard_pool.py in git.
"""

import collections
import itertools
import statistics
import subprocess
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.measure import Table, ratio_text
from benchmarks.tokenize import ROOT, Run, Timed, TimedWorker, make_tokenizer, run_of, settings_of
from jobs.actors import cluster
from jobs.actors.pool import Named, map_shards
from jobs.artifacts import token_layout
from jobs.config import TokensConfig, WorkersConfig, load_config
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.tokens import Output
from tokenizer.tokenizer import Tokenizer

OLD = "5f38885:jobs/shard_pool.py"
SHARDS = 8
PICTURES = 1000  # per shard
ROUNDS = 5
Map = Callable[..., Iterator[Any]]


class OldTimedWorker(TimedWorker):
    """For the old scheduler, which reads the number of ticks. The new one reads the time of the last tick."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.ticks: collections.Counter[str] = collections.Counter()

    def tick(self, shard: Named) -> None:
        self.ticks[shard.name] += 1


def run() -> Table:
    cluster.start()
    sides: dict[str, Map] = {"shard_pool, our own scheduler": old_map_shards(), "Ray Data": map_shards}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = load_config([str(ROOT / "configs/demo.yaml")])
        make_tokenizer(config, work / "tokenizer")
        shards = write_shards(work / "shards")
        for side in sides.values():  # warm up both
            timed_run(side, config.tokens, shards[:2], work)
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        for number in range(ROUNDS):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                runs[name].append(timed_run(sides[name], config.tokens, shards, work))
    return report(runs)


def report(runs: dict[str, list[Run]]) -> Table:
    old = next(iter(runs.values()))
    table = Table(
        "tokenize with Ray Data compared to our own scheduler",
        [
            f"{SHARDS} shards of {PICTURES} photos (those of samples/train, repeated). The model is that of "
            "configs/demo.yaml with random weights. One worker per CPU, each with two shards in flight. The other side "
            f"is jobs/shard_pool.py of commit {OLD.split(':')[0]}, with the same workers.",
            "start: from the call until work on the first shard begins. steady: from then to the end. CPU: CPU time of "
            "the workers.",
            f"Medians of {ROUNDS} interleaved rounds. Ratios compare runs of the same round; the range is in "
            "parentheses.",
        ],
        ["side", "start, s", "steady, samples/s", "ratio", "CPU ms/sample", "ratio", "driver CPU ms/sample"],
    )
    for name, found in runs.items():
        cells = [name, f"{statistics.median(one.start_s for one in found):.1f}"]
        for figure in (lambda one: one.steady, lambda one: one.cpu_s / one.samples * 1e3):
            ours, theirs = [figure(one) for one in found], [figure(one) for one in old]
            cells += [f"{statistics.median(ours):.4g}", "1" if found is old else ratio_text(ours, theirs)]
        driver = statistics.median(one.driver_cpu_s / one.samples * 1e3 for one in found)
        table.rows.append([*cells, f"{driver:.2g}"])
    table.raw = {name: [vars(one) for one in found] for name, found in runs.items()}
    return table


def timed_run(side: Map, options: TokensConfig, shards: list[Shard], work: Path) -> Run:
    layout = token_layout(Tokenizer.from_pretrained(work / "tokenizer"), options)
    output = Output.create(tempfile.mkdtemp(dir=work, prefix="out-"), layout, ShardList(shards), {})
    settings = settings_of(work, output, options)
    worker = TimedWorker if side is map_shards else OldTimedWorker

    def call() -> list[Timed]:
        return list(side(shards, worker, settings, WorkersConfig()))

    return run_of(call)


def old_map_shards() -> Map:
    source = subprocess.run(["git", "show", OLD], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
    module = types.ModuleType("shard_pool")
    exec(compile(source, OLD, "exec"), module.__dict__)
    return module.map_shards


def write_shards(folder: Path) -> list[Shard]:
    folder.mkdir()
    photos = [
        sample.members["jpg"]
        for shard in find_shards(str(ROOT / "samples/train/*.tar")).shards
        for sample in read_samples(shard.url)
    ]
    endless = itertools.cycle(photos)
    for number in range(SHARDS):
        with tarfile.open(folder / f"photos-{number:03d}.tar", "w") as archive:
            for i, data in enumerate(itertools.islice(endless, PICTURES)):
                member = tarfile.TarInfo(f"{i:06d}.jpg")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
    return find_shards(f"{folder}/*.tar").shards
