"""Reads token shards for training: sharded, shuffled and resumable. Needs no ray, and no torch.

If torch is installed, TokenDataset is a torch IterableDataset.

The rows of all committed shards form one sequence; with shuffling, the shards are permuted by (seed, epoch). The
sequence is split into consecutive parts, one per stream (ranks times DataLoader workers), and their lengths differ by
at most one row. Each stream permutes `shuffle_window` rows at a time; 0 reads everything in order.

What is left of an epoch is a list of segments: rows first..last of the order of the part start..stop. Another number
of streams continues an epoch by splitting the segments of all old streams.
"""

import bisect
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.errors import BrokenOutput, OutputMismatch, StorageError, UnsupportedSchema
from pipeline.tokens.commit import shard_name
from pipeline.tokens.output import REPAIR_AND_RERUN, Output
from pipeline.tokens.schema import ShardLayout, check_schema_version, read_parquet, tokens_as_lists


class Segment(NamedTuple):
    """Rows first..last of the order in which a stream reads the rows start..stop of the epoch's sequence."""

    start: int
    stop: int
    first: int
    last: int


try:  # torch's DataLoader treats every other class as a map-style dataset
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError:
    IterableDataset = object  # type: ignore[assignment, misc]

    def get_worker_info() -> None:  # type: ignore[misc]
        return None


