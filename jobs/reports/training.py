"""The report of a training in RUN/reports, which rank 0 writes while it runs and at the end."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.reports.pages.example import Example
from jobs.reports.pages.filmstrip import Filmstrip
from jobs.reports.pages.index import write_index
from jobs.reports.pages.training import LIVE_EVERY_S, LIVE_FILE, LiveParts, TrainingFacts, live_parts, training_page
from jobs.reports.plots import curves_png, image_array, sheet_png
from pipeline import storage

WRITE_EVERY_S = 60.0
SKIPPED, FILM_FILE = "skipped.jsonl", "train-film.json"


class TrainReport:
    """train.jsonl, train.png, train.html, tensorboard/, and skipped.jsonl if samples were skipped. Each file is written
    whole each time. Pages that are open read train-live.json; train-film.json keeps pictures for a run that resumes.

    history: rows of the log from step 1 on; `log` appends to it. step: the checkpoint that training resumes from.
    skipped: shard, index, key and reason of samples that could not be decoded.
    """

    def __init__(self, run: str, history: list[dict[str, Any]], step: int, facts: TrainingFacts | None = None):
        from tensorboardX import SummaryWriter  # slow, and only rank 0 needs it

        self.run, self.history = run, history
        self.facts = facts or TrainingFacts(run)
        self.examples: list[Example] = []
        self.skipped: list[dict[str, Any]] = []
        self.examples_step = 0
        film = storage.read_if_exists(self._url(FILM_FILE)) if step else None
        self.film = Filmstrip() if film is None else Filmstrip.from_json(film, step)
        self._folder = tempfile.TemporaryDirectory()  # event files grow; objects in storage cannot
        self._events = SummaryWriter(self._folder.name, purge_step=step + 1)  # a killed run may have logged later steps
        self._written = self._written_live = time.monotonic()
        self._indexed = False

    def log(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        for name, value in row.items():
            self._events.add_scalar(name, value, row["step"])

    def show(self, examples: list[Example], step: int) -> None:
        """Adds originals and their reconstructions at this step."""
        self.examples, self.examples_step = examples, step
        self.film.add(examples, step)
        sheet = image_array(sheet_png([one.views for one in examples]))
        self._events.add_image("reconstructions", sheet[..., :3], step, dataformats="HWC")

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written > WRITE_EVERY_S

    @property
    def is_live_due(self) -> bool:
        return bool(self.history) and time.monotonic() - self._written_live > LIVE_EVERY_S

    def write(self, *, running: bool = True) -> None:
        if self.skipped:
            self._replace(SKIPPED, "".join(json.dumps(one) + "\n" for one in self.skipped).encode())
        if not self.history:
            return  # a run that stops in its first steps has no curves
        log = "".join(json.dumps(row) + "\n" for row in self.history)
        self._replace("train.jsonl", log.encode())
        self._replace("train.png", curves_png(self.history))
        examples = (self.examples_step, self.examples)
        live = live_parts(self.facts, self.history, running=running)
        page = training_page(self.facts, self.history, examples, self.film, self.skipped, live)
        self._replace("train.html", page)
        if self.film.frames:
            self._replace(FILM_FILE, self.film.to_json())
        self._write_live(live)
        self._events.flush()
        for file in Path(self._folder.name).iterdir():
            self._replace(f"tensorboard/{file.name}", file.read_bytes())
        if not (running and self._indexed):
            write_index(self._url())
            self._indexed = True
        self._written = time.monotonic()

    def write_live(self) -> None:
        """The small file that a page reads again and again while the run trains."""
        self._write_live(live_parts(self.facts, self.history, running=True))

    def _write_live(self, live: LiveParts) -> None:
        self._replace(LIVE_FILE, live.to_json())
        self._written_live = time.monotonic()

    def close(self) -> None:
        self.write(running=False)
        self._events.close()
        self._folder.cleanup()

    def _url(self, *parts: str) -> str:
        return storage.join(self.run, "reports", *parts)

    def _replace(self, name: str, data: bytes) -> None:
        storage.replace(self._url(*name.split("/")), data)


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
