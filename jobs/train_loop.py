"""What one training rank does: build, step, log, save. Runs inside Ray Train, once per worker."""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from jobs.config import Config
from jobs.reading import Item, decode_sample
from jobs.report import curves_png
from pipeline import storage
from pipeline.batches import map_in_threads, prefetch
from pipeline.errors import ShardError
from pipeline.manifest import Shard
from pipeline.stream import Drawn, Lanes, Position, training_samples
from tokenizer.autoencoder import Autoencoder
from tokenizer.modality import build_modality
from tokenizer.training import Trainer


@dataclass
class Batch:
    """x as the model takes it, where its lanes are after it, and how many samples were skipped on the way as bad."""

    x: Tensor
    after: dict[int, Position]
    num_bad: int


def train_worker(settings: dict[str, Any]) -> None:
    """Entry point of a rank. settings: config, shards, run (URL) and news, the queue that the driver listens to."""
    loop = TrainLoop(**settings)
    loop.resume()
    loop.train()


class TrainLoop:
    """Model, optimizer, data and log of one rank."""

    def __init__(self, config: Config, shards: list[Shard], run: str, news: Any):
        context = ray.train.get_context()
        self.config, self.shards, self.run, self.news = config, shards, run, news
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":  # Ray would leave one thread per process
            torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        torch.manual_seed(config.train.seed)  # the same weights on every rank ...
        settings = {**asdict(config.model), "quantizer": config.quantizer}
        self.autoencoder = Autoencoder(settings)
        torch.manual_seed(config.train.seed * 1000 + self.rank + 1)  # ... but other noise
        self.modality = build_modality(config.model.modality, config.data.preprocess)
        self.trainer = Trainer(self.autoencoder, self.modality, config.train, self.device)
        # quantizers keep their buffers equal on all ranks themselves; a queue is too large to broadcast each step
        self.trainer.model = ray.train.torch.prepare_model(
            self.autoencoder, parallel_strategy_kwargs={"broadcast_buffers": False}
        )
        self.step = self.num_bad = 0
        options = config.train
        self.lanes = Lanes.for_ranks(self.world_size, len(shards), options.shuffle_buffer, options.seed)
        self.positions: dict[int, Position] = {}  # of this rank's lanes
        self.history: list[dict[str, Any]] = []

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        options = self.config.train
        started, since = time.monotonic(), self.step
        for batch in self._batches():
            if self.step >= options.steps:
                break
            result = self.trainer.update(batch.x, self.step)
            to_log = (self.step + 1) % options.log_every == 0 or self.step + 1 == options.steps
            row = self.trainer.numbers(result, self.step) if to_log else None
            self.step += 1
            self.positions.update(batch.after)
            self.num_bad += batch.num_bad
            if row is not None:
                now = time.monotonic()
                self._log(row, seconds_per_step=(now - started) / (self.step - since))
                started, since = now, self.step
            if self.step % options.checkpoint_every == 0 and self.step < options.steps:
                self._save_checkpoint()
        self._finish()

    def _log(self, numbers: dict[str, float], seconds_per_step: float) -> None:
        samples_per_s = self.config.train.batch_size * self.world_size / seconds_per_step
        row = {
            "step": self.step,
            **numbers,
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "bad_samples": self.num_bad,
        }
        self.history.append({**row, "seconds_per_step": seconds_per_step, "samples_per_s": samples_per_s})
        if self.rank == 0:
            self.news.put(self.history[-1])

    # -- data -----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        return prefetch(self._make_batches(), depth=2)

    def _make_batches(self) -> Iterator[Batch]:
        options = self.config.train
        stream = training_samples(
            self.shards,
            self.lanes,
            rank=self.rank,
            world_size=self.world_size,
            positions=dict(self.positions),
            on_bad_shard=self._warn,
        )
        arrays: list[np.ndarray] = []
        after: dict[int, Position] = {}
        num_bad = 0
        for array, drawn in map_in_threads(self._segment, stream, options.decode_threads):
            after[drawn.lane] = drawn.after
            if array is None:
                num_bad += 1
                continue
            arrays.append(array)
            if len(arrays) == options.batch_size:
                x = self.modality.batch(arrays, self.autoencoder.factor).x
                yield Batch(x.pin_memory() if self.device.type == "cuda" else x, after, num_bad)
                arrays, after, num_bad = [], {}, 0

    def _segment(self, drawn: Drawn) -> tuple[np.ndarray | None, Drawn]:
        """A random piece of the sample, the same in every run; None if the sample is bad."""
        item = decode_sample(drawn.sample, self.modality)
        if not isinstance(item, Item):
            return None, drawn
        rng = np.random.default_rng([self.config.train.seed, drawn.before.epoch, drawn.lane, drawn.before.sample])
        return self.modality.segment(item.decoded.array, self.config.train.segment, rng), drawn

    def _warn(self, error: ShardError) -> None:
        self.news.put({"warning": f"skipped the rest of a shard: {error}"})

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=self.device, weights_only=True)
            ranks = {file.name: torch.load(file, weights_only=True) for file in Path(folder).glob("rank-*.pt")}
        self.autoencoder.load_state_dict(state["model"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        self.lanes = Lanes(**state["lanes"])
        everywhere = {lane: Position(*at) for own in ranks.values() for lane, at in own["positions"].items()}
        self.positions = {lane: at for lane, at in everywhere.items() if lane % self.world_size == self.rank}
        own = ranks.get(self._rank_file())
        if own is None:  # another number of ranks than before: fresh noise, other than what there was
            torch.manual_seed(self.config.train.seed * 1000 + self.rank + 1 + 1_000_003 * self.step)
        else:
            self.num_bad = own["num_bad"]
            torch.set_rng_state(own["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"])
        if self.rank == 0:
            self.news.put({"warning": f"goes on from the checkpoint of step {self.step}"})

    def _save_checkpoint(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            positions = {lane: list(astuple(at)) for lane, at in self.positions.items()}
            own: dict[str, Any] = {"positions": positions, "num_bad": self.num_bad, "rng": torch.get_rng_state()}
            if self.device.type == "cuda":
                own["cuda_rng"] = torch.cuda.get_rng_state()
            torch.save(own, Path(folder) / self._rank_file())
            if self.rank == 0:
                state: dict[str, Any] = {
                    "model": self.autoencoder.state_dict(),
                    "optimizer": self.trainer.optimizer.state_dict(),
                }
                state |= {"step": self.step, "history": self.history, "lanes": asdict(self.lanes)}
                torch.save(state, Path(folder) / "state.pt")
            ray.train.report({"step": self.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _rank_file(self) -> str:
        return f"rank-{self.rank}-of-{self.world_size}.pt"

    def _finish(self) -> None:
        """Rank 0 writes the curves, and last the model: that it is there means that training is over."""
        if self.rank != 0:
            return
        log = "".join(json.dumps(row) + "\n" for row in self.history)
        storage.replace(storage.join(self.run, "reports", "train.jsonl"), log.encode())
        storage.replace(storage.join(self.run, "reports", "train.png"), curves_png(self.history))
        with tempfile.TemporaryDirectory() as folder:
            self.autoencoder.save(folder)
            storage.upload(folder, storage.join(self.run, "model"))
