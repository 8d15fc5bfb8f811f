r"""Run the experiments E1, E2 and E3 at the papers' length on one GPU, without Ray.

  python scripts/gpu_experiments.py e1 e2 --data cifar10_jpg_train.parquet --out runs/gpu --minutes 9 --parallel 4

Each finished trial is one file OUT/<experiment>/trials/<name>.json, as `tokenmill compare` writes it. Rerun the same
command to continue: it runs only the trials that have no file yet. At its end each run writes the tables and plots of
the trials that have finished to OUT/<experiment>/reports. Trials of the first seed run first. --minutes is checked
when a trial starts and at each row of its log: a run may exceed it by a fiftieth of a trial and by its evaluation.

--length paper   E1: 100 epochs of 45,000 pictures at batch 256 with 10 epochs of warm-up, GM-VQ at lr up to 1e-2, the
                 other rows at the lr of the config (configs/compare/e1_paper.yaml). E2 and E3: 50 epochs at batch 256;
                 batch and warm-up are our choice (configs/compare/e2_paper.yaml).
--length quick   the steps and the batch of the config, as in results/e1 to e3.
--length 500     as paper, but with this many steps, a tenth of them warm-up.

Data: a Parquet file of CIFAR-10 with a column `jpg` of JPEG bytes, 50,000 rows; the last 5,000 are held out. E2 and E3
also need runs/squeeze.safetensors (scripts/make_squeeze_weights.py makes it), or metrics.perceptual= to go without.

Precision: train.precision of the config, fp32; on a GPU, PyTorch computes fp32 convolutions in TF32 by default.
--parallel N trains N trials at a time. One small net leaves most of a large GPU idle, so this finishes sooner, but
s/step and tokens/s in the tables then also measure the other trials.

On a machine that you have for only a few minutes and that has no internet:
  1. Here, collect what it lacks in folders that git ignores, and copy them there with the working tree:
       mkdir -p runs
       python -c "import pyarrow.parquet as pq; t = pq.read_table('cifar10_jpg_train.parquet'); \
       pq.write_table(t, 'runs/cifar10.parquet', compression='zstd')"
       python scripts/make_squeeze_weights.py runs/squeeze.safetensors
       pip download --no-deps -d build/wheels omegaconf braceexpand
     The new Parquet file has 15 MB instead of 48 MB. The weights are for e2 and e3. The wheels are for a machine that
     lacks these two packages; Ray, faiss, s3fs, webdataset and tensorboardX are not needed.
  2. There, run this as often as needed. $OUT is the folder that comes back; --minutes 9 is for a limit of 10 minutes.
       python3 -m pip install -q --no-index --no-deps --target /tmp/site build/wheels/*.whl
       export PYTHONPATH=/tmp/site; mkdir -p /tmp/gpu; [ ! -f runs/gpu.tar.gz ] || tar xzf runs/gpu.tar.gz -C /tmp/gpu
       python3 scripts/gpu_experiments.py e1 --data runs/cifar10.parquet --out /tmp/gpu --minutes 9 --parallel 4
       tar czf $OUT/gpu.tar.gz -C /tmp/gpu .
     One file of a few MB comes back: all trials so far and their reports. Keep it here as runs/gpu.tar.gz, so that the
     next call continues from it.
  3. Here, copy the reports into the repository:
       mkdir -p results/gpu; tar xzf runs/gpu.tar.gz -C results/gpu --wildcards './e?/reports/*'
     compare.json in it has every trial's numbers and settings.

Exit codes: 0 all trials are done; 2 a mistake in the command, its configuration or the data; 3 trials are left or
failed; 130 interrupted.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

# a borrowed machine has the working tree, but tokenmill is not installed there
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.compare import Planned, plan, results_of, run_planned
from jobs.config import Config, ConfigError, checked, load_config
from jobs.reports.comparison import write_report
from jobs.reports.progress import clock
from pipeline.corpus.batches import map_in_threads
from tokenizer.errors import BadSample
from tokenizer.modalities.base import build_modality

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs/compare"
CONFIGS = {  # experiment: its config, and the file with the papers' length that overrides it
    "e1": ("e1_cifar10.yaml", "e1_paper.yaml"),
    "e2": ("e2_cifar10.yaml", "e2_paper.yaml"),
    "e3": ("e3_cifar10.yaml", "e2_paper.yaml"),
}
REPORT_EVERY_S = 15.0


class OutOfTime(Exception):
    """A trial was stopped because the time was up. It has no result and will start again from the beginning."""


@dataclass
class Experiment:
    name: str
    config: Config
    planned: list[Planned]


@dataclass
class Job:
    """One trial and where it runs.

    arrays: the folder of train.npy and heldout.npy. deadline: when to stop, on the clock of time.time().
    """

    title: str
    one: Planned
    arrays: str
    device: str
    threads: int
    deadline: float


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except ConfigError as error:
        print(f"gpu_experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_experiments: interrupted; rerun the same command to continue", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; `overrides` has the key=value arguments. Raises ConfigError."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s EXPERIMENT... --data FILE.parquet --out FOLDER [options] [key=value ...]",
    )
    parser.add_argument("what", nargs="*", metavar="EXPERIMENT", help="e1, e2, e3, and key=value as for `tokenmill`")
    parser.add_argument("--data", required=True, metavar="FILE", help="Parquet file with JPEG bytes in column jpg")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where trials and reports are written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--length", default="paper", metavar="paper|quick|STEPS", help="default: paper")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; default: no limit")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="trials at a time; default: 1")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", help="run this row; may be repeated")
    parser.add_argument("--heldout", type=int, default=5000, metavar="ROWS", help="last rows, held out; default: 5000")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [argument for argument in options.what if "=" in argument]
    options.experiments = list(dict.fromkeys(argument for argument in options.what if "=" not in argument))
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if not options.experiments or not set(options.experiments) <= set(CONFIGS):
        raise ConfigError(f"experiments are {options.experiments}; give one or more of: {', '.join(CONFIGS)}")
    if options.length not in ("paper", "quick") and not (options.length.isdigit() and int(options.length) > 0):
        raise ConfigError(f"--length is {options.length!r}; it must be paper, quick, or a number of steps above 0")
    if options.parallel < 1:
        raise ConfigError(f"--parallel is {options.parallel}; it must be 1 or more")
    if not options.minutes >= 0:
        raise ConfigError(f"--minutes is {options.minutes:g}; it must be 0 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is cuda, but torch {torch.__version__} finds no GPU; use --device cpu")


def run(options: argparse.Namespace) -> int:
    deadline = time.time() + 60 * options.minutes
    started = time.time()
    arrays, source = read_pictures(options.data, options.heldout)
    rows = len(arrays["train"])
    print(f"{rows} training and {len(arrays['heldout'])} held-out pictures read in {clock(time.time() - started)}")
    experiments = [plan_experiment(name, options, source, rows) for name in options.experiments]
    todo = [
        (f"{experiment.name} {one.label} K={one.size} seed={one.seed}", one)
        for experiment in experiments
        for one in sorted(experiment.planned, key=lambda one: one.seed)  # a full table of one seed comes first
        if not Path(one.url).exists() and (not options.only or one.label in options.only)
    ]
    print(f"{len(todo)} of {sum(len(e.planned) for e in experiments)} trials to run", flush=True)
    with saved(arrays) as folder:
        threads = max(1, torch.get_num_threads() // options.parallel)
        jobs = [Job(title, one, folder, options.device, threads, deadline) for title, one in todo]
        done = [result for experiment in experiments for result in results_of(experiment.planned)]
        took = {(result["label"], result["size"]): result["took_s"] for result in done}
        failed, left = run_jobs(jobs, options.parallel, took)
    for experiment in experiments:
        report(experiment, arrays["heldout"])
    for title, reason in failed.items():
        print(f"failed: {title}: {reason}")
    if left:
        print(f"trials left: {len(left)}; rerun the same command to continue. Next: {'; '.join(left[:4])}")
    return 3 if failed or left else 0


# -- data and plan ----------------------------------------------------------------------------------------------------


def read_pictures(path: str, heldout: int) -> tuple[dict[str, np.ndarray], str]:
    """{"train", "heldout"}, each uint8 [N, H, W, 3] in the order of the rows, and an id of the content.

    heldout: how many of the last rows. Raises ConfigError.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--data {path}: there is no such file")
    try:
        column = pq.read_table(path, columns=["jpg"])["jpg"].to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ConfigError(f"--data {path}: {str(error).splitlines()[0]}") from error
    if not 0 < heldout < len(column):
        raise ConfigError(f"--heldout is {heldout}; it must be 1 or more and below the {len(column)} rows of {path}")
    modality = build_modality("image", {})
    pictures = []
    try:
        for picture in map_in_threads(lambda data: modality.read(data, "jpg").array, column, os.cpu_count() or 1):
            pictures.append(picture)
    except BadSample as error:
        raise ConfigError(f"--data {path}, row {len(pictures)}: {error}") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise ConfigError(f"--data {path}: all pictures must have one size, 32 x 32 for CIFAR-10")
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in column)).hexdigest()
    stacked = np.stack(pictures)
    return {"train": stacked[:-heldout], "heldout": stacked[-heldout:]}, f"{digest[:16]}, last {heldout} rows held out"


