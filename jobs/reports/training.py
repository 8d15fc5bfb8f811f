"""The report of a training in RUN/reports, which rank 0 writes while it runs and at the end."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.reports.html import Example, page, picture, side_by_side, table
from jobs.reports.plots import curves_png, image_array, sheet_png
from pipeline import storage

WRITE_EVERY_S = 60.0
SKIPPED, SHOWN = "skipped.jsonl", 20


class TrainReport:
    """train.jsonl, train.png, train.html, tensorboard/, and skipped.jsonl if samples were skipped. Each file is written
    whole each time.

    history: rows of the log from step 1 on; `log` appends to it. step: the checkpoint that training resumes from.
    skipped: shard, index, key and reason of samples that could not be decoded.
    """

    def __init__(self, run: str, history: list[dict[str, Any]], step: int):
        from tensorboardX import SummaryWriter  # slow, and only rank 0 needs it

        self.run, self.history = run, history
        self.examples: list[Example] = []
        self.skipped: list[dict[str, Any]] = []
        self.examples_step = 0
        self._folder = tempfile.TemporaryDirectory()  # event files grow; objects in storage cannot
        self._events = SummaryWriter(self._folder.name, purge_step=step + 1)  # a killed run may have logged later steps
        self._written = time.monotonic()

    def log(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        for name, value in row.items():
            self._events.add_scalar(name, value, row["step"])

    def show(self, examples: list[Example], step: int) -> None:
        """Adds originals and their reconstructions at this step."""
        self.examples, self.examples_step = examples, step
        sheet = image_array(sheet_png([one.views for one in examples]))
        self._events.add_image("reconstructions", sheet[..., :3], step, dataformats="HWC")

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written > WRITE_EVERY_S

    def write(self) -> None:
        if self.skipped:
            self._replace(SKIPPED, "".join(json.dumps(one) + "\n" for one in self.skipped).encode())
        if not self.history:
            return  # a run that stops in its first steps has no curves
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
        if self.skipped:
            shown.append(f"<h2>Skipped samples: {len(self.skipped)}</h2>")
            shown.append(f"<p>All are listed in {SKIPPED}. The first {min(SHOWN, len(self.skipped))}:</p>")
            shown.append(table({f"{one['shard']} {one['key']}": one["reason"] for one in self.skipped[:SHOWN]}))
        return page(f"Training of {self.run}", [table(self.history[-1]), picture(curves), *shown])

    def _replace(self, name: str, data: bytes) -> None:
        storage.replace(storage.join(self.run, "reports", *name.split("/")), data)


class CollapseAlarm:
    """Reports when the perplexity has been below a limit for `steps` steps, and again after as many more steps."""

    def __init__(self, below: float, steps: int):
        self.below, self.steps = below, steps
        self._since: int | None = None  # the step of the first row below the limit, or of the last report

    def is_blind(self, row: dict[str, Any]) -> bool:
        """Whether the alarm is set, but the method logs no perplexity."""
        return bool(self.below) and not {"perplexity", "soft_perplexity"} & row.keys()

    def check(self, row: dict[str, Any]) -> str | None:
        """A message if the row of the log shows a collapse. Some methods log a soft perplexity, or none."""
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
