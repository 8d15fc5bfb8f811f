"""Trains an autoencoder on shards with Ray Train: `run`, `data.shards`, `model`, `quantizer`, `train`, `workers`.

Writes RUN/config.yaml, RUN/checkpoints, RUN/model and RUN/reports (train.html, train.jsonl, tensorboard/). Rerun the
same command after a crash: it resumes from the last checkpoint. Ctrl-C and SIGTERM, which `ray job stop` sends, save a
checkpoint first (exit codes 130 and 143). Raise train.steps to train a finished run for longer: it continues from its
last checkpoint with the learning rate of the longer schedule.
"""

import collections
import concurrent.futures
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from jobs.actors import cluster
from jobs.artifacts import with_rules_of_run
from jobs.config import Config, ConfigError, StorageConfig, TrainConfig, WorkersConfig, with_new_names
from jobs.config.written import with_written
from jobs.reports.progress import Progress
from jobs.reports.training import SKIPPED
from jobs.training.channel import open_channel
from jobs.training.checkpoint import LANES_FILE
from jobs.training.checks import check, loss_weights
from jobs.training.loop import train_worker
from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.corpus.streams import Lanes
from tokenizer.modalities.base import MODALITIES
from tokenizer.nets.base.net import NETS
from tokenizer.quantizers.base.quantizer import QUANTIZERS

SAY_EVERY_S = 30.0  # while no rank has started
MAY_CHANGE = (
    *("workers", "decode_threads", "log_every", "reconstruct_every", "num_examples", "profile"),
    *("checkpoint_every", "keep_checkpoints", "max_failures"),
    *("perplexity", "patience", "stop"),  # of train.collapse
)
SHOWN = (
    *("loss", "psnr", "perplexity", "soft_perplexity"),
    *("accepted", "energy_ratio", "queue_filled", "posterior_std", "revived"),
)


def run(config: Config) -> int:
    config.require("run", "data.shards")
    url = storage.normalise(config.run)
    check(config)
    shards = find_shards(config.data.shards).shards
    config, claim = _claim(url, config)
    _check_lanes(url, config)
    if storage.exists(_model_file(url)) and claim is None:
        print(f"train: {url}/model already exists; raise train.steps to train it for longer, or choose another `run`")
        return 0
    config.train.losses = _absolute(config.train.losses)
    cluster.start()
    cluster.check_room(config.workers, ranks=config.workers.count or 1)
    if claim:
        claim()  # only now: a command that cannot start changes nothing of the run
    _remove_orphans(url)
    stopped, received = _fit(url, shards, config)
    if stopped is not None:
        print(f"train: stopped: {stopped}")
        return 128 + received if received else 3
    last = json.loads(storage.read(storage.join(url, "reports", "train.jsonl")).splitlines()[-1])
    print(f"train: done, step {last['step']}/{config.train.steps}  {_described(last)}")
    _print_skipped(storage.join(url, "reports", SKIPPED))
    print(f"train: model at {url}/model, curves and pictures at {url}/reports/train.html")
    return 0


def _print_skipped(place: str) -> None:
    """Says how many samples were skipped, if any, and why."""
    listed = storage.read_if_exists(place)
    if listed is None:
        return
    reasons = collections.Counter(json.loads(line)["reason"] for line in listed.splitlines())
    commonest = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    print(f"train: skipped {reasons.total()} samples that cannot be decoded ({commonest}); they are listed in {place}")


def _model_file(url: str) -> str:
    return storage.join(url, "model", "model.safetensors")


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths of files: Ray Train's workers run in another folder than the driver."""
    return {
        key: str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value
        for key, value in settings.items()
    }


