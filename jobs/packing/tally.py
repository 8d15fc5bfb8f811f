"""What `pack` skipped or wants the user to know about its samples."""

from jobs.packing.names import printable


class Tally:
    """Counts by reason, with the first example."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._examples.setdefault(reason, printable(example))

    def skip(self, reason: str, example: str) -> None:
        """Counts something that is not packed."""
        self.add(f"skipped {reason}", example)

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first."""
        ordered = sorted(self._counts, key=lambda reason: (-self._counts[reason], reason))
        return [f"{reason}: {self._counts[reason]}, such as {self._examples[reason]}" for reason in ordered]
