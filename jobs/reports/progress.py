"""The progress line that every command shows."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from jobs.reports.terminal import erase_line

T = TypeVar("T")
LOG_EVERY_S = 10.0


class Progress:
    """A line that a terminal updates in place; a log file gets it every 10 s. Starts with `done` of `total` units."""

    def __init__(self, command: str, total: int, unit: str, done: int = 0):
        self.command, self.total, self.unit, self.done = command, total, unit, done
        self.sums: dict[str, float] = {}
        self._start, self._done_at_start = time.monotonic(), done
        self._is_terminal = sys.stdout.isatty()
        self._line = self._printed_line = ""
        self._printed_at = -LOG_EVERY_S

    def advance(self, by: int = 1, **amounts: float) -> None:
        """Counts units, and further amounts, which the line shows as totals and rates."""
        self.done += by
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0) + amount
        elapsed = max(time.monotonic() - self._start, 1e-9)
        self.show("  ".join(f"{amount:.0f} {name} ({amount / elapsed:.0f}/s)" for name, amount in self.sums.items()))

    def show(self, text: str, left_s: float | None = None) -> None:
        """Puts the text into the line. left_s: the time left, where the caller knows it better than an average."""
        now = time.monotonic()
        if left_s is None:
            s_per_unit = (now - self._start) / max(self.done - self._done_at_start, 1)
            left_s = s_per_unit * (self.total - self.done)
        self._line = f"{self.command}: {self.done}/{self.total} {self.unit}  {text}  {clock(left_s)} left"
        if not self.total:
            self._line = f"{self.command}: {self.done} {self.unit}  {text}".rstrip()
        if self._is_terminal or now - self._printed_at >= LOG_EVERY_S:
            self._print()

    def say(self, message: str) -> None:
        """Prints a message on a line of its own, above the progress line."""
        if self._is_terminal:
            erase_line()
        print(f"{self.command}: {message}", flush=True)

    def close(self) -> None:
        """Leaves the last line on the screen or in the log."""
        if self._line != self._printed_line:
            self._print()
        if self._is_terminal and self._line:
            print()

    def _print(self) -> None:
        if self._is_terminal:
            erase_line()
        print(self._line, end="" if self._is_terminal else "\n", flush=True)
        self._printed_line, self._printed_at = self._line, time.monotonic()


def counted(command: str, items: Iterable[T], unit: str, total: int = 0) -> Iterator[T]:
    """The items. After LOG_EVERY_S, a progress line says how many there were; total: 0 if it is not known."""
    progress: Progress | None = None
    start = time.monotonic()
    for number, item in enumerate(items):
        yield item
        if progress is None and time.monotonic() - start >= LOG_EVERY_S:
            progress = Progress(command, total, unit, done=number)
        if progress is not None:
            progress.advance()
    if progress is not None:
        progress.close()


def clock(seconds: float) -> str:
    """7 -> 7s, 80 -> 1m20s, 4000 -> 1h06m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
