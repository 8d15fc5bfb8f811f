"""Ray Train: shards to a trained autoencoder: `run`, `data.shards`, `model`, `quantizer`, `train`, `workers`.

Writes RUN/config.yaml, RUN/checkpoints, RUN/model and RUN/reports (train.html, train.jsonl, tensorboard/). The same
command after a crash goes on from the last checkpoint. SIGTERM (which `ray job stop` sends) saves one first; exit 3.
"""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from jobs.actors import cluster
from jobs.config import Config, ConfigError, TrainConfig, with_new_names
from jobs.reports.progress import LOG_EVERY_S, clock
from jobs.training.channel import open_mailbox
from jobs.training.checks import check, loss_weights
from jobs.training.loop import LANES_FILE, train_worker
from pipeline import storage
from pipeline.corpus.shards import find_shards
from pipeline.corpus.streams import Lanes
from tokenizer.modalities.base import MODALITIES
from tokenizer.nets.base.net import NETS
from tokenizer.quantizers.base.quantizer import QUANTIZERS

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
    _claim(url, config)
    _check_lanes(url, config)
    if storage.exists(storage.join(url, "model", "model.safetensors")):
        print(f"train: {url}/model is there already; choose another `run` to train anew")
        return 0
    config.train.losses = _absolute(config.train.losses)
    _remove_orphans(url)
    cluster.start()
    stopped = _fit(url, {"config": config, "shards": shards}, config)
    if stopped is not None:
        print(f"train: stopped: {stopped}")
        return 3
    print(f"train: done, {_line(_last_row(url), config.train.steps)}")
    print(f"train: model at {url}/model, curves and pictures at {url}/reports/train.html")
    return 0


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Files by their whole path: Ray Train's workers run in another folder than the driver."""
    return {
        key: str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value
        for key, value in settings.items()
    }


def _claim(url: str, config: Config) -> None:
    """Writes RUN/config.yaml, or checks that it says what we are asked to train."""
    mine = {"data": asdict(config.data), "model": asdict(config.model), "quantizer": config.quantizer}
    mine["train"] = asdict(config.train) | {"loss_weights": loss_weights(config)}
    text = OmegaConf.to_yaml(OmegaConf.create(mine))
    place = storage.join(url, "config.yaml")
    try:
        storage.write_once(place, text.encode())
        return
    except FileExistsError:
        there = OmegaConf.to_container(OmegaConf.create(storage.read(place).decode()))
    assert isinstance(there, dict)
    there = with_new_names(there)[0]
    defaults = _flat(_defaults_of(there))  # for keys that did not exist yet when the run began
    before, now = {**defaults, **_flat(there)}, _flat(OmegaConf.to_container(OmegaConf.create(text)))
    unknown = [key for key in now if key.startswith("train.loss_weights.") and key not in before]
    if unknown:
        weights = ", ".join(f"{key} {now[key]:.4g}" for key in unknown)
        print(f"train: {url} was begun by an earlier version, which did not note its default loss weights;")
        print(f"train: it continues with {weights}; set them to keep the former ones")
        before |= {key: now[key] for key in unknown}
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    differing = [key for key in differing if key.rsplit(".", 1)[-1] not in MAY_CHANGE]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{url} trains with {key}={before.get(key)}, not {now.get(key)}; choose another `run`, or leave it at that"
        )


def _defaults_of(there: dict[Any, Any]) -> dict[str, Any]:
    """Default values of the run's net, quantizer and modality, and of `train`."""
    net, quantizer = NETS.get(there["model"]["net"]["name"]), QUANTIZERS.get(there["quantizer"]["name"])
    modality = MODALITIES.get(there["model"]["modality"])
    return {
        "data": {"preprocess": asdict(modality.Config())},
        "model": {"net": asdict(net.Config())},
        "quantizer": asdict(quantizer.Config()),
        "train": asdict(TrainConfig()),
    }


