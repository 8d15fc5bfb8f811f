"""Rows of token shards as blocks of one length, for training language models."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.corpus.batches import prefetch
from pipeline.errors import OutputMismatch
from pipeline.sequences.fit import FITS, Piece, best_fit, concatenated
from pipeline.sequences.orders import check_order, flatten, num_codebooks, sequence_length, unflatten
from pipeline.sequences.shares import Span, Spans, advanced, left_by_epoch, share
from pipeline.sequences.vocabulary import Vocabulary
from pipeline.tokens.dataset import HINTS, TokenDataset
from pipeline.tokens.processes import IterableDataset, SharedCalls, states_in, worker_of
from pipeline.tokens.rows import Rows

Condition = Callable[[dict[str, Any]], Sequence[int]]


def pack(dataset: TokenDataset, block: int, **settings: Any) -> "Packed":
    """`Packed(dataset, block, **settings)`."""
    return Packed(dataset, block, **settings)


class Packed(IterableDataset):  # type: ignore[type-arg]
    """Blocks of `block` tokens. Each is a dict of int64 arrays [block]:

    tokens     the tokens of one or several documents, then `pad` (0 if it is not given).
    documents  0 for the tokens of the first document of the block, 1 for those of the second, ...; -1 for padding.
               Tokens may attend to each other only where it is equal.
    positions  the place of the token in its document.

    The next token of place i counts in a loss if documents[i + 1] == documents[i] >= 0.

    A document is: the condition, `bos` if given, the row's codes in `order` (see `orders`) plus `offset`, and `eos` if
    given. condition: the name of an integer column of the dataset, whose value plus condition_offset becomes one token,
    or a function from a row to any number of token ids. condition_size: the number of ids of conditions, from
    condition_offset on; vocab_size needs it.

    fit: "best" cuts only documents that are longer than a block (best-fit packing); with split=False it refuses them.
    "concat" puts one after another and cuts at the end of each block, so there is almost no padding. The positions of
    what was cut off continue those before the cut. Both work within windows of rows: those that the dataset
    shuffles, or `rows` rows without shuffling. With shuffling, the blocks of a window are shuffled too.

    Windows are split among ranks and DataLoader workers (those of the dataset). If there are few, several streams read
    a window, and each gives other blocks of it. One pass is one epoch; streams may get different numbers of blocks, so
    train by steps with `while True: for item in packed`. A stream that has no block in an epoch warns. state_dict,
    load_state_dict and set_epoch are like those of TokenDataset: one state continues the same stream, and the list of
    the states of all streams continues with any other number of them.

    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        block: int,
        *,
        bos: int | None = None,
        eos: int | None = None,
        offset: int = 0,
        order: str = "raster",
        pad: int | None = None,
        condition: str | Condition | None = None,
        condition_offset: int = 0,
        condition_size: int = 0,
        fit: str = "best",
        split: bool = True,
        rows: int = 8192,
    ):
        check_order(order)
        if fit not in FITS:
            raise ValueError(f"fit is {fit!r}; choose one of: {', '.join(FITS)}")
        if fit == "concat" and not split:
            raise ValueError("split is False, and fit is 'concat', which splits documents; choose fit='best'")
        if block < 1 or rows < 1 or condition_size < 0:
            sizes = f"block is {block}, rows {rows}, condition_size {condition_size}"
            raise ValueError(f"{sizes}; they must be at least 1, 1 and 0")
        if dataset.layout.holds_latents:
            raise ValueError(f"{dataset.output.url} holds latents, not tokens")
        if isinstance(condition, str) and condition not in dataset.columns:
            raise ValueError(f"condition is {condition!r}; open the dataset with columns=({condition!r},)")
        if order == "delayed" and pad is None:
            raise ValueError("the order delayed needs pad=, the token of places without a code")
        if dataset.equal_length:
            raise ValueError("equal_length is for rows; ranks get different numbers of blocks, so train by steps")
        self.dataset, self.block, self.bos, self.eos, self.offset = dataset, block, bos, eos, offset
        self.order, self.pad, self.condition, self.condition_offset = order, pad, condition, condition_offset
        self.condition_size, self.fit, self.split = condition_size, fit, split
        self.rows = dataset.window or rows
        self.codebooks = self._count_codebooks()
        self.vocabulary = Vocabulary(
            range(offset, offset + self.codebooks * dataset.layout.codebook_size),
            range(condition_offset, condition_offset + condition_size),
            *(bos, eos, pad),
            pad_in_documents=order == "delayed",
        )
        self.epoch = 0
        self._yielded = self._padding = 0  # tokens
        self._plan: Spans | None = None  # what the pass that has begun reads
        self._at = (0, 0)  # windows of the plan that are read, blocks of the next one that were yielded
        self._resumed: dict[int, Spans] = {}  # what this stream has left, by epoch, from its own state
        self._resumed_by: tuple[int, int] | None = None  # stream, streams of that state
        self._left: dict[int, Spans] = {}  # what all streams together have left, by epoch
        self._is_over = False  # whether a worker has ended its pass and not begun the next one
        self._calls = SharedCalls()

    @property
    def num_windows(self) -> int:
        return -(-self.dataset.num_rows // self.rows)

    @property
    def vocab_size(self) -> int:
        """The size of an embedding for all tokens: one more than the largest id.

        Raises ValueError if there is a condition without condition_size.
        """
        if self.condition is not None and not self.condition_size:
            raise ValueError(
                "condition_size is not given, so the largest id is not known; give the number of classes, or of the "
                "ids that the function can return from condition_offset on"
            )
        return self.vocabulary.size

    @property
    def waste(self) -> float:
        """Share of padding in the blocks that this object has yielded in this process."""
        return self._padding / max(1, self._yielded)

    def expected_waste(self) -> float:
        """Share of padding in all blocks of the first epoch. Reads all rows."""
        blocks = padding = 0
        for window in range(self.num_windows):
            packed = self._packed(self._lengths(window))
            blocks += len(packed)
            padding += sum(self.block - sum(p.stop - p.start for p in pieces) for pieces in packed)
        return padding / max(1, blocks * self.block)

    def grid(self, document: np.ndarray | Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The tokens of one document, such as a model samples, as `Tokenizer.decode` takes them: int64 of this shape.

        What is before the first code and after the last one is left out: conditions, begin, end and pad tokens. Raises
        ValueError if the codes do not fill the shape, or if one is not of the codebook of its place.
        """
        tokens = np.asarray(document, np.int64)
        places = np.flatnonzero((tokens >= self.offset) & (tokens < self.vocabulary.codes.stop))
        codes = tokens[places[0] : places[-1] + 1] if len(places) else tokens[:0]
        size = self.dataset.layout.codebook_size
        return unflatten(codes - self.offset, shape, self.codebooks, size, self.order)

    def set_epoch(self, epoch: int) -> None:
        """Starts the given epoch at its first block; also in persistent workers of a DataLoader."""
        self._start(epoch)
        if not worker_of()[1]:
            self._calls.send(epoch)

    def _start(self, epoch: int) -> None:
        self.epoch, self._plan, self._at = epoch, None, (0, 0)
        self._resumed, self._resumed_by, self._left = {}, None, {}
        self._is_over = False

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict needs. Raises OutputMismatch where only the workers of a DataLoader know it."""
        if not worker_of()[1] and self._calls.read_by_workers():
            raise OutputMismatch(
                "the workers of a DataLoader read the blocks, so this copy does not know the position; use torchdata's "
                "StatefulDataLoader, or num_workers=0"
            )
        stream, streams = self.stream()
        left = self._planned(self.epoch) if self._plan is None else advanced(self._plan, *self._at)
        later = {epoch: self._planned(epoch) for epoch in {*self._left, *self._resumed} if epoch > self.epoch}
        return {
            "epoch": self.epoch,
            "left": [list(span) for span in left],
            "later": {str(epoch): [list(span) for span in spans] for epoch, spans in later.items()},
            "stream": stream,
            "streams": streams,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any] | Sequence[Any]) -> None:
        """Continues after the blocks that were yielded before the state was saved.

        One state continues the same stream of as many. A list of the states of all streams, which may be those of
        torchdata's StatefulDataLoader, continues with any number of streams. Raises OutputMismatch if the blocks would
        not be those of the saved run, and if the list lacks a stream.
        """
        if isinstance(state, dict) and "left" in state:
            self._check_identity(state)
            self._start(state["epoch"])
            self._resumed = {int(epoch): _spans(spans) for epoch, spans in state["later"].items()}
            self._resumed[self.epoch] = _spans(state["left"])
            self._resumed_by = (state["stream"], state["streams"])
            return
        states = list(states_in(state, {"left", "later", "stream"}))
        for one in states:
            self._check_identity(one)
        found = sorted(one["stream"] for one in states)
        if not states or found != list(range(states[0]["streams"])):
            count = states[0]["streams"] if states else "all"
            raise OutputMismatch(f"the list must hold one state for each of {count} streams; it holds those of {found}")
        left = left_by_epoch(states, self.num_windows)
        self._start(min(left))
        self._left = left

    def _check_identity(self, state: dict[str, Any]) -> None:
        for name, value in self._identity().items():
            saved = state.get(name, value) if name == "files" else state.get(name)  # older states do not have them
            if saved != value:
                raise OutputMismatch(
                    f"the state was saved with {name}={saved}; this one has {name}={value}{HINTS.get(name, '')}"
                )

    def _identity(self) -> dict[str, Any]:
        dataset = self.dataset
        condition = self.condition if self.condition is None or isinstance(self.condition, str) else "a function"
        return {
            "tokenizer_id": dataset.layout.tokenizer_id,
            "num_rows": dataset.num_rows,
            "files": dataset.files_id,
            "seed": dataset.seed,
            "shuffle_window": dataset.window,
            "rows": self.rows,
            "block": self.block,
            "bos": self.bos,
            "eos": self.eos,
            "offset": self.offset,
            "order": self.order,
            "pad": self.pad,
            "fit": self.fit,
            "condition": condition,
            "condition_offset": self.condition_offset,
            "condition_size": self.condition_size,
            "split": self.split,
        }

    # -- iteration ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        plan, epoch, is_new = self._begin(), self.epoch, not (self._resumed or self._left)
        windows = [(window, span) for span in plan for window in range(span.start, span.stop)]
        before = self._yielded
        blocks = prefetch(self._of_windows([window for window, _ in windows], epoch), 1)
        for number, ((_, span), of_window) in enumerate(zip(windows, blocks, strict=True)):
            for count, block in enumerate(of_window[span.first :: span.step], 1):
                self._at = (number, count)
                self._yielded += self.block
                self._padding += int((block["documents"] < 0).sum())
                yield block
        if is_new and self._yielded == before and self.dataset.num_rows:
            stream, streams = self.stream()
            warnings.warn(
                f"stream {stream} of {streams} (ranks times DataLoader workers) has no block in epoch {epoch}: there "
                "are hardly more blocks than streams; use fewer workers or ranks, or smaller blocks",
                stacklevel=2,
            )
        self._finish()

    def _of_windows(self, windows: Sequence[int], epoch: int) -> Iterator[list[dict[str, np.ndarray]]]:
        """The blocks of each of the windows. Reads a window once if it is named several times in a row."""
        for window, same in itertools.groupby(windows):
            blocks = self._blocks(window, epoch)
            yield from (blocks for _ in same)

    def _begin(self) -> Spans:
        """Begins a pass. Returns what it reads."""
        if not worker_of()[1]:
            self._calls.read_here()
        elif (received := self._calls.receive()) is not None:
            self._start(received)
        elif self._is_over:
            self._next_epoch()
        self._plan, self._at = self._planned(self.epoch), (0, 0)
        return self._plan

    def _finish(self) -> None:
        """Ends a pass. In a worker of a DataLoader the epoch goes on until all its workers have ended: the state then
        says that nothing is left of it."""
        if worker_of()[1]:
            self._is_over, self._at = True, (sum(span.stop - span.start for span in self._plan or ()), 0)
        else:
            self._next_epoch()

    def _next_epoch(self) -> None:
        """What later epochs have left stays planned."""
        self.epoch, self._plan, self._at, self._is_over = self.epoch + 1, None, (0, 0), False

    def has_ended(self, epoch: int) -> bool:
        """Whether this stream has read all of an epoch, or nothing is left of it in the state that it loaded."""
        nothing_left = self._resumed.get(epoch) == [] or self._left.get(epoch) == []
        return self.epoch > epoch or (self.epoch == epoch and (self._is_over or nothing_left))

    def _planned(self, epoch: int) -> Spans:
        """What this stream reads in an epoch that it has not begun."""
        stream, streams = self.stream()
        if self._resumed_by not in (None, (stream, streams)):
            raise OutputMismatch(
                "the state belongs to stream {} of {} (ranks times DataLoader workers), ".format(
                    *self._resumed_by or ()
                )
                + f"this is {stream} of {streams}; give the states of all streams as a list"
            )
        if epoch in self._resumed:
            return self._resumed[epoch]
        return share(self._left.get(epoch, [Span(0, self.num_windows)]), stream, streams)

    def stream(self) -> tuple[int, int]:
        """The number of this stream, and how many there are: DataLoader workers times ranks."""
        worker, workers = worker_of()
        workers = max(1, workers)
        return self.dataset.rank * workers + worker, self.dataset.world_size * workers

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _blocks(self, window: int, epoch: int) -> list[dict[str, np.ndarray]]:
        """All blocks of a window: a pure function of the dataset, the settings and the epoch."""
        documents = [self._document(rows, i) for rows in [self._rows(window, epoch)] for i in range(len(rows))]
        packed = self._packed([len(one) for one in documents])
        blocks = [self._block(pieces, documents) for pieces in packed]
        if not self.dataset.window:
            return blocks
        order = np.random.default_rng([self.dataset.seed, epoch, window, 1]).permutation(len(blocks))
        return [blocks[i] for i in order]

    def _rows(self, window: int, epoch: int) -> Rows:
        low = window * self.rows
        return self.dataset.in_order(epoch, low, min(low + self.rows, self.dataset.num_rows))

    def _packed(self, lengths: Sequence[int]) -> list[list[Piece]]:
        return (best_fit if self.fit == "best" else concatenated)(lengths, self.block)

    def _block(self, pieces: list[Piece], documents: list[np.ndarray]) -> dict[str, np.ndarray]:
        tokens = np.full(self.block, self.pad or 0, np.int64)
        numbers, positions = np.full(self.block, -1, np.int64), np.zeros(self.block, np.int64)
        start = 0
        for number, piece in enumerate(pieces):
            place = slice(start, start + piece.stop - piece.start)
            tokens[place] = documents[piece.document][piece.start : piece.stop]
            numbers[place], positions[place] = number, np.arange(piece.start, piece.stop)
            start = place.stop
        return {"tokens": tokens, "documents": numbers, "positions": positions}

    def _document(self, rows: Rows, i: int) -> np.ndarray:
        row = rows.row(i)
        tokens = self._tokens(row)
        if len(tokens) > self.block and not self.split:
            raise ValueError(
                f"row {row['key']} has {len(tokens)} tokens, and block is {self.block}; choose a block of at least "
                f"{len(tokens)}, or split=True"
            )
        return tokens

    def _tokens(self, row: dict[str, Any]) -> np.ndarray:
        codes = flatten(row["tokens"], self.codebooks, self.dataset.layout.codebook_size, self.order)
        codes = np.where(codes < 0, self.pad or 0, codes + self.offset)
        before = [*self._condition(row), *([] if self.bos is None else [self.bos])]
        after = [] if self.eos is None else [self.eos]
        return np.concatenate([np.array(before, np.int64), codes, np.array(after, np.int64)])

    def _condition(self, row: dict[str, Any]) -> list[int]:
        if self.condition is None:
            return []
        if isinstance(self.condition, str):
            value = row[self.condition]
            if not isinstance(value, int | str) or not str(value).strip().isdecimal():
                raise ValueError(f"{self.condition} of row {row['key']} is {value!r}; a condition is an integer")
            tokens = [int(value) + self.condition_offset]
        else:
            tokens = [int(token) for token in self.condition(row)]
        for token in tokens:
            self.vocabulary.check_condition(token, row["key"], is_class=isinstance(self.condition, str))
        return tokens

    def _lengths(self, window: int) -> list[int]:
        """Lengths of the documents of a window in the first epoch."""
        rows = self._rows(window, 0)
        extra = (self.bos is not None) + (self.eos is not None) + isinstance(self.condition, str)
        lengths = [sequence_length(int(n), self.codebooks, self.order) + extra for n in np.diff(rows.offsets)]
        if callable(self.condition):
            lengths = [n + len(self._condition(rows.row(i))) for i, n in enumerate(lengths)]
        return lengths

    def _count_codebooks(self) -> int:
        if not self.dataset.num_rows:
            return 1
        return num_codebooks(self.dataset[0]["tokens"].shape, self.dataset.layout.modality)


def _spans(spans: list[list[int]]) -> Spans:
    return [Span(*span) for span in spans]
