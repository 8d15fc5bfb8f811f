"""The state of one training rank: model, optimizer, data, log, and its place among the ranks."""

import contextlib
from dataclasses import asdict
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed

from jobs.config import Config
from jobs.training.channel import Message
from jobs.training.data import TrainingData
from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.ema import EMA
from tokenizer.training.step import Trainer, compile_nets


class TrainState:
    """Built inside Ray Train. run: URL of RUN. channel: to the driver. step: updates made so far."""

    def __init__(self, config: Config, shards: list[Shard], run: str, channel: Any):
        context = ray.train.get_context()
        self.config, self.shards, self.run, self.channel = config, shards, run, channel
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":  # Ray would leave one thread per process
            torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        # in addition to NCCL: ranks agree through their CPUs, so that no GPU has to wait
        self.cpu_group = torch.distributed.new_group(backend="gloo") if self.world_size > 1 else None
        self.step = 0
        self.saved_step: int | None = None  # of the last checkpoint
        self.history: list[dict[str, Any]] = []  # rows of the log
        self._build()

    def _build(self) -> None:
        config, options = self.config, self.config.train
        torch.manual_seed(options.seed)  # the same weights on every rank ...
        self.autoencoder = Autoencoder({**asdict(config.model), "quantizer": config.quantizer})
        self.seed_noise()  # ... but different noise
        self.modality = build_modality(config.model.modality, config.data.preprocess)
        self.trainer = Trainer(self.autoencoder, self.modality, options.recipe(), self.device, options.grad_accum_steps)
        self.averages = EMA(self.autoencoder, options.ema) if options.ema else None
        if options.compile:
            compile_nets(self.autoencoder)
        # quantizers keep their buffers equal on all ranks themselves; a queue is too large to broadcast each step
        self.trainer.model = ray.train.torch.prepare_model(
            self.autoencoder, parallel_strategy_kwargs={"broadcast_buffers": False}
        )
        factor, ranks = self.autoencoder.factor, (self.rank, self.world_size)
        self.data = TrainingData(
            *(self.shards, options, self.modality, factor, *ranks),
            on_bad_shard=self._report_shard,
            member=config.data.member,
        )

    def seed_noise(self) -> None:
        torch.manual_seed(self.config.train.seed * 1000 + self.rank + 1 + 1_000_003 * self.step)

    def averaged_weights(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the autoencoder has the weights that RUN/model will have."""
        return self.averages.applied() if self.averages is not None else contextlib.nullcontext()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks get the same answer, so none waits for one that has left."""
        if self.cpu_group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in their order. Every rank must call it."""
        if self.cpu_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.cpu_group)
        return values

    def send(self, message: Message) -> None:
        """To the driver: {"started": ranks}, {"row": numbers of a step}, {"message": text} or {"stopped": reason}."""
        ray.get(self.channel.send.remote(message))

    def report_url(self, name: str) -> str:
        return storage.join(self.run, "reports", name)

    def _report_shard(self, error: ShardError) -> None:
        self.send({"message": f"skipped the rest of a shard: {error}"})