def _check_lanes(url: str, config: Config) -> None:
    """Raises ConfigError if there are more workers than lanes, which a run keeps from its first step on."""
    for found in storage.glob(storage.join(url, "checkpoints", "*", LANES_FILE))[-1:]:
        try:
            Lanes(**json.loads(storage.read(found.url))).check_enough_for(config.workers.count or 1)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _remove_orphans(url: str) -> None:
    """Checkpoints that Ray Train had taken no note of when it was killed: no run goes on from them, or removes them."""
    place = storage.join(url, "checkpoints")
    folders = [folder for folder in storage.list_folders(place) if _name(folder).startswith("checkpoint_")]
    try:
        noted = storage.read(storage.join(place, "checkpoint_manager_snapshot.json")).decode()
    except FileNotFoundError:
        return
    orphans = [folder for folder in folders if _name(folder) not in noted]
    if len(orphans) == len(folders):  # another Ray may take notes elsewhere
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


def _fit(url: str, settings: dict[str, Any], config: Config) -> str | None:
    """Returns why training ended before its last step, None if it did not."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    mailbox = open_mailbox()
    workers, ranks = config.workers, config.workers.count or 1
    resources = {"CPU": cluster.cpus_per_rank(workers)} | ({"GPU": workers.gpus} if workers.gpus else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={**settings, "run": url, "mailbox": mailbox},
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=bool(workers.gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name="checkpoints",
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            **_storage(url),
        ),
    )
    with Listener(mailbox, config.train.steps) as listener, _stopping_at_sigterm(mailbox):
        trainer.fit()
    return listener.stopped


@contextlib.contextmanager
def _stopping_at_sigterm(mailbox: Any) -> Iterator[None]:
    """Inside, SIGTERM asks the ranks to save a checkpoint and end; a second one has the effect that the first had."""

    def ask(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        print("train: SIGTERM: saves a checkpoint after this step, then stops", flush=True)
        mailbox.ask_to_stop.remote()

    if threading.current_thread() is not threading.main_thread():  # which alone may set what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _storage(url: str) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints: as a path, and for all but local ones the file system to use."""
    fs, path = storage.locate(url)
    if storage.is_local(fs):
        return {"storage_path": path}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


class Listener:
    """Prints what rank 0 tells, in a thread of its own. stopped: why training ended early, None if it did not."""

    def __init__(self, mailbox: Any, steps: int):
        self.mailbox, self.steps = mailbox, steps
        self.stopped: str | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._live = sys.stdout.isatty()
        self._printed = 0.0

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.mailbox.tell.remote(None)
        self._thread.join(timeout=10)

    def _listen(self) -> None:
        import ray

        while (news := ray.get(self.mailbox.hear.remote())) is not None:
            if "stopped" in news:
                self.stopped = news["stopped"]
            elif "said" in news:
                print(f"\ntrain: {news['said']}" if self._live else f"train: {news['said']}", flush=True)
            else:
                self._print(news)
        if self._live:
            print()

    def _print(self, row: dict[str, Any]) -> None:
        """One live line on a terminal, a line now and then in a log file."""
        line = f"train: {_line(row, self.steps)}"
        if self._live:
            print(f"\r\033[K{line}", end="", flush=True)
        elif time.monotonic() - self._printed > LOG_EVERY_S:
            self._printed = time.monotonic()
            print(line, flush=True)


def _line(row: dict[str, Any], steps: int) -> str:
    left = (steps - row["step"]) * row["seconds_per_step"]
    told = "  ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
    bad = f"  {row['bad_samples']} bad samples" if row["bad_samples"] else ""
    return f"step {row['step']}/{steps}  {told}  {row['samples_per_s']:.0f} samples/s{bad}  {clock(left)} left"


def _last_row(url: str) -> dict[str, Any]:
    return json.loads(storage.read(storage.join(url, "reports", "train.jsonl")).splitlines()[-1])