def plan_experiment(name: str, options: argparse.Namespace, source: str, rows: int) -> Experiment:
    """Raises ConfigError. source: the id of the data, part of every trial's name. rows: training pictures."""
    config = load_config([*_files(name, options.length), *options.overrides])
    config.run = str(Path(options.out, name).resolve())
    file = Path(options.data).name
    config.data.shards = f"{file}, the first {rows} rows"
    config.compare.heldout = f"{file}, the last {options.heldout} rows"
    unknown = set(options.only) - set(config.compare.methods)
    if unknown:
        raise ConfigError(f"--only {sorted(unknown)[0]!r}: {name} has: {'; '.join(config.compare.methods)}")
    with checked("metrics"):
        build_modality("image", config.data.preprocess).metrics(config.metrics)
    return Experiment(name, config, plan(config, config.run, json.dumps(source)))


def _files(name: str, length: str) -> list[str]:
    """The arguments of load_config for this experiment and length."""
    base, paper = (str(CONFIG_FOLDER / file) for file in CONFIGS[name])
    if length in ("paper", "quick"):
        return [base, paper] if length == "paper" else [base]
    return [base, paper, f"train.steps={length}", f"train.warmup_steps={int(length) // 10}"]


@contextlib.contextmanager
def saved(arrays: dict[str, np.ndarray]) -> Iterator[str]:
    """A temporary folder of files that all workers map into memory, so that the pictures are in memory only once."""
    with tempfile.TemporaryDirectory() as folder:
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
        yield folder


