"""Trains an autoencoder on shards with Ray Train: `run`, `data.shards`, `model`, `quantizer`, `train`, `workers`.

Writes RUN/config.yaml, RUN/checkpoints, RUN/model and RUN/reports (train.html, train.jsonl, tensorboard/). Rerun the
same command after a crash: it resumes from the last checkpoint. On SIGTERM, which `ray job stop` sends, training saves
a checkpoint and stops with exit code 3.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from jobs.actors import cluster
from jobs.config import Config, ConfigError, TrainConfig, with_new_names
from jobs.reports.progress import Progress
from jobs.training.channel import open_channel
from jobs.training.checkpoint import LANES_FILE
from jobs.training.checks import check, loss_weights
from jobs.training.loop import train_worker
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
        print(f"train: {url}/model already exists; choose another `run` to train again")
        return 0
    config.train.losses = _absolute(config.train.losses)
    _remove_orphans(url)
    cluster.start()
    stopped = _fit(url, {"config": config, "shards": shards}, config)
    if stopped is not None:
        print(f"train: stopped: {stopped}")
        return 3
    last = json.loads(storage.read(storage.join(url, "reports", "train.jsonl")).splitlines()[-1])
    print(f"train: done, step {last['step']}/{config.train.steps}  {_described(last)}")
    print(f"train: model at {url}/model, curves and pictures at {url}/reports/train.html")
    return 0


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths of files: Ray Train's workers run in another folder than the driver."""
    return {
        key: str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value
        for key, value in settings.items()
    }


def _claim(url: str, config: Config) -> None:
    """Writes RUN/config.yaml, or checks that it agrees with this configuration. Raises ConfigError if not."""
    given = {"data": asdict(config.data), "model": asdict(config.model), "quantizer": config.quantizer}
    given["train"] = asdict(config.train) | {"loss_weights": loss_weights(config)}
    text = OmegaConf.to_yaml(OmegaConf.create(given))
    place = storage.join(url, "config.yaml")
    try:
        storage.write_once(place, text.encode())
        return
    except FileExistsError:
        stored = OmegaConf.to_container(OmegaConf.create(storage.read(place).decode()))
    assert isinstance(stored, dict)
    stored = with_new_names(stored)[0]
    defaults = _flat(_defaults_of(stored))  # for keys that were added after the run began
    before, now = {**defaults, **_flat(stored)}, _flat(OmegaConf.to_container(OmegaConf.create(text)))
    now |= _keep_preprocessing(url, config, stored["data"].get("preprocess", {}))
    unknown = [key for key in now if key.startswith("train.loss_weights.") and key not in before]
    if unknown:
        weights = ", ".join(f"{key} {now[key]:.4g}" for key in unknown)
        print(f"train: {url} was started by an earlier version, which did not record its default loss weights;")
        print(f"train: it continues with {weights}; set these keys to keep the earlier weights")
        before |= {key: now[key] for key in unknown}
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    differing = [key for key in differing if key.rsplit(".", 1)[-1] not in MAY_CHANGE]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{url} trains with {key}={before.get(key)}, not {now.get(key)}; choose another `run`, or restore the value"
        )


def _keep_preprocessing(url: str, config: Config, stored: dict[str, Any]) -> dict[str, Any]:
    """Continues a run of an earlier version with that version's preprocessing. Returns the keys that this changes."""
    unstated = MODALITIES.get(config.model.modality).unstated
    kept = {name: value for name, value in unstated.items() if name not in stored}
    differing = {name: value for name, value in kept.items() if config.data.preprocess.get(name) != value}
    if differing:
        values = ", ".join(f"data.preprocess.{name}={value}" for name, value in differing.items())
        print(f"train: {url} was started by an earlier version; it continues with {values}")
    config.data.preprocess |= kept
    return {f"data.preprocess.{name}": value for name, value in kept.items()}


def _defaults_of(stored: dict[Any, Any]) -> dict[str, Any]:
    """The defaults of the stored configuration's net, quantizer and modality, and of `train`."""
    net, quantizer = NETS.get(stored["model"]["net"]["name"]), QUANTIZERS.get(stored["quantizer"]["name"])
    modality = MODALITIES.get(stored["model"]["modality"])
    return {
        "data": {"preprocess": asdict(modality.Config()) | modality.unstated},
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


def _fit(url: str, settings: dict[str, Any], config: Config) -> str | None:
    """Trains. Returns why training stopped before its last step, or None."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    channel = open_channel()
    workers, ranks = config.workers, config.workers.count or 1
    resources = {"CPU": cluster.cpus_per_rank(workers)} | ({"GPU": workers.gpus} if workers.gpus else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={**settings, "run": url, "channel": channel},
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=bool(workers.gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name="checkpoints",
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            **_storage(url),
        ),
    )
    with Listener(channel, config.train.steps) as listener, _stopping_at_sigterm(channel):
        trainer.fit()
    return listener.stopped


@contextlib.contextmanager
def _stopping_at_sigterm(channel: Any) -> Iterator[None]:
    """Inside, the first SIGTERM asks the ranks to save a checkpoint and stop; a second one acts as it did before."""

    def request_stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        print("train: SIGTERM: saving a checkpoint after this step, then stopping", flush=True)
        channel.request_stop.remote()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _storage(url: str) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints: a path, and the file system if it is not local."""
    fs, path = storage.locate(url)
    if storage.is_local(fs):
        return {"storage_path": path}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


class Listener:
    """Shows the messages of rank 0, in a thread of its own. stopped: why training stopped early, or None."""

    def __init__(self, channel: Any, steps: int):
        self.channel, self.progress = channel, Progress("train", steps, "steps")
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
            if "stopped" in message:
                self.stopped = message["stopped"]
            elif "message" in message:
                self.progress.say(message["message"])
            else:
                row = message["row"]
                self.progress.done = row["step"]
                left_s = (self.progress.total - row["step"]) * row["seconds_per_step"]
                self.progress.show(_described(row), left_s)
        self.progress.close()


def _described(row: dict[str, Any]) -> str:
    numbers = "  ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
    skipped = f"  {row['bad_samples']} skipped" if row["bad_samples"] else ""
    return f"{numbers}  {row['samples_per_s']:.0f} samples/s{skipped}"
