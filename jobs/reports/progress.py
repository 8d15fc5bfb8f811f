"""One live line on a terminal, a line now and then in a log file."""

import sys
import time

LOG_EVERY_S = 10.0


class Progress:
    """Counts units done and what else is told, with rates per second and the time left."""

    def __init__(self, name: str, total: int, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.sums: dict[str, float] = {}
        self.start = self.last = time.monotonic()
        self.live = sys.stdout.isatty()

    def advance(self, by: int = 1, **amounts: float) -> None:
        self.done += by
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0) + amount
        now = time.monotonic()
        if self.live or now - self.last > LOG_EVERY_S:
            self.last = now
            self._print(now)

    def _print(self, now: float) -> None:
        elapsed = max(now - self.start, 1e-9)
        left = elapsed / max(self.done, 1) * (self.total - self.done)
        rates = "  ".join(f"{amount:.0f} {name} ({amount / elapsed:.0f}/s)" for name, amount in self.sums.items())
        line = f"{self.name}: {self.done}/{self.total} {self.unit}  {rates}  {clock(left)} left"
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    def close(self) -> None:
        self._print(time.monotonic())
        if self.live:
            print()


def clock(seconds: float) -> str:
    """7 -> 7s, 80 -> 1m20s, 4000 -> 1h06m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