def _claim(url: str, config: Config) -> tuple[Config, Callable[[], None] | None]:
    """Writes RUN/config.yaml, or checks that it agrees with this configuration. Raises ConfigError if not.

    Returns the configuration to train with, and a function that changes an existing run, if it must be changed. A run
    of an earlier version keeps its way to read samples. A run that has no checkpoint yet, and so no step to keep, takes
    the new configuration. For more steps, the model of a finished run is withdrawn.
    """
    config = with_rules_of_run(config, url, "train")
    given = {"data": asdict(config.data), "model": asdict(config.model), "quantizer": config.quantizer}
    given["train"] = asdict(config.train) | {"loss_weights": loss_weights(config)}
    text = OmegaConf.to_yaml(OmegaConf.create(with_written(given, config.written)))
    place = storage.join(url, "config.yaml")
    try:
        storage.write_once(place, text.encode())
        return config, None
    except FileExistsError:
        before, now = _compared(url, storage.read(place), text)
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    differing = [key for key in differing if key.rsplit(".", 1)[-1] not in MAY_CHANGE]
    if not differing:
        return config, None
    raised = differing == ["train.steps"] and now["train.steps"] > before["train.steps"]
    if not (storage.exists(_model_file(url)) or storage.glob(storage.join(url, "checkpoints", "*", LANES_FILE))):
        said = f"{url} has made no checkpoint yet; it now trains with the new {', '.join(differing)}"
    elif raised:
        _check_extension(url, before["train.steps"], now["train.steps"])
        said = (
            f"{url} now trains to step {now['train.steps']} instead of {before['train.steps']}, with the learning rate "
        )
        said += "of the longer schedule"
    else:
        key = differing[0]
        raise ConfigError(
            f"{url} trains with {key}={before.get(key)}, not {now.get(key)}; choose another `run`, or restore the value"
        )

    def replace_settings() -> None:
        if storage.exists(_model_file(url)):
            storage.remove(_model_file(url))  # first: a kill from here on leaves a run that is not finished
        print(f"train: {said}")
        storage.replace(place, text.encode())

    return config, replace_settings


def _compared(url: str, stored_text: bytes, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stored settings and the given ones, by dotted key."""
    stored = OmegaConf.to_container(OmegaConf.create(stored_text.decode()))
    assert isinstance(stored, dict)
    stored = with_new_names(stored)[0]
    defaults = _flat(_defaults_of(stored))  # for keys that were added after the run began
    before, now = {**defaults, **_flat(stored)}, _flat(OmegaConf.to_container(OmegaConf.create(text)))
    unknown = [key for key in now if key.startswith("train.loss_weights.") and key not in before]
    if unknown:
        weights = ", ".join(f"{key} {now[key]:.4g}" for key in unknown)
        print(f"train: {url} was started by an earlier version, which did not record its default loss weights;")
        print(f"train: it continues with {weights}; set these keys to keep the earlier weights")
        before |= {key: now[key] for key in unknown}
    return before, now


def _check_extension(url: str, before: int, now: int) -> None:
    """Raises ConfigError if tokenizers or latents were made with the model: they would no longer belong to the run."""
    made = [folder for name in ("tokenizers", "latents") if (folder := storage.join(url, name)) and _has_files(folder)]
    if made:
        raise ConfigError(
            f"train.steps can be raised from {before} to {now} only before anything is made with the model; "
            f"delete {' and '.join(made)} first, or choose another `run`"
        )


def _has_files(folder: str) -> bool:
    return bool(storage.list_folders(folder) or storage.list_files(folder))


def _defaults_of(stored: dict[Any, Any]) -> dict[str, Any]:
    """The defaults of the stored configuration's net, quantizer and modality, and of `train`."""
    net, quantizer = NETS.get(stored["model"]["net"]["name"]), QUANTIZERS.get(stored["quantizer"]["name"])
    modality = MODALITIES.get(stored["model"]["modality"])
    return {
        "data": {"preprocess": asdict(modality.Config()) | modality.unstated, "member": ""},
        "model": {"net": asdict(net.Config())},
        "quantizer": asdict(quantizer.Config()),
        "train": asdict(TrainConfig()),
    }


def _check_lanes(url: str, config: Config) -> None:
    """Raises ConfigError if there are more workers than lanes. The number of lanes of a run is fixed."""
    for found in storage.glob(storage.join(url, "checkpoints", "*", LANES_FILE))[-1:]:
        try:
            Lanes(**json.loads(storage.read(found.url))).check_enough_for(config.workers.count or 1)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _remove_orphans(url: str) -> None:
    """Deletes checkpoints that Ray Train had not recorded when it was killed. It would neither use nor delete them."""
    place = storage.join(url, "checkpoints")
    folders = [folder for folder in storage.list_folders(place) if _name(folder).startswith("checkpoint_")]
    try:
        recorded = storage.read(storage.join(place, "checkpoint_manager_snapshot.json")).decode()
    except FileNotFoundError:
        return
    orphans = [folder for folder in folders if _name(folder) not in recorded]
    if len(orphans) == len(folders):  # another version of Ray may keep its records elsewhere
        return
    for folder in orphans:
        fs, path = storage.locate(folder)
        fs.rm(path, recursive=True)


def _name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name in value for key, leaf in _flat(value[name], f"{prefix}.{name}".lstrip(".")).items()}


