"""The training loop of one rank. Runs inside Ray Train, once per worker."""

import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import ray.train
import torch

from jobs.shards import passed_over_notes
from jobs.stopwatch import Stopwatch
from jobs.training.checkpoint import load_checkpoint, save_checkpoint
from jobs.training.data import NoGoodSample, TrainBatch
from jobs.training.monitor import Monitor, stopped_at
from jobs.training.state import TrainState
from pipeline import storage
from pipeline.errors import ShardError, StorageError


def train_worker(settings: dict[str, Any]) -> None:
    """Entry point of a rank: resumes, then trains. settings: those of TrainState."""
    state = TrainState(**settings)
    if state.rank == 0:
        state.send({"started": state.world_size})
    if load_checkpoint(state) and state.rank == 0:
        state.send({"message": f"resuming from the checkpoint of step {state.step}"})
    TrainLoop(state).train()


class TrainLoop:
    """Steps, checkpoints, and the end of a training. The monitor is rank 0's alone."""

    def __init__(self, state: TrainState):
        self.state, self.options = state, state.config.train
        profiles = self.options.profile and state.rank == 0
        self.watch = Stopwatch(self._synchronize) if profiles else None
        self.lap = state.trainer.lap = self.watch.lap if self.watch else lambda stage: None
        self.monitor = Monitor(state, self.lap) if state.rank == 0 else None
        self.node_is_leaving = False

    def train(self) -> None:
        """Trains to the last step.

        Stops early if the driver requests it, the codebook collapses, storage gives no more samples, or a loss or
        gradient is not finite.
        """
        state = self.state
        batches = state.data.batches(pinned=state.device.type == "cuda")
        while state.step < self.options.steps:
            started = time.monotonic()
            batch = self._next(batches)
            self.lap("data wait")
            if self.monitor is not None:
                self.monitor.data_wait_s += time.monotonic() - started
            if state.any_rank(batch is None or (self.monitor is not None and self.monitor.should_stop())):
                self._save()
                reason = self.monitor.reason if self.monitor else ""
                return self._stop(reason or stopped_at(state.step, "because there are no more samples"))
            assert batch is not None
            try:
                result = state.trainer.update(batch.x, state.step)
            except FloatingPointError as error:
                return self._stop(f"{error}; its samples are in {self._save_samples(batch, error)}")
            if state.averages is not None:
                state.averages.update(state.step)
            state.step += 1
            state.data.trained_on(batch)
            if self.monitor is not None:
                self.monitor.after_step(result)
            is_due = state.step % self.options.checkpoint_every == 0 or self._node_will_leave()
            if is_due and state.step < self.options.steps:
                self._save()
        self._finish()

    def _next(self, batches: Iterator[TrainBatch]) -> TrainBatch | None:
        """The next batch; None if storage fails, or no sample can be decoded."""
        try:
            return next(batches)
        except (StorageError, ShardError, NoGoodSample) as error:
            self.state.send({"message": str(error)})
            return None

    def _node_will_leave(self) -> bool:
        """Whether Ray announces for the first time that it will lose one of our nodes; it replaces the node itself.

        All ranks must ask in the same steps, and get the same answer. A question costs some milliseconds, so we ask
        every train.log_every steps, which should take less time than the notice that a cloud gives.
        """
        state = self.state
        if self.node_is_leaving or state.step % self.options.log_every:
            return False
        self.node_is_leaving = ray.train.get_preemption_info() is not None
        if self.node_is_leaving and state.rank == 0:
            state.send({"message": f"a node is about to be lost: saving a checkpoint at step {state.step}"})
        return self.node_is_leaving

    def _save(self) -> None:
        """Every rank must call it. Before the first step there is nothing to save."""
        if self.state.step:
            save_checkpoint(self.state)
        skipped = self.state.gather(self.state.data.skipped)
        if self.monitor is not None:
            self.monitor.report.skipped = [sample for rank in skipped for sample in rank]
        self.lap("checkpoint")

    def _stop(self, reason: str) -> None:
        if self.monitor is not None:
            self.monitor.report.close()
            self.state.send({"stopped": reason})

    def _save_samples(self, batch: TrainBatch, error: FloatingPointError) -> str:
        """Writes the samples of all ranks' batches to a file, and returns its URL. Every rank must call it."""
        state = self.state
        samples = state.gather(batch.samples)
        url = state.report_url(f"nan-step-{state.step + 1}.json")
        if state.rank == 0:
            content = {"step": state.step + 1, "error": str(error), "samples_by_rank": samples}
            storage.replace(url, json.dumps(content, indent=1).encode())
        return url

    def _finish(self) -> None:
        """Saves the last checkpoint, from which more steps can be made. Then rank 0 writes the reports, and last the
        model: a run with a model is finished."""
        state = self.state
        self._save()
        for note, count in passed_over_notes(state.data.passed_over).items():
            state.send({"message": f"{count} {note}" + (f" (rank {state.rank})" if state.world_size > 1 else "")})
        if self.monitor is None:
            return
        self.monitor.report.close()
        if self.watch is not None:
            self._write_profile(self.watch)
        with tempfile.TemporaryDirectory() as folder, state.averaged_weights():
            state.autoencoder.save(folder)
            storage.upload(folder, storage.join(state.run, "model"))

    def _write_profile(self, watch: Stopwatch) -> None:
        total = sum(watch.seconds.values())
        shares = {stage: seconds / total for stage, seconds in watch.seconds.items()}
        stages = ", ".join(f"{stage} {watch.seconds[stage]:.1f} s ({share:.0%})" for stage, share in shares.items())
        self.state.send({"message": f"where rank 0's time went: {stages}"})
        profile = {"steps": self.state.step, "seconds": watch.seconds, "shares": shares}
        storage.replace(self.state.report_url("profile.json"), json.dumps(profile, indent=1).encode())

    def _synchronize(self) -> None:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)
