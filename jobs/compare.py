"""Compares methods and sizes under one recipe: `run`, `data.shards`, `model`, `train`, `metrics`, `compare`.

Trials run as Ray tasks, as many at a time as fit on the cluster. RUN/trials holds a file for each finished trial, so
rerun the same command after an interruption; it runs only the missing trials. RUN/reports/compare.md, .json, .csv and
.png hold a table with mean and standard deviation over the seeds, plots of quality and usage against K, and
reconstructions of the same images by every method.
"""

import base64
import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.actors import cluster
from jobs.config import Config, ConfigError, checked, with_method
from jobs.reports.comparison import write_report
from jobs.reports.progress import Progress
from jobs.shards import DecodedSample, decode_sample
from jobs.training.checks import check
from pipeline import storage
from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import ShardList, find_shards
from pipeline.errors import ShardError
from tokenizer.errors import BadSample
from tokenizer.modalities.base import Modality, build_modality
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.training.trial import Trial


@dataclass
class Planned:
    """A trial and the URL of its result. The name holds method, size, seed, and a hash of all other settings."""

    label: str
    size: int
    seed: int
    trial: Trial
    url: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1].removesuffix(".json")


def run(config: Config) -> int:
    config.require("run", "data.shards", "compare.heldout", "compare.methods", "compare.sizes", "compare.seeds")
    url = storage.normalise(config.run)
    train, heldout = find_shards(config.data.shards), find_shards(config.compare.heldout)
    others = {name: find_shards(shards) for name, shards in config.compare.others.items()}
    corpora = {"train": train, "heldout": heldout, **{f"others.{name}": shards for name, shards in others.items()}}
    planned = plan(config, url, json.dumps({name: manifest.id for name, manifest in corpora.items()}))
    modality = build_modality(config.model.modality, config.data.preprocess)
    with checked("metrics"):
        modality.metrics(config.metrics)
    todo = [one for one in planned if not storage.exists(one.url)]
    print(f"compare: {len(planned)} trials, {len(planned) - len(todo)} of them done before", flush=True)
    failed: dict[str, str] = {}
    if todo:
        arrays = {name: _load(manifest, modality, config) for name, manifest in corpora.items()}
        failed = _run_trials(todo, arrays, config)
    originals = _load(heldout, modality, config, config.compare.num_examples) if config.compare.num_examples else []
    write_report(url, results_of(planned), [modality.view(array) for array in originals], config)
    for name, reason in failed.items():
        print(f"compare: failed trial {name}: {reason}")
    return 3 if failed else 0


def plan(config: Config, url: str, corpus: str) -> list[Planned]:
    """A trial for every method, size and seed. corpus: identifies the samples. Raises ConfigError naming the method."""
    planned = []
    for label, method in config.compare.methods.items():
        for size in config.compare.sizes:
            for seed in config.compare.seeds:
                try:
                    own = _configure(config, method, size, seed)
                    check(own)
                except ConfigError as error:
                    raise ConfigError(f"compare.methods.{label} at {size} codes: {error}") from error
                planned.append(_plan_one(own, label, size, seed, url, corpus))
    return planned


def _configure(config: Config, method: Any, size: int, seed: int) -> Config:
    """The configuration with which `train` would train this method, size and seed."""
    method = {"file": method} if isinstance(method, str) else dict(method or {})
    unknown = set(method) - {"file", "quantizer", "train"}
    if unknown:
        raise ConfigError(f"unknown key {sorted(unknown)[0]}; choose from: file, quantizer, train")
    own = {"train": {**(method.get("train") or {}), "seed": seed}, "quantizer": method.get("quantizer") or {}}
    first = with_method(config, method.get("file", ""), own)
    known = {field.name for field in dataclasses.fields(QUANTIZERS.get(first.quantizer["name"]).Config)}
    wanted = {"codebook_size": size} | ({"dim": config.compare.dims[size]} if size in config.compare.dims else {})
    given = {"name": first.quantizer["name"], **{key: wanted[key] for key in wanted if key in known}}
    return with_method(config, method.get("file", ""), {**own, "quantizer": {**given, **own["quantizer"]}})


