"""Blocks of several packed datasets in one stream, drawn by weight."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import OutputMismatch
from pipeline.sequences.packed import Packed
from pipeline.sequences.vocabulary import ids, overlap
from pipeline.tokens.processes import IterableDataset, SharedCalls, states_in, worker_of


def mix(parts: Sequence[Packed], weights: Sequence[float], *, seed: int = 0, repeat: bool = False) -> "Mixed":
    """`Mixed(parts, weights, seed=seed, repeat=repeat)`."""
    return Mixed(parts, weights, seed=seed, repeat=repeat)


class Mixed(IterableDataset):  # type: ignore[type-arg]
    """Blocks of the parts, each with the number of its part as `part`. The next block is of part i with a probability
    proportional to weights[i].

    One pass is one epoch of every part: a part that has ended is no longer drawn, until all have ended. With repeat, a
    part that has ended starts its next epoch, so that the weights always hold and the pass never ends; `epochs` counts
    the epochs of each part. The draws are a function of seed, epoch, stream and number of the block. state_dict,
    load_state_dict and set_epoch are like those of Packed. The parts belong to the mix, which starts them at epoch 0.

    Raises ValueError if weights are missing or not above 0, if blocks differ in length, if parts have different ranks,
    if a part is named twice, and if a token has two meanings: codes of one part may only be codes of the same tokenizer
    in another, conditions only the same range of conditions, and bos, eos and pad only themselves. With repeat, a
    stream for which a part has no blocks raises ValueError as well.
    """

    def __init__(self, parts: Sequence[Packed], weights: Sequence[float], *, seed: int = 0, repeat: bool = False):
        if not parts or len(parts) != len(weights) or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"weights are {list(weights)}; each of the {len(parts)} parts needs one, above 0")
        if len({part.block for part in parts}) > 1:
            raise ValueError(f"the parts have blocks of {[part.block for part in parts]} tokens; they must be equal")
        if len({id(part) for part in parts}) < len(parts):
            raise ValueError("a part is named twice, so its blocks would be too; name it once, with a larger weight")
        if len(places := {(part.dataset.rank, part.dataset.world_size) for part in parts}) > 1:
            raise ValueError(f"the parts have (rank, world_size) {sorted(places)}; open all datasets with the same")
        _refuse_shared_tokens(parts)
        self.parts, self.seed, self.repeat = list(parts), seed, repeat
        self.weights = np.array(weights, float) / sum(weights)
        self.epoch = 0
        self._drawn = 0  # blocks of the epoch
        self._is_over = False  # whether a worker has ended its pass and not begun the next one
        self._calls = SharedCalls()
        for part in parts:
            part.set_epoch(0)  # a part that was read before would count as one that has ended

    @property
    def vocab_size(self) -> int:
        return max(part.vocab_size for part in self.parts)

    @property
    def epochs(self) -> list[int]:
        """The epoch that this stream reads in each part."""
        return [part.epoch for part in self.parts]

    def set_epoch(self, epoch: int) -> None:
        """Starts the given epoch of every part; also in persistent workers of a DataLoader."""
        self.epoch, self._drawn, self._is_over = epoch, 0, False
        for part in self.parts:
            part.set_epoch(epoch)
        if not worker_of()[1]:
            self._calls.send(epoch)

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
                if (saved := one.get(name)) != value:
                    raise OutputMismatch(f"the state was saved with {name}={saved}; this one has {name}={value}")
        for i, part in enumerate(self.parts):
            part.load_state_dict(states[0]["mixed"][i] if one_stream else [one["mixed"][i] for one in states])
        self._is_over = False
        self.epoch = min(one["epoch"] for one in states)
        self._drawn = sum(one["drawn"] for one in states if one["epoch"] == self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"weights": self.weights.tolist(), "mix_seed": self.seed, "repeat": self.repeat}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not worker_of()[1]:
            self._calls.read_here()
        elif (received := self._calls.receive()) is not None:
            self.set_epoch(received)
        elif self._is_over:
            self._next_epoch()
        live = {i: iter(part) for i, part in enumerate(self.parts) if self.repeat or not part.has_ended(self.epoch)}
        while live:
            i = self._draw(list(live))
            block = next(live[i], None)
            if block is None and self.repeat:
                block = self._repeat(i, live)
            if block is None:
                del live[i]
                continue
            self._drawn += 1
            yield {**block, "part": i}
        if worker_of()[1]:
            self._is_over = True  # until the next pass: see Packed
        else:
            self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch, self._drawn, self._is_over = self.epoch + 1, 0, False

    def _repeat(self, i: int, live: dict[int, Iterator[dict[str, Any]]]) -> dict[str, Any]:
        """The first block of the next epoch of a part. What was left of a resumed epoch may have been nothing."""
        for _ in range(2):
            live[i] = iter(self.parts[i])
            if block := next(live[i], None):
                return block
        stream, streams = self.parts[i].stream()
        raise ValueError(
            f"part {i} has no block for stream {stream} of {streams} (ranks times DataLoader workers), so it cannot be "
            "repeated; use fewer workers or ranks, or smaller blocks"
        )

    def _draw(self, live: list[int]) -> int:
        """Which of the parts gives the next block."""
        stream, _ = self.parts[0].stream()
        rng = np.random.default_rng([self.seed, self.epoch, stream, self._drawn])
        weights = self.weights[live]
        return live[int(rng.choice(len(live), p=weights / weights.sum()))]


def _refuse_shared_tokens(parts: Sequence[Packed]) -> None:
    """Raises ValueError if a token of a part is something else in another part."""
    for number, part in enumerate(parts):
        if len(parts) > 1 and part.condition is not None and not part.condition_size:
            raise ValueError(
                f"part {number} has a condition without condition_size, so its token numbers are not known; give the "
                "number of classes, or of the ids that the function can return from condition_offset on"
            )
    free = max(part.vocabulary.size for part in parts)
    for (i, one), (j, other) in itertools.combinations(enumerate(parts), 2):
        for mine, theirs in itertools.product(_meanings(one), _meanings(other)):
            if overlap(mine.ids, theirs.ids) and not mine.meaning & theirs.meaning:
                raise ValueError(
                    f"token numbers have two meanings: the {mine} of part {i} and the {theirs} of part {j}; pack part "
                    f"{j} with offset={free}, or choose other ids for conditions and special tokens"
                )


class _Tokens(NamedTuple):
    """Token ids of a part. Those of two parts may overlap if their meanings have something in common."""

    kind: str
    ids: range
    meaning: set[Any]

    def __str__(self) -> str:
        return f"{self.kind} {ids(self.ids)}" if len(self.ids) > 1 else f"{self.kind} {self.ids.start}"


def _meanings(part: Packed) -> list[_Tokens]:
    known, specials = part.vocabulary, part.vocabulary.specials
    found = [_Tokens("codes", known.codes, {(part.dataset.layout.tokenizer_id, known.codes)})]
    if known.conditions:
        found.append(_Tokens("conditions", known.conditions, {("conditions", known.conditions)}))
    for name, token in specials.items():
        same = {other for other, value in specials.items() if value == token}  # bos and eos may be one token
        found.append(_Tokens(name, range(token, token + 1), same))
    return found
