"""Blocks of several packed datasets in one stream, drawn by weight."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.errors import OutputMismatch
from pipeline.sequences.packed import Packed
from pipeline.tokens.processes import IterableDataset, SharedCalls, states_in, worker_of


def mix(parts: Sequence[Packed], weights: Sequence[float], *, seed: int = 0) -> "Mixed":
    """`Mixed(parts, weights, seed=seed)`."""
    return Mixed(parts, weights, seed=seed)


class Mixed(IterableDataset):  # type: ignore[type-arg]
    """Blocks of the parts, each with the number of its part as `part`. The next block is of part i with a probability
    proportional to weights[i].

    One pass is one epoch of every part: a part that has ended is no longer drawn, until all have ended. To repeat a
    small part more often, name it several times, with different seeds. The draws are a function of seed, epoch, stream
    and number of the block. state_dict, load_state_dict and set_epoch are like those of Packed.

    Raises ValueError if weights are missing or not above 0, if blocks differ in length, and if parts of different
    tokenizers share token numbers.
    """

    def __init__(self, parts: Sequence[Packed], weights: Sequence[float], *, seed: int = 0):
        if not parts or len(parts) != len(weights) or min(weights) <= 0:
            raise ValueError(f"weights are {list(weights)}; each of the {len(parts)} parts needs one, above 0")
        if len({part.block for part in parts}) > 1:
            raise ValueError(f"the parts have blocks of {[part.block for part in parts]} tokens; they must be equal")
        _refuse_shared_codes(parts)
        self.parts, self.seed = list(parts), seed
        self.weights = np.array(weights, float) / sum(weights)
        self.epoch = 0
        self._drawn = 0  # blocks of the epoch
        self._calls = SharedCalls()

    @property
    def vocab_size(self) -> int:
        return max(part.vocab_size for part in self.parts)

    def set_epoch(self, epoch: int) -> None:
        """Starts the given epoch of every part; also in persistent workers of a DataLoader."""
        self.epoch, self._drawn = epoch, 0
        for part in self.parts:
            part.set_epoch(epoch)
        if not worker_of()[1]:
            self._calls.call(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict needs. Raises OutputMismatch where only the workers of a DataLoader know it."""
        parts = [part.state_dict() for part in self.parts]
        return {"mixed": parts, "epoch": self.epoch, "drawn": self._drawn, **self._identity()}

    def load_state_dict(self, state: dict[str, Any] | Sequence[Any]) -> None:
        """Continues after the blocks that were yielded before the state was saved: one state for the same stream, or
        the list of the states of all streams. Raises OutputMismatch like Packed."""
        one_stream = isinstance(state, dict) and "mixed" in state
        states = list(states_in(state, {"mixed", "drawn"}))
        if not states:
            raise OutputMismatch("the list of states is empty")
        for one in states:
            for name, value in self._identity().items():
                if one[name] != value:
                    raise OutputMismatch(f"the state was saved with {name}={one[name]}; this one has {name}={value}")
        for i, part in enumerate(self.parts):
            part.load_state_dict(states[0]["mixed"][i] if one_stream else [one["mixed"][i] for one in states])
        self.epoch = min(one["epoch"] for one in states)
        self._drawn = sum(one["drawn"] for one in states if one["epoch"] == self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"weights": self.weights.tolist(), "mix_seed": self.seed}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not worker_of()[1]:
            self._calls.read_here()
        elif (heard := self._calls.hear()) is not None:
            self.set_epoch(heard)
        # a part that is an epoch ahead ended before the state was saved
        live = {i: iter(part) for i, part in enumerate(self.parts) if part.epoch <= self.epoch}
        while live:
            i = self._draw(list(live))
            block = next(live[i], None)
            if block is None:
                del live[i]
                continue
            self._drawn += 1
            yield {**block, "part": i}
        self.epoch, self._drawn = self.epoch + 1, 0

    def _draw(self, live: list[int]) -> int:
        """Which of the parts gives the next block."""
        stream, _ = self.parts[0].stream()
        rng = np.random.default_rng([self.seed, self.epoch, stream, self._drawn])
        weights = self.weights[live]
        return live[int(rng.choice(len(live), p=weights / weights.sum()))]


def _refuse_shared_codes(parts: Sequence[Packed]) -> None:
    ranges = sorted({(part.codes.start, part.codes.stop, part.dataset.layout.tokenizer_id) for part in parts})
    for (start, stop, tokenizer), (other_start, other_stop, other) in itertools.pairwise(ranges):
        if other_start < stop and tokenizer != other:
            raise ValueError(
                f"tokenizers {tokenizer} and {other} share token numbers: {start}..{stop - 1} and {other_start}.."
                f"{other_stop - 1}; pack the second one with offset={stop}"
            )
