"""What a training shows while it runs and afterwards, in RUN/reports. Rank 0 makes it."""

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import torch
from tensorboardX import SummaryWriter

from jobs.reports.html import Example, page, picture, side_by_side, table
from jobs.reports.plots import curves_png, sheet_png
from pipeline import storage

WRITE_EVERY_S = 60.0


class TrainReport:
    """train.jsonl, train.png, train.html and tensorboard/, written whole each time.

    history: rows of the log from step 1 on, which grows by `log`. step: of the checkpoint that training goes on from.
    """

    def __init__(self, run: str, history: list[dict[str, Any]], step: int):
        self.run, self.history = run, history
        self.examples: list[Example] = []
        self.examples_step = 0
        self._folder = tempfile.TemporaryDirectory()  # event files grow, which objects in storage cannot
        self._events = SummaryWriter(self._folder.name, purge_step=step + 1)  # a killed run had gone further
        self._written = time.monotonic()

    def log(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        for name, value in row.items():
            self._events.add_scalar(name, value, row["step"])

    def show(self, examples: list[Example], step: int) -> None:
        """Originals and what the model makes of them now."""
        self.examples, self.examples_step = examples, step
        sheet = matplotlib.image.imread(io.BytesIO(sheet_png([one.views for one in examples])))
        self._events.add_image("reconstructions", sheet[..., :3], step, dataformats="HWC")

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written > WRITE_EVERY_S

    def write(self) -> None:
        if not self.history:
            return  # nothing was logged yet: a run that is stopped in its first steps has no curves
        log = "".join(json.dumps(row) + "\n" for row in self.history)
        curves = curves_png(self.history)
        self._replace("train.jsonl", log.encode())
        self._replace("train.png", curves)
        self._replace("train.html", self._page(curves))
        self._events.flush()
        for file in Path(self._folder.name).iterdir():
            self._replace(f"tensorboard/{file.name}", file.read_bytes())
        self._written = time.monotonic()

    def close(self) -> None:
        self.write()
        self._events.close()
        self._folder.cleanup()

    def _page(self, curves: bytes) -> bytes:
        shown = [f"<h2>Originals and reconstructions at step {self.examples_step}</h2>"] if self.examples else []
        shown += map(side_by_side, self.examples)
        return page(f"Training of {self.run}", [table(self.history[-1]), picture(curves), *shown])

    def _replace(self, name: str, data: bytes) -> None:
        storage.replace(storage.join(self.run, "reports", *name.split("/")), data)


class Profile:
    """Where the seconds of a training go, by stage: what passed since the last lap counts towards the lap's stage."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else its work would count where the CPU waits for it
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @property
    def shares(self) -> dict[str, float]:
        whole = sum(self.seconds.values())
        return {stage: seconds / whole for stage, seconds in self.seconds.items()}

    def told(self) -> str:
        stages = (f"{stage} {self.seconds[stage]:.1f} s ({share:.0%})" for stage, share in self.shares.items())
        return f"where rank 0's time went: {', '.join(stages)}"


class CollapseAlarm:
    """Rings when the perplexity has stayed below a limit for so many steps, and then every so many steps anew."""

    def __init__(self, below: float, steps: int):
        self.below, self.steps = below, steps
        self._since: int | None = None  # the step at which it was first seen below, or last rung

    def hears(self, row: dict[str, Any]) -> str | None:
        """What to say of a row of the log. Methods without indices in training have only a soft perplexity, or none."""
        perplexity = row.get("perplexity", row.get("soft_perplexity"))
        if perplexity is None or perplexity >= self.below:
            self._since = None
            return None
        self._since = row["step"] if self._since is None else self._since
        if row["step"] - self._since < self.steps:
            return None
        self._since = row["step"]
        return (
            f"the codebook has collapsed: perplexity {perplexity:.4g} at step {row['step']}, "
            f"below train.collapse.perplexity={self.below:g} for {self.steps} steps"
        )