# -- trials -----------------------------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job], parallel: int, took: dict[tuple[str, int], float]) -> tuple[dict[str, str], list[str]]:
    """Runs the trials until the deadline. Returns the failed ones (title to reason) and the titles of those left.

    took: seconds of earlier trials, by method and size; this run's are added.
    """
    waiting, failed, left = list(jobs), dict[str, str](), list[str]()
    running: dict[Future[tuple[str, float]], Job] = {}
    with _executor(parallel) as pool:
        while waiting or running:
            for job in list(waiting):
                if len(running) < parallel and _fits(job, took):
                    waiting.remove(job)
                    running[pool.submit(run_job, job)] = job
            if not running:
                break
            try:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:  # worker processes get the signal themselves; a thread would train to the end
                for job in running.values():
                    job.deadline = 0.0
                raise
            for future in done:
                job, error = running.pop(future), future.exception()
                if isinstance(error, OutOfTime):
                    left.append(job.title)
                elif isinstance(error, BrokenExecutor):  # the system killed a process, and the pool is unusable
                    failed[job.title] = "a process was killed, perhaps for lack of memory; lower --parallel"
                    left += [other.title for other in waiting]
                    waiting.clear()
                elif error is not None:
                    failed[job.title] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                else:
                    line, seconds = future.result()
                    took[job.one.label, job.one.size] = seconds
                    print(f"{job.title}: {line}  ({clock(seconds)})", flush=True)
    return failed, [*left, *(job.title for job in waiting)]


def _executor(parallel: int) -> Executor:
    if parallel == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn"))  # CUDA does not survive a fork


def _fits(job: Job, took: dict[tuple[str, int], float]) -> bool:
    """Whether there is time for a trial as long as the last one of its method and size, or as a typical trial."""
    typical = statistics.median(took.values()) if took else 0.0
    return time.time() + took.get((job.one.label, job.one.size), typical) < job.deadline


def run_job(job: Job) -> tuple[str, float]:
    """Runs the trial in this process and writes its result. Returns a line for the log, and the seconds it took."""
    started = reported = time.time()

    def tell(row: dict[str, float]) -> None:
        nonlocal reported
        if time.time() > job.deadline:
            raise OutOfTime
        if time.time() - reported > REPORT_EVERY_S:
            reported = time.time()
            steps = job.one.trial.recipe.steps
            print(f"  {job.title}: step {row['step']} of {steps}, loss {row['loss']:.4g}", flush=True)

    torch.set_num_threads(job.threads)
    torch.backends.cudnn.benchmark = True  # every batch has one shape, so the search for the fastest kernel pays
    arrays = {name: np.load(f"{job.arrays}/{name}.npy", mmap_mode="r") for name in ("train", "heldout")}
    side = job.one.trial.recipe.segment
    resident = arrays["train"].shape[1:] == (side, side, 3)
    line = run_planned(job.one, arrays, job.device, cpus=job.threads, report=tell, resident=resident)
    return line, time.time() - started


def report(experiment: Experiment, heldout: np.ndarray) -> None:
    """Tables and plots of the trials that have finished, under OUT/<experiment>/reports."""
    modality = build_modality("image", experiment.config.data.preprocess)
    originals = [modality.view(picture) for picture in heldout[: experiment.config.compare.num_examples]]
    print(f"\n{experiment.name}")
    write_report(experiment.config.run, results_of(experiment.planned), originals, experiment.config)


if __name__ == "__main__":
    sys.exit(main())