class TokenDataset(IterableDataset):  # type: ignore[misc]
    """Yields rows as dicts: `tokens` (integers in the shape of the token grid), `key`, and the requested `columns`.

    tokenizer_id: if given, shards of another tokenizer raise OutputMismatch. equal_length: gives every rank the same
    number of rows by skipping up to world_size - 1 rows. Raises UnsupportedSchema if a newer version wrote the output.
    Reading raises BrokenOutput, with the file's name, for a damaged file and for tokens outside the codebook.

    rank, world_size: by default those of torch.distributed if it is initialised, else the variables RANK and WORLD_SIZE
    of the environment, else 0 and 1.

    One pass is one epoch, and the next pass uses the order of the next epoch. DataLoader workers read in copies of
    the dataset that do not count epochs: call `set_epoch` before each epoch there; it also reaches persistent workers.
    state_dict says what this stream has yielded; load_state_dict resumes right after it. With DataLoader workers use
    torchdata's StatefulDataLoader, which stores the state of each worker; beside another DataLoader with workers,
    state_dict raises OutputMismatch.

    `dataset[i]`, `take` and `find` read single rows of the whole output, whatever the rank: row i in the order without
    shuffling, 0 <= i < num_rows.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer_id: str | None = None,
        columns: tuple[str, ...] = (),
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle_window: int = 0,
        equal_length: bool = False,
    ):
        own_rank, own_size = _place()
        rank, world_size = own_rank if rank is None else rank, own_size if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in 0..{world_size - 1}, below world_size")
        self.output = Output.open(url)
        self.layout = self.output.layout
        if unknown := [name for name in columns if name not in self.layout.schema("").names]:
            raise ValueError(f"columns: {unknown[0]!r} is not in {url}; choose from {self.layout.schema('').names}")
        if tokenizer_id not in (None, self.layout.tokenizer_id):
            raise OutputMismatch(f"{url} was written by tokenizer {self.layout.tokenizer_id}, not by {tokenizer_id}")
        self.columns = columns
        self.rank, self.world_size = rank, world_size
        self.seed, self.window, self.equal_length = seed, shuffle_window, equal_length
        self.files = [(entry.name, entry.num_rows) for entry in self.output.commits() if entry.num_rows]
        self._num_rows = dict(self.files)
        self._checked: set[str] = set()  # names of files that fit the layout
        self.num_rows = sum(self._num_rows.values())
        self._ends = np.cumsum([rows for _, rows in self.files]).tolist()  # of each file, in rows of the output
        self.epoch = self.position = 0  # position: rows of the epoch that this stream has yielded
        self._open: tuple[str, pa.Table] | None = None  # the last file read: windows are often smaller than files
        self._plan: list[Segment] | None = None  # what the pass that has begun reads
        self._done = 0  # rows of the plan that were yielded
        self._resumed: list[Segment] | None = None  # what the next pass reads, from the state of this stream
        self._left: list[Segment] | None = None  # what the next pass of all streams together reads, from all states
        self._resumed_by: tuple[int, int] | None = None
        self._calls = _SharedCalls()

    def __len__(self) -> int:
        """Number of rows that this rank reads per epoch."""
        start, stop = self._share(self.num_rows)
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Starts the given epoch, with its own order of rows, at its first row."""
        self._start(epoch)
        if not _worker()[1]:
            self._calls.call(epoch)

    def _start(self, epoch: int) -> None:
        self.epoch, self.position, self._done = epoch, 0, 0
        self._plan = self._resumed = self._left = self._resumed_by = None

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict needs. Raises OutputMismatch where only the workers of a DataLoader know it."""
        worker, num_workers = _worker()
        if not num_workers and self._calls.read_by_workers():
            raise OutputMismatch(
                "the workers of a DataLoader read the rows, so this copy of the dataset does not know the position; "
                "use torchdata's StatefulDataLoader, or num_workers=0"
            )
        where = {"epoch": self.epoch, "position": self.position, "worker": worker, "num_workers": num_workers}
        left = self._next_plan() if self._plan is None else _skipped(self._plan, self._done)
        return {**where, **self._identity(), "left": [list(segment) for segment in left]}

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continues after the rows that were yielded before the state was saved.

        One state continues the same stream: the same rank and worker of as many. A list of the states of all ranks
        (and workers) of the saved run continues with any number of them: what is left of the epoch is split among the
        new streams. Then each rank gets the same list. It may hold the states of torchdata's StatefulDataLoader, which
        contain those of its workers.
        Raises OutputMismatch if this dataset would yield rows in a different order than the saved one, and if a state
        is missing from the list.
        """
        if isinstance(state, dict):
            self._check_identity(state, self._identity())
            self._start(state["epoch"])
            self._resumed, self._resumed_by = _left_in(state), (state["worker"], state["num_workers"])
            self.position = state["position"]
            return
        states = list(_streams_in(state))
        ours = {name: now for name, now in self._identity().items() if name not in ("rank", "world_size")}
        for one in states:
            self._check_identity(one, ours)
        _check_complete(states)
        epoch = min(one["epoch"] for one in states)
        if any(one["epoch"] > epoch and one["position"] for one in states):
            raise OutputMismatch("the states are of different epochs; save those of all ranks at the same step")
        self._start(epoch)
        self._left = [segment for one in states if one["epoch"] == epoch for segment in _left_in(one)]

    def _check_identity(self, state: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            if state[name] != value:
                hint = (
                    "; to continue with another number of ranks, give the states of all ranks as a list"
                    if name in ("rank", "world_size")
                    else ""
                )
                raise OutputMismatch(
                    f"the state was saved with {name}={state[name]}; this dataset has {name}={value}{hint}"
                )

    def _identity(self) -> dict[str, Any]:
        return {
            **{
                "tokenizer_id": self.layout.tokenizer_id,
                "equal_length": self.equal_length,
                "num_rows": self.num_rows,
                "seed": self.seed,
                "shuffle_window": self.window,
            },
            **{"rank": self.rank, "world_size": self.world_size},
        }

    # -- iteration ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        if not num_workers:
            self._calls.read_here()
        elif (epoch := self._calls.hear()) is not None:
            self._start(epoch)
        if self._resumed_by not in (None, (worker, num_workers)):
            raise OutputMismatch(
                "the state belongs to DataLoader worker {} of {}, ".format(*(self._resumed_by or ()))
                + f"this is worker {worker} of {num_workers}; resume with the same number of workers, and with "
                "torchdata's StatefulDataLoader if there are any, or give the states of all workers as a list"
            )
        if self._resumed is None:
            self.position = 0
        plan = self._plan = self._next_plan()
        self._done, self._resumed, self._left, self._resumed_by = 0, None, None, None
        sequence = self._sequence()
        for segment in plan:
            for row in itertools.islice(self._ordered(sequence, segment), segment.last - segment.first):
                self.position += 1
                self._done += 1
                yield row
        self._start(self.epoch + 1)

    def batches(self, size: int, *, pad: int = 0, drop_last: bool = False) -> Iterator[dict[str, Any]]:
        """Batches of `size` rows as numpy arrays, like `collate`. state_dict between two batches is exact.

        drop_last: leaves out the last batch of the pass if it has fewer rows.
        """
        rows = iter(self)
        while batch := list(itertools.islice(rows, size)):
            if len(batch) == size or not drop_last:
                yield stack(batch, pad)

    def _next_plan(self) -> list[Segment]:
        """What this stream reads in the pass that begins next."""
        if self._resumed is not None:
            return self._resumed
        worker, num_workers = _worker()
        left = [Segment(0, self.num_rows, 0, self.num_rows)] if self._left is None else self._left
        total = sum(segment.last - segment.first for segment in left)
        start, stop = self._share(total)
        if num_workers:
            start, stop = _split(start, stop, worker, num_workers)
        if self._left is None:
            return [Segment(start, stop, 0, stop - start)]
        return _cut(left, start, stop)

    def _ordered(self, sequence: list[tuple[str, int]], segment: Segment) -> Iterator[dict[str, Any]]:
        """The rows of a segment, without its end."""
        start, stop, first, _ = segment
        window = self.window or max(1, stop - start)
        for low in range(start + first // window * window, stop, window):
            already = max(0, start + first - low)
            yield from self._window(sequence, low, min(low + window, stop), already)

    # -- single rows ----------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, Any]:
        [row] = self.take([index])
        return row

    def take(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Rows of the whole output by their numbers, in this order. Reads each file once. Raises IndexError."""
        wanted = [int(index) for index in indices]
        for index in wanted:
            if not 0 <= index < self.num_rows:
                raise IndexError(f"row {index} of {self.num_rows}")
        files = [bisect.bisect_right(self._ends, index) for index in wanted]
        found: dict[int, dict[str, Any]] = {}
        for number in sorted(set(files)):
            name, num_rows = self.files[number]
            first = self._ends[number] - num_rows
            of_file = [index for index, file in zip(wanted, files, strict=True) if file == number]
            low, high = min(of_file), max(of_file) + 1
            rows = self._read(name, low - first, high - first)
            found.update({index: rows.row(index - low) for index in of_file})
        return [found[index] for index in wanted]

    def find(self, key: str) -> int:
        """The number of the row with this key. Reads the keys of the files until it is found.

        Keys may repeat in other shards: it is the first one. Raises KeyError.
        """
        for (name, num_rows), end in zip(self.files, self._ends, strict=True):
            if (place := pc.index(self._read_file(name)["key"], key).as_py()) >= 0:
                return end - num_rows + place
        raise KeyError(key)

    def _share(self, total: int) -> tuple[int, int]:
        """Which of `total` rows this rank reads: start..stop."""
        total = total // self.world_size * self.world_size if self.equal_length else total
        return _split(0, total, self.rank, self.world_size)

    def _sequence(self) -> list[tuple[str, int]]:
        if not self.window:
            return self.files
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.files))
        return [self.files[i] for i in order]

    def _window(self, sequence: list[tuple[str, int]], low: int, high: int, already: int) -> Iterator[dict[str, Any]]:
        """Rows low..high of the sequence, permuted when shuffling, without the first `already`."""
        pieces = _pieces(sequence, low, high)
        if not self.window:  # one file at a time in memory
            for name, first, last in pieces:
                skip = min(already, last - first)
                already -= skip
                yield from map(self._read(name, first, last).row, range(skip, last - first))
            return
        tables = [self._read(*piece) for piece in pieces]
        starts = np.cumsum([0] + [last - first for _, first, last in pieces])
        order = np.random.default_rng([self.seed, self.epoch, low]).permutation(high - low)[already:]
        which = np.searchsorted(starts, order, side="right") - 1
        for table, row in zip(which.tolist(), (order - starts[which]).tolist(), strict=True):
            yield tables[table].row(row)

    def _read(self, name: str, first: int, last: int) -> "_Rows":
        if self._open is None or self._open[0] != name:
            self._open = (name, self._read_file(name))
        return _Rows(self._open[1].slice(first, last - first), self.layout.token_dtype)

    def _read_file(self, name: str) -> pa.Table:
        """The columns of one token file. Raises BrokenOutput if the file is damaged or does not fit the layout."""
        url = self.output.tokens_url(name)
        try:
            table = self._table(url)
            if name not in self._checked:  # once: shuffling reads a file several times
                _check_rows(table, self.layout, self._num_rows[name])
                _check_shard(table, name)
                self._checked.add(name)
        except (StorageError, PermissionError, OutputMismatch):
            raise
        except FileNotFoundError as error:
            raise BrokenOutput(f"{url}: the file is missing; {REPAIR_AND_RERUN}") from error
        except (OSError, ValueError) as error:
            raise BrokenOutput(f"{url}: {error}; {REPAIR_AND_RERUN}") from error
        return table

    def _table(self, url: str) -> pa.Table:
        fs, path = storage.locate(url)
        names = list(dict.fromkeys(["tokens", "shape", "key", *self.columns]))
        local = storage.is_local(fs)
        table = read_parquet(path if local else storage.read(url), names, memory_map=local)
        footer = table.schema.metadata or {}
        writer = footer.get(b"tokenizer_id", b"").decode(errors="replace")
        if writer != self.layout.tokenizer_id:
            raise OutputMismatch(f"{url} was written by tokenizer {writer!r}, not by {self.layout.tokenizer_id}")
        version = footer.get(b"schema_version", b"1").decode(errors="replace")
        try:
            check_schema_version(int(version) if version.isdigit() else version)
        except UnsupportedSchema as error:
            raise UnsupportedSchema(f"{url}: {error}") from error
        return table


def _check_shard(table: pa.Table, name: str) -> None:
    """Raises ValueError if the table is the one of another shard than its file name says."""
    source = (table.schema.metadata or {}).get(b"source_shard", b"").decode(errors="replace")
    if Shard(source, None).name != shard_name(name):
        raise ValueError(f"it holds the rows of {source}")


def _check_rows(table: pa.Table, layout: ShardLayout, num_rows: int) -> None:
    """Raises ValueError if the table does not hold that many rows of this layout."""
    if table.num_rows != num_rows:
        raise ValueError(f"{table.num_rows} rows, the manifest says {num_rows}")
    expected = layout.schema("")
    for name in ("tokens", "shape", "key"):
        found = table.schema.field(name).type if name in table.column_names else None
        if found != expected.field(name).type:
            raise ValueError(f"column {name} is {found}, not {expected.field(name).type}")
    for column in table.columns:
        if pa.types.is_string(column.type):
            column.validate(full=True)  # bytes that are not UTF-8, which only files without page checksums can hold
    for tokens, shapes in zip(table["tokens"].chunks, table["shape"].chunks, strict=True):
        _check_grids(tokens_as_lists(tokens, layout.token_dtype), shapes, layout)


def _check_grids(tokens: pa.ListArray, shapes: pa.ListArray, layout: ShardLayout) -> None:
    """Raises ValueError unless tokens are below the size of the codebook, and as many as their shapes say."""
    values = tokens.flatten().to_numpy(zero_copy_only=False)
    if layout.codebook_size and len(values) and int(values.max()) >= layout.codebook_size:
        raise ValueError(f"token {int(values.max())} is not below {layout.codebook_size}, the size of the codebook")
    sides = shapes.flatten().to_numpy(zero_copy_only=False)
    if len(sides) and int(sides.min()) < 0:
        raise ValueError(f"a shape has the side {int(sides.min())}")
    if not np.array_equal(_products(sides, shapes), pc.list_value_length(tokens).to_numpy(zero_copy_only=False)):
        raise ValueError("a row has another number of tokens than its shape says")


def _products(sides: np.ndarray, shapes: pa.ListArray) -> np.ndarray:
    """The number of tokens of each shape. sides: those of all shapes, one after another."""
    lengths = pc.list_value_length(shapes).to_numpy(zero_copy_only=False)
    if len(set(lengths.tolist())) == 1:
        return sides.astype(np.int64).reshape(len(lengths), -1).prod(axis=1)
    return np.array([math.prod(shape) for shape in shapes.to_pylist()], np.int64)


class _Rows:
    """Some rows of one shard in memory, for access one by one."""

    def __init__(self, table: pa.Table, dtype: np.dtype):
        tokens = tokens_as_lists(table["tokens"].combine_chunks(), dtype)
        offsets = tokens.offsets.to_numpy()  # of a slice of the file, so the first offset may not be 0
        self.values = np.array(tokens.values[offsets[0] : offsets[-1]])  # a copy, because torch needs writable memory
        self.offsets = (offsets - offsets[0]).tolist()
        self.shapes = [tuple(shape) for shape in table["shape"].to_pylist()]
        self.others = {name: table[name].to_pylist() for name in table.column_names if name not in ("tokens", "shape")}

    def row(self, i: int) -> dict[str, Any]:
        tokens = self.values[self.offsets[i] : self.offsets[i + 1]].reshape(self.shapes[i])
        return {"tokens": tokens, **{name: values[i] for name, values in self.others.items()}}


class _SharedCalls:
    """Calls of set_epoch, which reach the workers of a DataLoader through memory that all processes share."""

    def __init__(self) -> None:
        self._memory: Any = None  # int64: epoch, number of calls, whether a worker reads
        self._heard = 0
        if IterableDataset is not object:
            import torch

            self._memory = torch.zeros(3, dtype=torch.int64).share_memory_()

    def call(self, epoch: int) -> None:
        if self._memory is not None:
            self._memory[0] = epoch
            self._memory[1] += 1
            self._memory[2] = 0
            self._heard = int(self._memory[1])  # also for workers that start later, as copies of this dataset

    def hear(self) -> int | None:
        """In a worker that begins to read: the epoch of a call that it has not heard, if there is one."""
        self._memory[2] = 1
        calls = int(self._memory[1])
        new, self._heard = calls > self._heard, calls
        return int(self._memory[0]) if new else None

    def read_here(self) -> None:
        if self._memory is not None:
            self._memory[2] = 0

    def read_by_workers(self) -> bool:
        return self._memory is not None and bool(self._memory[2])


def stack(rows: Sequence[dict[str, Any]], pad: int = 0) -> dict[str, Any]:
    """Rows as one batch of numpy arrays.

    tokens: int64 [B, ...], padded with `pad` at the end of each dimension to the largest shape in the batch. mask: bool
    of that shape, False for padding. Each other column: an array of its numbers, or a list of its other values.
    """
    grids = [row["tokens"] for row in rows]
    shape = tuple(np.max([grid.shape for grid in grids], axis=0).tolist())
    tokens = np.full((len(grids), *shape), pad, np.int64)
    mask = np.zeros(tokens.shape, bool)
    for i, grid in enumerate(grids):
        place = tuple(slice(side) for side in grid.shape)
        tokens[i][place], mask[i][place] = grid, True
    others = {name: [row[name] for row in rows] for name in rows[0] if name != "tokens"}
    numbers = {name: np.array(values) for name, values in others.items() if all(map(_is_number, values))}
    return {"tokens": tokens, "mask": mask, **others, **numbers}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`DataLoader(dataset, batch_size=8, collate_fn=collate)`: like `stack`, with torch tensors. Pads with 0."""
    import torch

    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in stack(rows).items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place() -> tuple[int, int]:
    """Rank and world size of this process."""
    if IterableDataset is not object:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _streams_in(states: Any) -> Iterator[dict[str, Any]]:
    """The states of streams within states of any depth."""
    if isinstance(states, dict) and {"position", "worker", "num_rows"} <= states.keys():
        yield states
    elif isinstance(states, dict | list | tuple):
        for inner in states.values() if isinstance(states, dict) else states:
            yield from _streams_in(inner)


def _left_in(state: dict[str, Any]) -> list[Segment]:
    """What a state's stream had not yielded. Older states do not list it, but say which stream it was."""
    if "left" in state:
        return [Segment(*segment) for segment in state["left"]]
    total = state["num_rows"]
    total = total // state["world_size"] * state["world_size"] if state["equal_length"] else total
    start, stop = _split(0, total, state["rank"], state["world_size"])
    if state["num_workers"]:
        start, stop = _split(start, stop, state["worker"], state["num_workers"])
    return _skipped([Segment(start, stop, 0, stop - start)], state["position"])


def _check_complete(states: list[dict[str, Any]]) -> None:
    """Raises OutputMismatch unless the states are those of all streams of one run, each once."""
    if not states:
        raise OutputMismatch("the list of states is empty")
    ranks, workers = states[0]["world_size"], states[0]["num_workers"]
    expected = {(rank, worker) for rank in range(ranks) for worker in range(max(1, workers))}
    found = [(one["rank"], one["worker"]) for one in states]
    if sorted(found) != sorted(expected):
        raise OutputMismatch(
            f"the list must hold one state for each of {ranks} ranks times {max(1, workers)} workers; it holds those "
            f"of (rank, worker) {sorted(found)}"
        )


def _skipped(segments: list[Segment], rows: int) -> list[Segment]:
    """The segments without their first rows."""
    return _cut(segments, rows, sum(segment.last - segment.first for segment in segments))


def _cut(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """Rows start..stop of the segments, counted over all of them."""
    found, begin = [], 0
    for segment in segments:
        length = segment.last - segment.first
        low, high = max(start - begin, 0), min(stop - begin, length)
        if low < high:
            found.append(segment._replace(first=segment.first + low, last=segment.first + high))
        begin += length
    return found


def _worker() -> tuple[int, int]:
    """Number of this DataLoader worker, and the number of workers; (0, 0) outside a worker."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 0)


def _split(start: int, stop: int, part: int, parts: int) -> tuple[int, int]:
    """Bounds of the part-th of `parts` consecutive parts of start..stop. Their lengths differ by at most one."""
    length = stop - start
    return start + part * length // parts, start + (part + 1) * length // parts


def _pieces(sequence: list[tuple[str, int]], low: int, high: int) -> list[tuple[str, int, int]]:
    """Rows low..high of the sequence as (file, first row, last row + 1)."""
    pieces = []
    start = 0
    for name, rows in sequence:
        first, last = max(low - start, 0), min(high - start, rows)
        if first < last:
            pieces.append((name, first, last))
        start += rows
    return pieces
