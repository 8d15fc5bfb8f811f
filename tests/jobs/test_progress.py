"""The progress line in a log file, and the stopwatch."""

import time

import pytest

from jobs.reports.progress import Progress, clock, counted
from jobs.stopwatch import Stopwatch


def test_the_first_and_the_last_line_are_printed_once_each(capsys: pytest.CaptureFixture[str]):
    progress = Progress("tokenize", total=3, unit="shards")
    for _ in range(3):
        progress.advance(samples=10)
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("tokenize: 1/3 shards  10 samples (")
    assert last.startswith("tokenize: 3/3 shards  30 samples (")
    assert last.endswith("0s left")


def test_a_command_that_did_nothing_has_no_progress_line(capsys: pytest.CaptureFixture[str]):
    Progress("tokenize", total=0, unit="shards").close()
    assert capsys.readouterr().out == ""


def test_messages_carry_the_command_and_shown_text_the_given_time_left(capsys: pytest.CaptureFixture[str]):
    progress = Progress("train", total=100, unit="steps", done=40)
    progress.say("resuming from the checkpoint of step 40")
    progress.show("loss 0.5", left_s=80)
    assert capsys.readouterr().out.splitlines() == [
        "train: resuming from the checkpoint of step 40",
        "train: 40/100 steps  loss 0.5  1m20s left",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(7, "7s"), (80, "1m20s"), (4000, "1h06m")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_a_lap_adds_the_time_since_the_last_one_to_its_stage(monkeypatch: pytest.MonkeyPatch):
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    watch = Stopwatch()
    for stage in ("read", "encode", "read"):
        watch.lap(stage)
    assert watch.seconds == {"read": 5.0, "encode": 2.0}


@pytest.mark.parametrize(("total", "last"), [(0, "pack: 3 shards"), (3, "pack: 3/3 shards    0s left")])
def test_a_command_that_takes_long_says_how_far_it_is(
    total: int, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("jobs.reports.progress.LOG_EVERY_S", 0.0)
    assert list(counted("pack", iter("abc"), "shards", total)) == ["a", "b", "c"]
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_command_that_is_fast_says_nothing(capsys: pytest.CaptureFixture[str]):
    assert list(counted("pack", iter("abc"), "shards")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
