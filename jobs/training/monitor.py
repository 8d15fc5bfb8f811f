"""The other work of rank 0 during training: it logs, shows reconstructions, and decides when to stop early."""

import time
from collections.abc import Callable

import numpy as np
import torch

from jobs.reports.pages.document import in_words
from jobs.reports.pages.example import Example, example_of
from jobs.reports.pages.training import TrainingFacts, changed_settings
from jobs.reports.training import CollapseAlarm, TrainReport
from jobs.training.channel import StopSignal
from jobs.training.data import fixed_samples
from jobs.training.state import TrainState
from tokenizer.training.step import StepResult


class Monitor:
    """Follows each step of rank 0. reason: why the run should stop early; empty while it should not.

    lap: notes the end of a stage, for train.profile. data_wait_s: seconds that the loop has waited for samples since
    the last row of the log.
    """

    def __init__(self, state: TrainState, lap: Callable[[str], None]):
        options = state.config.train
        self.state, self.lap, self.reason = state, lap, ""
        self.data_wait_s = 0.0
        self.report = TrainReport(state.run, state.history, state.step, facts_of(state))
        self.alarm = CollapseAlarm(options.collapse.perplexity, options.collapse.patience)
        for row in state.history:
            self.alarm.check(row)
        self.stop_signal = StopSignal(state.channel)
        self._logged_step, self._logged_at = state.step, time.monotonic()
        self._samples: list[tuple[str, np.ndarray]] = []

    def after_step(self, result: StepResult) -> None:
        options, step = self.state.config.train, self.state.step
        is_last = step == options.steps
        if step % options.log_every == 0 or is_last:
            self._log(self.state.trainer.numbers(result))
        self.lap("logging")
        if is_last or (options.reconstruct_every and step % options.reconstruct_every == 0):
            if examples := self._examples():
                self.report.show(examples, step)
            self.report.write()
            self.lap("evaluation")
        elif self.report.is_due:
            self.report.write()
            self.lap("logging")
        elif self.report.is_live_due:
            self.report.write_live()
            self.lap("logging")

    def should_stop(self) -> bool:
        if self.stop_signal and not self.reason:
            self.reason = stopped_at(self.state.step, "on request")
        return bool(self.reason)

    def _log(self, numbers: dict[str, float]) -> None:
        state, now = self.state, time.monotonic()
        started = self._logged_at
        seconds = (now - started) / (state.step - self._logged_step)
        self._logged_step, self._logged_at = state.step, now
        row = {"step": state.step, **numbers, "lr": state.trainer.optimizer.param_groups[0]["lr"]}
        samples_per_s = state.config.train.batch_size * state.world_size / seconds
        row |= {"bad_samples": state.data.num_skipped, "seconds_per_step": seconds, "samples_per_s": samples_per_s}
        row |= {"data_wait_share": self.data_wait_s / (now - started)}
        self.data_wait_s = 0.0
        self.report.log(row)
        state.send({"row": row})
        if self.alarm.is_blind(row) and len(self.report.history) == 1:
            name = state.config.quantizer["name"]
            state.send({"message": f"train.collapse has no effect: {name} logs no perplexity while it trains"})
        collapse = self.alarm.check(row)
        if collapse is not None:
            state.send({"message": collapse})
            if state.config.train.collapse.stop:
                self.reason = collapse

    @torch.no_grad()
    def _examples(self) -> list[Example]:
        """The fixed samples and their reconstructions; none if storage cannot be read now."""
        state, modality = self.state, self.state.modality
        if not self._samples:
            options = state.config.train
            size, count, member = options.crop_size, options.num_examples, state.config.data.member
            self._samples = fixed_samples(state.shards, modality, size, count, member)
        if not self._samples:
            return []
        arrays = [array for _, array in self._samples]
        x = modality.batch(arrays, state.autoencoder.factor).x.to(state.device)
        state.autoencoder.eval()  # the next update sets train() again
        with state.averaged_weights():
            x_hat = state.autoencoder(x).x_hat.float().cpu()
        reconstructions = modality.unbatch(x_hat, [modality.size_of(array) for array in arrays])
        pairs = zip(self._samples, reconstructions, strict=True)
        return [example_of(modality, key, (array, x_hat)) for (key, array), x_hat in pairs]


def facts_of(state: TrainState) -> TrainingFacts:
    """What the page says about the run."""
    config, autoencoder = state.config, state.autoencoder
    return TrainingFacts(
        run=state.run,
        steps=config.train.steps,
        method=f"{config.quantizer['name']}, {autoencoder.quantizer.codebook_size:,} codes",
        corpus=f"{in_words(config.to_dict()['data']['shards'])}: {len(state.shards):,} shards",
        command=config.command,
        num_parameters=sum(p.numel() for p in autoencoder.parameters()),
        factor=autoencoder.factor,
        num_workers=state.world_size,
        device=torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "CPU",
        settings=changed_settings(config),
    )


def stopped_at(step: int, why: str) -> str:
    return f"at step {step}, {why}; rerun the same command to resume from there"
