"""The page of `train`: curves, a filmstrip of fixed samples, speed, skipped samples and settings. While the run trains,
the page takes its changing parts from train-live.json beside it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.config import Config
from jobs.config.schema import all_keys
from jobs.reports.pages import charts
from jobs.reports.pages.cards import cards_of, thumbnail
from jobs.reports.pages.document import Header, fragment, in_words, render
from jobs.reports.pages.example import Example
from jobs.reports.pages.filmstrip import Filmstrip
from jobs.reports.pages.metrics import metric

NO_CURVE = ("step", "bad_samples")
SPEED = ("samples_per_s", "seconds_per_step", "data_wait_share")
HEADLINE = ("loss", "psnr", "perplexity", "soft_perplexity", "samples_per_s", "data_wait_share")
HELD_OUT = "heldout_"  # before the name of a number that was measured on held-out samples
SHOWN_SKIPPED = 200
LIVE_FILE = "train-live.json"
LIVE_EVERY_S = 10.0
Row = dict[str, Any]


@dataclass
class TrainingFacts:
    """What a page says about a run beside its log. settings: those that differ from the defaults."""

    run: str
    steps: int = 0
    method: str = ""
    corpus: str = ""
    command: str = ""
    num_parameters: int = 0
    factor: int = 0
    num_workers: int = 1
    device: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class LiveParts:
    """What a page that is open replaces. html: by the id of the element."""

    running: bool
    step: int
    html: dict[str, str]

    def to_json(self) -> bytes:
        return json.dumps({"running": self.running, "step": self.step, "parts": self.html}).encode()


def training_page(
    facts: TrainingFacts,
    history: Sequence[Row],
    examples: tuple[int, list[Example]],
    film: Filmstrip,
    skipped: Sequence[Row],
    live: LiveParts,
) -> bytes:
    """examples: the step of the fixed samples' last reconstructions, and these."""
    step, shown = examples
    last = history[-1]
    header = Header(
        "training", f"Training of {_name(facts.run)}", _lead(facts, history), _facts(facts, last), [], facts.command
    )
    header.headline = [name for name in HEADLINE if name in last]
    cards = cards_of(shown)
    header.thumbnail = thumbnail(shown)
    return render(
        "training.html",
        header,
        last,
        live={"running": live.running, "seconds": LIVE_EVERY_S, "source": LIVE_FILE},
        parts_of=live.html,
        step=step,
        cards=cards,
        film=film if len(film.frames) > 1 else None,
        skipped=skipped[:SHOWN_SKIPPED],
        num_skipped=len(skipped),
        settings=facts.settings,
    )


def live_parts(facts: TrainingFacts, history: Sequence[Row], *, running: bool) -> LiveParts:
    last = history[-1]
    curves = [one for name in names_of(history) if (one := _curve(name, history))]
    shown = names_of(history) if not curves else HEADLINE  # else the curves show the others
    numbers = {name: last[name] for name in shown if name in last}
    left_s = (facts.steps - last["step"]) * last.get("seconds_per_step", 0) if running else 0
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    about = {"facts": facts, "last": last, "running": running, "left": _clock(left_s), "numbers": numbers, "at": at}
    status = fragment("training_status.html", **about)
    html = {"live-status": status, "live-curves": fragment("training_curves.html", curves=curves)}
    return LiveParts(running, last["step"], html)


def names_of(history: Sequence[Row]) -> list[str]:
    """The numbers that get a curve, in the order of the log. A held-out one shares that of its number in training."""
    names = list(dict.fromkeys(name for row in history for name in row))
    alone = [name for name in names if not name.startswith(HELD_OUT) or name.removeprefix(HELD_OUT) not in names]
    quality = [name for name in alone if name not in SPEED and name not in NO_CURVE]
    return quality + [name for name in SPEED if name in alone]


def _curve(name: str, history: Sequence[Row]) -> dict[str, Any] | None:
    """None if there are fewer than two points: the number alone says as much."""
    lines = [_series("training", name, history), _series("held out", f"{HELD_OUT}{name}", history)]
    lines = [one for one in lines if one.x]
    if max(len(one.x) for one in lines) < 2:
        return None
    lines[-1].dashed = len(lines) > 1
    known = metric(name)
    label = f"{known.label}{f' ({known.unit})' if known.unit else ''}"
    return {"metric": known, "chart": charts.line_chart(lines, "step", label, size=charts.SMALL)}


def _series(label: str, name: str, history: Sequence[Row]) -> charts.Series:
    rows = [row for row in history if name in row]
    return charts.Series(label, [row["step"] for row in rows], [row[name] for row in rows])


def _lead(facts: TrainingFacts, history: Sequence[Row]) -> str:
    """How far it is, how good, and against what."""
    first, last = history[0], history[-1]
    name = next((one for one in ("psnr", "loss") if one in last), None)
    words = f"Step {last['step']:,} of {facts.steps:,}." if facts.steps else f"Step {last['step']:,}."
    if name is None or last["step"] == first["step"]:
        return words
    label = metric(name).label
    end, start = metric(name).with_unit(last[name]), metric(name).with_unit(first[name])
    return (
        f"{words} {label} went from {start} at step {first['step']:,} to {end}, on the random crops that it trains on; "
        "evaluate measures whole held-out samples."
    )


def _facts(facts: TrainingFacts, last: Row) -> dict[str, Any]:
    shown = {
        "method": facts.method,
        "corpus": facts.corpus,
        "factor": facts.factor or "",
        "parameters": f"{facts.num_parameters:,}" if facts.num_parameters else "",
        "workers": f"{facts.num_workers} on {facts.device}" if facts.device else "",
        "skipped samples": f"{last['bad_samples']:,}" if "bad_samples" in last else "",
        "run": facts.run,
    }
    return {name: value for name, value in shown.items() if value != ""}


def changed_settings(config: Config) -> dict[str, Any]:
    """The settings of data, model, quantizer and training that differ from the defaults, by dotted key."""
    saved = config.to_dict()
    sections = ("data.", "model.", "quantizer", "train.", "workers.")
    changed: dict[str, Any] = {}
    for one in all_keys():
        if not one.name.startswith(sections):
            continue
        value: Any = saved
        for part in one.name.split("."):
            value = value[part]
        if value != one.default:
            changed[one.name] = in_words(value) if one.name == "data.shards" else value
    return changed


def _name(run: str) -> str:
    return run.rstrip("/").rsplit("/", 1)[-1]


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        "less than a minute"
        if minutes < 1
        else f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
    )