def _fit(url: str, shards: list[Shard], config: Config) -> tuple[str | None, int]:
    """Trains. Returns why training stopped before its last step, or None, and the signal that stopped it, or 0."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.training.loopback import LoopbackTorchConfig

    channel = open_channel()
    workers, ranks = config.workers, config.workers.count or 1
    resources = {"CPU": cluster.cpus_per_rank(workers)} | ({"GPU": workers.gpus} if workers.gpus else {})
    # Ray writes these settings to files and shows them on its pages
    public = config.with_changes(storage=StorageConfig())
    settings = {"config": public, "shards": shards, "run": url, "channel": channel}
    torch_config = LoopbackTorchConfig() if cluster.is_local() else TorchConfig()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=torch_config,
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=bool(workers.gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name="checkpoints",
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            **_storage(url),
        ),
    )
    with Listener(channel, config.train.steps) as listener, _stopping_at_signals(channel) as received:
        _wait(_in_thread(trainer.fit), listener, workers)
    return listener.stopped, received[0] if received else 0


def _in_thread(function: Callable[[], Any]) -> "concurrent.futures.Future[Any]":
    """Calls the function in a daemon thread: in the main thread, Ray Train would handle ctrl-C itself and save
    nothing."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again in the main thread
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _wait(training: "concurrent.futures.Future[Any]", listener: "Listener", workers: WorkersConfig) -> None:
    """Waits for the end of training. Until a rank has started, prints what it waits for. Raises NoRoom."""
    start = time.monotonic()
    while not concurrent.futures.wait([training], timeout=min(SAY_EVERY_S, workers.wait_s)).done:
        waited = time.monotonic() - start
        if not listener.started and waited >= workers.wait_s:
            raise cluster.gave_up(workers)
        if not listener.started:
            listener.progress.say(cluster.waiting_line("train", workers, waited).removeprefix("train: "))
    training.result()


@contextlib.contextmanager
def _stopping_at_signals(channel: Any) -> Iterator[list[int]]:
    """Inside, the first ctrl-C or SIGTERM asks the ranks to save a checkpoint and stop; a second one acts as it did
    before. Yields a list to which the signal is added."""
    received: list[int] = []

    def request_stop(signum: int, frame: Any) -> None:
        received.append(signum)
        for one, handler in before.items():
            signal.signal(one, handler)
        name = "ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        print(f"train: {name}: saving a checkpoint after this step, then stopping; repeat it to stop now", flush=True)
        channel.request_stop.remote()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield received
        return
    before = {one: signal.signal(one, request_stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _storage(url: str) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints: a path, and the file system if it is not local."""
    fs, path = storage.locate(url)
    if storage.is_local(fs):
        return {"storage_path": path}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


class Listener:
    """Shows the messages of the ranks, in a thread of its own.

    started: whether rank 0 has started. stopped: why training stopped early, or None.
    """

    def __init__(self, channel: Any, steps: int):
        self.channel, self.progress = channel, Progress("train", steps, "steps")
        self.started = False
        self.stopped: str | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.send.remote(None)
        self._thread.join(timeout=10)

    def _listen(self) -> None:
        import ray

        while (message := ray.get(self.channel.receive.remote())) is not None:
            self.started = True
            if "stopped" in message:
                self.stopped = message["stopped"]
            elif "message" in message:
                self.progress.say(message["message"])
            elif "row" in message:
                row = message["row"]
                self.progress.done = row["step"]
                left_s = (self.progress.total - row["step"]) * row["seconds_per_step"]
                self.progress.show(_described(row), left_s)
        self.progress.close()


def _described(row: dict[str, Any]) -> str:
    numbers = "  ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
    skipped = f"  {row['bad_samples']} skipped" if row["bad_samples"] else ""
    return f"{numbers}  {row['samples_per_s']:.0f} samples/s{skipped}"