def _plan_one(config: Config, label: str, size: int, seed: int, url: str, corpus: str) -> Planned:
    options = config.compare
    trial = Trial(
        model={**dataclasses.asdict(config.model), "quantizer": config.quantizer},
        recipe=config.train.recipe(),
        preprocess=config.data.preprocess,
        metrics=config.metrics,
        max_latents=options.max_latents,
        eval_batch_size=options.eval_batch_size,
        num_examples=options.num_examples,
    )
    identity = json.dumps([dataclasses.asdict(trial), corpus, options.max_samples], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    slug = "".join(c if c.isalnum() else "-" for c in label.lower())
    return Planned(label, size, seed, trial, storage.join(url, "trials", f"{slug}-K{size}-seed{seed}-{digest}.json"))


# -- data -----------------------------------------------------------------------------------------------------------


def _load(manifest: ShardList, modality: Modality, config: Config, limit: int = 0) -> Any:
    """The samples in the order of the shards: one array [N, ...] if they have one shape, else a list of arrays."""
    limit = min(limit or config.compare.max_samples, config.compare.max_samples)
    arrays: list[np.ndarray] = []
    num_skipped = 0
    for shard in manifest.shards:
        try:
            for outcome in map_in_threads(lambda sample: decode_sample(sample, modality), read_samples(shard.url), 2):
                if not isinstance(outcome, DecodedSample):
                    num_skipped += 1
                elif len(arrays) < limit:
                    arrays.append(outcome.decoded.array)
                if len(arrays) == limit:
                    break
        except ShardError as error:
            print(f"compare: skipped the rest of a shard: {error}")
        if len(arrays) == limit:
            break
    if not arrays:
        raise ConfigError("the corpus gave no samples: every shard failed or is empty; see the messages above")
    if num_skipped:
        print(f"compare: skipped {num_skipped} samples that cannot be decoded")
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays


# -- trials ---------------------------------------------------------------------------------------------------------


def _run_trials(todo: list[Planned], arrays: dict[str, Any], config: Config) -> dict[str, str]:
    """Runs the trials. Returns the errors by trial. Each task writes its own result, so a lost driver loses none."""
    import ray

    from jobs.training.channel import open_channel

    cluster.start()
    cluster.check_room(config.workers)
    channel = open_channel()
    shared = {name: ray.put(corpus) for name, corpus in arrays.items()}
    cpus, gpus = config.workers.cpus or 1, config.workers.gpus
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_trial_task)
    tasks = {task.remote(one, shared, cpus, gpus, channel): one for one in todo}
    failed: dict[str, str] = {}
    running: dict[str, str] = {}  # name of a trial -> how far it is
    progress = Progress("compare", len(todo), "trials")
    while tasks:
        done, _ = ray.wait(list(tasks), num_returns=1, timeout=1.0)
        for row in ray.get(channel.receive_all.remote()):
            running[row["name"]] = f"{row['name']} {row['step']}/{row['steps']} loss {row['loss']:.4g}"
        for reference in done:
            one = tasks.pop(reference)
            try:
                line = ray.get(reference)
            except ray.exceptions.RayError as error:
                failed[one.name] = str(error).strip().splitlines()[-1]
                line = f"failed: {failed[one.name]}"
            running.pop(one.name, None)
            progress.done += 1
            progress.say(f"{progress.done}/{len(todo)} {one.label} K={one.size} seed={one.seed}  {line}")
        waiting = "waiting for CPUs or GPUs (workers.cpus, workers.gpus)" if tasks else ""
        progress.show("; ".join(running.values()) or waiting)
    progress.close()
    return failed


def _trial_task(one: Planned, shared: dict[str, Any], cpus: float, gpu: float, channel: Any) -> str:
    """Runs one trial in a Ray worker, writes its result, and returns a line about it."""
    import ray
    import torch

    torch.set_num_threads(max(1, int(cpus)))  # Ray would leave one thread per process

    def report(row: dict[str, float]) -> None:
        # without ray.get: while a task waits, Ray gives its CPU to another one
        channel.send.remote({"name": one.name, "steps": one.trial.recipe.steps, **row})

    arrays = dict(zip(shared, ray.get(list(shared.values())), strict=True))  # in shared memory, not copied
    return run_planned(one, arrays, cluster.device_for(gpu), cpus=cpus, report=report)


def run_planned(
    one: Planned,
    arrays: dict[str, Any],
    device: str,
    *,
    cpus: float,
    report: Callable[[dict[str, float]], None],
    resident: bool = False,
) -> str:
    """Runs one trial, writes its result, and returns a line about it. Needs no Ray.

    arrays: train, heldout, and others.<name>. resident: see `run_trial`.
    """
    from tokenizer.training.trial import run_trial

    others = {name.removeprefix("others."): corpus for name, corpus in arrays.items() if name.startswith("others.")}
    started = time.time()
    result: dict[str, Any] = {"label": one.label, "size": one.size, "seed": one.seed}
    result |= {"settings": dataclasses.asdict(one.trial), "machine": _machine(device, cpus)}
    try:
        train, heldout = arrays["train"], arrays["heldout"]
        outcome = run_trial(one.trial, train, heldout, others=others, device=device, report=report, resident=resident)
        examples = [base64.b64encode(png).decode() for png in outcome.examples]
        result |= {
            "numbers": outcome.numbers,
            "others": outcome.others,
            "history": outcome.history,
            "examples": examples,
        }
        line = "  ".join(f"{name} {outcome.numbers[name]:.4g}" for name in (*outcome.numbers["quality"], "cvu"))
    except (FloatingPointError, BadSample) as error:  # a method that diverges under the common recipe is a result
        result |= {"diverged": str(error)}
        line = f"diverged: {error}"
    result |= {"finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "took_s": time.time() - started}
    try:
        storage.write_once(one.url, (json.dumps(result) + "\n").encode())
    except FileExistsError:  # an earlier driver, thought to be lost, was still running it
        return "already exists"
    return line


def _machine(device: str, cpus: float) -> str:
    import torch

    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {cpus:g} of {os.cpu_count()}"
    )
    return f"{name}, torch {torch.__version__}"


def results_of(planned: list[Planned]) -> list[dict[str, Any]]:
    """The results that exist, in the order of the plan."""
    existing = [(one, json.loads(storage.read(one.url))) for one in planned if storage.exists(one.url)]
    return [{**result, "label": one.label} for one, result in existing]
