"""What one training rank does: build, step, log, evaluate, save. Runs inside Ray Train, once per worker."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed

from jobs.config import Config
from jobs.reports.html import Example
from jobs.reports.training import CollapseAlarm, Profile, TrainReport
from jobs.training.channel import StopWish
from jobs.training.data import Batch, TrainingData, fixed_samples
from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.corpus.streams import Lanes, Position
from pipeline.errors import ShardError, StorageError
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.step import Averages, StepResult, Trainer, compile_nets

LANES_FILE = "lanes.json"  # of a checkpoint: small, for a driver to see whether there are enough


def train_worker(settings: dict[str, Any]) -> None:
    """Entry point of a rank. settings: config, shards, run (URL) and mailbox, through which the driver hears of it."""
    loop = TrainLoop(**settings)
    loop.resume()
    loop.train()


class TrainLoop:
    """Model, optimizer, data and log of one rank."""

    def __init__(self, config: Config, shards: list[Shard], run: str, mailbox: Any):
        context = ray.train.get_context()
        self.config, self.shards, self.run, self.mailbox = config, shards, run, mailbox
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":  # Ray would leave one thread per process
            torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        # beside NCCL: what ranks agree on is known to their CPUs, and no GPU need wait
        self.cpu_group = torch.distributed.new_group(backend="gloo") if self.world_size > 1 else None
        self.step = 0
        self.warned = False  # that a node is about to go
        self.saved_step: int | None = None  # of the last checkpoint
        self.history: list[dict[str, Any]] = []
        self._build()

    def _build(self) -> None:
        config, options = self.config, self.config.train
        torch.manual_seed(options.seed)  # the same weights on every rank ...
        self.autoencoder = Autoencoder({**asdict(config.model), "quantizer": config.quantizer})
        self._seed_noise()  # ... but other noise
        self.modality = build_modality(config.model.modality, config.data.preprocess)
        self.trainer = Trainer(self.autoencoder, self.modality, options.recipe(), self.device, options.grad_accum_steps)
        self.averages = Averages(self.autoencoder, options.ema) if options.ema else None
        if options.compile:
            compile_nets(self.autoencoder)
        # quantizers keep their buffers equal on all ranks themselves; a queue is too large to broadcast each step
        self.trainer.model = ray.train.torch.prepare_model(
            self.autoencoder, parallel_strategy_kwargs={"broadcast_buffers": False}
        )
        factor, ranks = self.autoencoder.factor, (self.rank, self.world_size)
        self.data = TrainingData(self.shards, options, self.modality, factor, *ranks, on_bad_shard=self._warn)

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """To the last step; or until the driver asks to stop, the codebook collapses, storage gives no more samples, or
        numbers are not finite."""
        options = self.config.train
        profile = Profile(self.device) if options.profile and self.rank == 0 else None
        self.lap = self.trainer.lap = profile.lap if profile else _no_lap
        self.watch = Watch(self) if self.rank == 0 else None
        batches = self.data.batches(pinned=self.device.type == "cuda")
        while self.step < options.steps:
            batch = self._draw(batches)
            self.lap("data wait")
            if self._any_rank(batch is None or (self.watch is not None and self.watch.wants_to_stop())):
                self._save_checkpoint()
                asked = self.watch.reason if self.watch else ""
                return self._stop(asked or _goes_on(self.step, "storage gave no more samples"))
            assert batch is not None
            try:
                result = self.trainer.update(batch.x, self.step)
            except FloatingPointError as error:
                return self._stop(f"{error}; its samples are in {self._save_culprits(batch, error)}")
            self._advance(batch)
            if self.watch is not None:
                self.watch.follow(result)
            if (self.step % options.checkpoint_every == 0 or self._is_warned()) and self.step < options.steps:
                self._save_checkpoint()
        self._finish(profile)

    def _draw(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, None if storage does not give it."""
        try:
            return next(batches)
        except StorageError as error:
            self.tell({"said": str(error)})
            return None

    def _advance(self, batch: Batch) -> None:
        if self.averages is not None:
            self.averages.follow(self.step)
        self.step += 1
        self.data.taken(batch)

    def _any_rank(self, wish: bool) -> bool:
        """The same answer on every rank, so that none waits for one that has gone."""
        if self.cpu_group is None:
            return wish
        wishes = torch.tensor(int(wish))
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self.cpu_group)
        return bool(wishes)

    def _is_warned(self) -> bool:
        """Whether Ray says for the first time that it will lose one of our nodes, which it then replaces by itself.

        The same on every rank, all of which must ask in the same steps; since it costs some milliseconds, in those of
        train.log_every, which should come more often than a cloud's notice is long.
        """
        if self.warned or self.step % self.config.train.log_every:
            return False
        self.warned = ray.train.get_preemption_info() is not None
        if self.warned and self.rank == 0:
            self.tell({"said": f"a node is about to go: saves a checkpoint at step {self.step}"})
        return self.warned

    def _stop(self, reason: str) -> None:
        if self.watch is not None:
            self.watch.report.close()
            self.tell({"stopped": reason})

    def _finish(self, profile: Profile | None) -> None:
        """Rank 0 writes the reports, and last the model: that it is there means that training is over."""
        if self.watch is None:
            return
        self.watch.report.close()
        if profile is not None:
            self.tell({"said": profile.told()})
            numbers = {"steps": self.step, "seconds": profile.seconds, "shares": profile.shares}
            storage.replace(self.place("profile.json"), json.dumps(numbers, indent=1).encode())
        with tempfile.TemporaryDirectory() as folder, self.averaged():
            self.autoencoder.save(folder)
            storage.upload(folder, storage.join(self.run, "model"))

    def averaged(self) -> contextlib.AbstractContextManager:
        """Inside, the autoencoder is what RUN/model will be."""
        return self.averages.applied() if self.averages is not None else contextlib.nullcontext()

    def tell(self, news: dict[str, Any]) -> None:
        ray.get(self.mailbox.tell.remote(news))

    def place(self, report: str) -> str:
        return storage.join(self.run, "reports", report)

    def _warn(self, error: ShardError) -> None:
        self.tell({"said": f"skipped the rest of a shard: {error}"})

    def _save_culprits(self, batch: Batch, error: FloatingPointError) -> str:
        """The samples of all ranks' batches; returns where they are. Every rank must call it."""
        samples: list[Any] = [batch.samples]
        if self.cpu_group is not None:
            samples = [None] * self.world_size
            torch.distributed.all_gather_object(samples, batch.samples, group=self.cpu_group)
        place = self.place(f"nan-step-{self.step + 1}.json")
        if self.rank == 0:
            found = {"step": self.step + 1, "error": str(error), "samples_by_rank": samples}
            storage.replace(place, json.dumps(found, indent=1).encode())
        return place

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=self.device, weights_only=True)
            ranks = {file.name: torch.load(file, weights_only=True) for file in Path(folder).glob("rank-*.pt")}
            lanes = Lanes(**json.loads((Path(folder) / LANES_FILE).read_text()))
        self.autoencoder.load_state_dict(state["model"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        if self.averages is not None:
            self.averages.values = state["averages"]
        if self.trainer.adversary is not None:
            self.trainer.adversary.load_state_dict(state["adversary"])
        self.step = self.saved_step = state["step"]
        self.history = state["history"]
        everywhere = {lane: Position(*at) for own in ranks.values() for lane, at in own["positions"].items()}
        self.data.go_on(lanes, everywhere)
        own = ranks.get(self._rank_file())
        if own is None:  # another number of ranks than before: fresh noise, other than what there was
            self._seed_noise()
            self.data.num_bad = sum(rank["num_bad"] for rank in ranks.values()) if self.rank == 0 else 0
        else:
            self.data.num_bad = own["num_bad"]
            torch.set_rng_state(own["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"])
        if self.rank == 0:
            self.tell({"said": f"goes on from the checkpoint of step {self.step}"})

    def _seed_noise(self) -> None:
        torch.manual_seed(self.config.train.seed * 1000 + self.rank + 1 + 1_000_003 * self.step)

    def _save_checkpoint(self) -> None:
        if self.step == self.saved_step:
            return
        with tempfile.TemporaryDirectory() as folder:
            positions = {lane: list(astuple(at)) for lane, at in self.data.positions.items()}
            own: dict[str, Any] = {"positions": positions, "num_bad": self.data.num_bad, "rng": torch.get_rng_state()}
            if self.device.type == "cuda":
                own["cuda_rng"] = torch.cuda.get_rng_state()
            torch.save(own, Path(folder) / self._rank_file())
            if self.rank == 0:
                torch.save(self._state(), Path(folder) / "state.pt")
                (Path(folder) / LANES_FILE).write_text(json.dumps(asdict(self.data.lanes)))
            ray.train.report({"step": self.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self.saved_step = self.step
        self.lap("checkpoint")

    def _state(self) -> dict[str, Any]:
        """What all ranks have in common."""
        state: dict[str, Any] = {"step": self.step, "history": self.history}
        state |= {"model": self.autoencoder.state_dict(), "optimizer": self.trainer.optimizer.state_dict()}
        if self.averages is not None:
            state["averages"] = self.averages.values
        if self.trainer.adversary is not None:
            state["adversary"] = self.trainer.adversary.state_dict()
        return state

    def _rank_file(self) -> str:
        return f"rank-{self.rank}-of-{self.world_size}.pt"


class Watch:
    """What rank 0 does besides training: it logs, shows pictures, and sees when to stop. `reason` says why."""

    def __init__(self, loop: TrainLoop):
        options = loop.config.train
        self.loop, self.reason = loop, ""
        self.report = TrainReport(loop.run, loop.history, loop.step)
        self.alarm = CollapseAlarm(options.collapse.perplexity, options.collapse.patience)
        for row in loop.history:
            self.alarm.hears(row)
        self.stop_wish = StopWish(loop.mailbox)
        self._since, self._started = loop.step, time.monotonic()
        self._samples: list[tuple[str, np.ndarray]] = []

    def follow(self, result: StepResult) -> None:
        """After each step."""
        options, step = self.loop.config.train, self.loop.step
        is_last = step == options.steps
        if step % options.log_every == 0 or is_last:
            self._log(self.loop.trainer.numbers(result))
        self.loop.lap("logging")
        if is_last or (options.reconstruct_every and step % options.reconstruct_every == 0):
            if examples := self._examples():
                self.report.show(examples, step)
            self.report.write()
            self.loop.lap("evaluation")
        elif self.report.is_due:
            self.report.write()
            self.loop.lap("logging")

    def wants_to_stop(self) -> bool:
        if self.stop_wish and not self.reason:
            self.reason = _goes_on(self.loop.step, "was asked for")
        return bool(self.reason)

    def _log(self, numbers: dict[str, float]) -> None:
        loop, now = self.loop, time.monotonic()
        seconds = (now - self._started) / (loop.step - self._since)
        self._since, self._started = loop.step, now
        row = {"step": loop.step, **numbers, "lr": loop.trainer.optimizer.param_groups[0]["lr"]}
        samples_per_s = loop.config.train.batch_size * loop.world_size / seconds
        row |= {"bad_samples": loop.data.num_bad, "seconds_per_step": seconds, "samples_per_s": samples_per_s}
        self.report.log(row)
        loop.tell(row)
        alarm = self.alarm.hears(row)
        if alarm is not None:
            loop.tell({"said": alarm})
            if loop.config.train.collapse.stop:
                self.reason = alarm

    @torch.no_grad()
    def _examples(self) -> list[Example]:
        """The fixed samples, as they are and as the model rebuilds them."""
        loop, modality = self.loop, self.loop.modality
        if not self._samples:
            options = loop.config.train
            self._samples = fixed_samples(loop.shards, modality, options.crop_size, options.num_examples)
        if not self._samples:  # storage is out
            return []
        arrays = [array for _, array in self._samples]
        x = modality.batch(arrays, loop.autoencoder.factor).x.to(loop.device)
        loop.autoencoder.eval()  # the next update sets train() again
        with loop.averaged():
            x_hat = loop.autoencoder(x).x_hat.float().cpu()
        rebuilt = modality.unbatch(x_hat, [modality.size_of(array) for array in arrays])
        return [
            Example(key, modality.mime, *(tuple(f(a) for a in pair) for f in (modality.view, modality.to_bytes)))
            for (key, _), pair in zip(self._samples, zip(arrays, rebuilt, strict=True), strict=True)
        ]


def _goes_on(step: int, why: str) -> str:
    return f"at step {step}, as {why}; the same command goes on from there"


def _no_lap(stage: str) -> None:
    """Of a training that is not profiled."""
