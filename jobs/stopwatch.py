"""Measures where a loop spends its time."""

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds by stage. `lap(stage)` adds the time since the last lap to that stage.

    synchronize: waits for the device. Without it, work on a GPU counts towards the stage in which the CPU waits for it.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        self._synchronize()
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
