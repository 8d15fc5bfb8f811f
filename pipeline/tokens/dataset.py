"""Reads token shards for training: sharded, shuffled and resumable. Needs no ray, and no torch.

If torch is installed, TokenDataset is a torch IterableDataset.

The rows of all committed shards form one sequence; with shuffling, the shards are permuted by (seed, epoch). The
sequence is split into consecutive parts, one per stream (ranks times DataLoader workers), and their lengths differ by
at most one row. Each stream permutes `shuffle_window` rows at a time; 0 reads everything in order.

What is left of an epoch is a list of segments: rows first..last of the order of the part start..stop. Another number
of streams continues an epoch by splitting the segments of all old streams.
"""

import bisect
import collections
import contextlib
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.corpus.batches import map_in_threads, prefetch
from pipeline.corpus.shards import Shard
from pipeline.errors import BrokenOutput, OutputMismatch, StorageError, UnsupportedSchema
from pipeline.tokens.commit import shard_name
from pipeline.tokens.index import counted
from pipeline.tokens.output import READERS, REPAIR_AND_RERUN, Output
from pipeline.tokens.processes import IterableDataset, SharedCalls, place, split, states_in, worker_of
from pipeline.tokens.rows import Rows, as_tensors, joined, padded
from pipeline.tokens.rows import ragged as make_ragged
from pipeline.tokens.schema import ShardLayout, check_schema_version, read_parquet, tokens_as_lists

KEPT_BYTES = 2**28  # of tokens in memory, for single rows
OTHER_RANKS = "; to continue with another number of ranks, give the states of all ranks as a list"
HINTS = {  # by what differs between a state and the dataset that loads it
    "rank": OTHER_RANKS,
    "world_size": OTHER_RANKS,
    "files": ": its shards have other names or numbers of rows; open the output from which the state was saved",
}


class Segment(NamedTuple):
    """Rows first..last of the order in which a stream reads the rows start..stop of the epoch's sequence."""

    start: int
    stop: int
    first: int
    last: int


class TokenDataset(IterableDataset):  # type: ignore[misc]
    """Yields rows as dicts: `tokens` (integers in the shape of the token grid), `key`, and the requested `columns`.

    url: an output of `tokenize`, or a latent cache (RUN/latents). There `tokens` are float32 latents [..., channels],
    what the quantizer gets, and layout.tokenizer_id is the id of the encoder.

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

    cache: a local folder that keeps copies of files in remote storage, up to cache_gb gigabytes; the files that were
    read longest ago go first. Any number of processes may share it. Without it, each pass downloads each file again.

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
        cache: str | None = None,
        cache_gb: float = 100.0,
    ):
        own_rank, own_size = place()
        rank, world_size = own_rank if rank is None else rank, own_size if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in 0..{world_size - 1}, below world_size")
        self.output = Output.open(url)
        self.layout = self.output.layout
        if isinstance(columns, str):
            raise ValueError(f"columns is {columns!r}; give ({columns!r},)")
        known = [name for name in self.layout.schema("").names if name != "shape"]  # `tokens` have it
        if unknown := [name for name in columns if name not in known]:
            raise ValueError(f"columns: {unknown[0]!r} is not in {url}; choose from {known}")
        for name, value in (("seed", seed), ("shuffle_window", shuffle_window)):
            if _whole_number(value) < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        if tokenizer_id not in (None, self.layout.tokenizer_id):
            raise OutputMismatch(f"{url} was written by tokenizer {self.layout.tokenizer_id}, not by {tokenizer_id}")
        self.columns = columns
        self.rank, self.world_size = rank, world_size
        self.seed, self.window, self.equal_length = seed, shuffle_window, equal_length
        self._entries = {entry.name: entry for entry in counted(self.output) if entry.num_rows}
        self._cache = storage.FileCache(cache, int(cache_gb * 1e9)) if cache else None
        self.files = [(entry.name, entry.num_rows) for entry in self._entries.values()]
        self._checked: set[str] = set()  # names of files that fit the layout
        self.num_rows = sum(rows for _, rows in self.files)
        self._ends = np.cumsum([rows for _, rows in self.files]).tolist()  # of each file, in rows of the output
        self.epoch = self.position = 0  # position: rows of the epoch that this stream has yielded
        self._open: tuple[str, pa.Table] | None = None  # the last file read: windows are often smaller than files
        self._recent: collections.OrderedDict[str, Rows] = (
            collections.OrderedDict()
        )  # files of single rows, last read last
        self._plan: list[Segment] | None = None  # what the pass that has begun reads
        self._done = 0  # rows of the plan that were yielded
        self._resumed: list[Segment] | None = None  # what the next pass reads, from the state of this stream
        self._left: list[Segment] | None = None  # what the next pass of all streams together reads, from all states
        self._resumed_by: tuple[int, int] | None = None
        self._is_over = False  # whether a worker has ended its pass and not begun the next one
        self._calls = SharedCalls()

    @property
    def files_id(self) -> str:
        """Hash of the names and numbers of rows of all token files, on which the order of rows depends."""
        return hashlib.sha256(json.dumps(self.files).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of rows that this rank reads per epoch."""
        start, stop = self._share(self.num_rows)
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Starts the given epoch, with its own order of rows, at its first row."""
        if _whole_number(epoch) < 0:
            raise ValueError(f"epoch is {epoch}; it must be 0 or more")
        self._start(epoch)
        if not worker_of()[1]:
            self._calls.send(epoch)

    def _start(self, epoch: int) -> None:
        self.epoch, self.position, self._done = epoch, 0, 0
        self._plan = self._resumed = self._left = self._resumed_by = None
        self._is_over = False

    def _finish(self) -> None:
        """Ends a pass. In a worker of a DataLoader the epoch goes on until all its workers have ended: the state then
        says that nothing is left of it."""
        if worker_of()[1]:
            self._is_over = True
        else:
            self._start(self.epoch + 1)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict needs. Raises OutputMismatch where only the workers of a DataLoader know it."""
        worker, num_workers = worker_of()
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
        if isinstance(state, dict) and {"position", "worker", "num_rows"} <= state.keys():
            self._check_identity(state, self._identity())
            self._start(state["epoch"])
            self._resumed, self._resumed_by = _left_in(state), (state["worker"], state["num_workers"])
            self.position = state["position"]
            return
        states = list(states_in(state, {"position", "worker", "num_rows"}))
        ours = {name: now for name, now in self._identity().items() if name not in ("rank", "world_size")}
        for one in states:
            self._check_identity(one, ours)
        _check_complete(states)
        epoch = min(one["epoch"] for one in states)
        if any(one["epoch"] > epoch + 1 or (one["epoch"] > epoch and one["position"]) for one in states):
            raise OutputMismatch("the states are of different epochs; save those of all ranks at the same step")
        self._start(epoch)
        self._left = [segment for one in states if one["epoch"] == epoch for segment in _left_in(one)]

    def _check_identity(self, state: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            saved = state.get(name, value) if name == "files" else state[name]  # older states do not have them
            if saved != value:
                raise OutputMismatch(
                    f"the state was saved with {name}={saved}; this dataset has {name}={value}{HINTS.get(name, '')}"
                )

    def _identity(self) -> dict[str, Any]:
        return {
            **{
                "tokenizer_id": self.layout.tokenizer_id,
                "equal_length": self.equal_length,
                "num_rows": self.num_rows,
                "files": self.files_id,
                "seed": self.seed,
                "shuffle_window": self.window,
            },
            **{"rank": self.rank, "world_size": self.world_size},
        }

    # -- iteration ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows, order in self._spans(self._begin(), self.epoch):
            for i in order.tolist():
                row = rows.row(i)
                self._count(1)
                yield row
        self._finish()

    def batches(
        self,
        size: int,
        *,
        pad: int = 0,
        ragged: bool = False,
        dtype: Any = np.int64,
        torch: bool = False,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Batches of `size` rows. state_dict between two batches is exact. Much faster than iterating over rows.

        tokens: `dtype` [size, ...], padded with `pad` at the end of each dimension to the largest shape in the batch.
        mask: bool of that shape, False for padding. Each other column: an array of its numbers, or a list of its other
        values. ragged: without padding, so tokens is flat, `offsets` [size + 1] says where each row starts, and
        `shapes` its grid. dtype: None keeps the stored one; latents stay float32. torch: tensors in place of arrays.
        drop_last: leaves out the last batch of the pass if it has fewer rows.
        """
        if size < 1:
            raise ValueError(f"size is {size}; a batch needs at least 1 row")
        if dtype is None or self.layout.holds_latents:
            dtype = self.layout.token_dtype
        self._check_numbers(np.dtype(dtype), pad)
        plan = self._begin()  # first, since it may receive another epoch
        epoch = self.epoch
        for rows in _in_batches(prefetch(self._spans(plan, epoch), 1), size):
            batch = make_ragged(rows, dtype) if ragged else padded(rows, pad, dtype)
            batch = as_tensors(batch) if torch else batch
            self._count(len(rows))  # after the work, so that an interrupted batch is read again
            if len(rows) == size or not drop_last:
                yield batch
        self._finish()

    def _check_numbers(self, dtype: np.dtype, pad: int) -> None:
        """Raises ValueError if an integer dtype does not hold every token, or the padding."""
        if dtype.kind not in "iu":
            return
        limits = np.iinfo(dtype)
        if (last := (self.layout.codebook_size or 1) - 1) > limits.max:
            raise ValueError(f"dtype is {dtype}, which does not hold the token {last}; leave it out, or choose int64")
        if not limits.min <= pad <= limits.max:
            raise ValueError(f"pad is {pad}, which {dtype} does not hold; choose another pad or dtype")

    def _begin(self) -> list[Segment]:
        """Begins a pass. Returns what it reads."""
        worker, num_workers = worker_of()
        if not num_workers:
            self._calls.read_here()
        elif (epoch := self._calls.receive()) is not None:
            self._start(epoch)
        elif self._is_over:
            self._start(self.epoch + 1)
        if self._resumed_by not in (None, (worker, num_workers)):
            raise OutputMismatch(
                "the state belongs to DataLoader worker {} of {}, ".format(*(self._resumed_by or ()))
                + f"this is worker {worker} of {num_workers}; resume with the same number of workers, and with "
                "torchdata's StatefulDataLoader if there are any, or give the states of all workers as a list"
            )
        if self._resumed is None:
            self.position = 0
        self._plan = self._next_plan()
        self._done, self._resumed, self._left, self._resumed_by = 0, None, None, None
        return self._plan

    def _count(self, rows: int) -> None:
        self.position += rows
        self._done += rows

    def _next_plan(self) -> list[Segment]:
        """What this stream reads in the pass that begins next."""
        if self._resumed is not None:
            return self._resumed
        worker, num_workers = worker_of()
        left = [Segment(0, self.num_rows, 0, self.num_rows)] if self._left is None else self._left
        total = sum(segment.last - segment.first for segment in left)
        start, stop = self._share(total)
        if num_workers:
            start, stop = split(start, stop, worker, num_workers)
        if self._left is None:
            return [Segment(start, stop, 0, stop - start)]
        return _cut(left, start, stop)

    def _spans(self, plan: list[Segment], epoch: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """The rows of the plan, as rows in memory and the order in which to yield them. Runs in a thread of `batches`,
        so it changes nothing but the last file that was read."""
        sequence = self._sequence(epoch)
        for segment in plan:
            left = segment.last - segment.first
            for rows, order in self._windows(sequence, segment, epoch):
                yield rows, order[:left]
                left -= len(order)
                if left <= 0:
                    break

    def _windows(
        self, sequence: list[tuple[str, int]], segment: Segment, epoch: int
    ) -> Iterator[tuple[Rows, np.ndarray]]:
        """The rows of a segment from its first one on, beyond its end."""
        start, stop, first, _ = segment
        window = self.window or max(1, stop - start)
        for low in range(start + first // window * window, stop, window):
            already = max(0, start + first - low)
            yield from self._window(sequence, low, min(low + window, stop), already, epoch)

    # -- single rows ----------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, Any]:
        [row] = self.take([index])
        return row

    def take(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Rows of the whole output by their numbers, in this order. Raises IndexError.

        Reads each file once, and keeps those that were read last in memory, up to KEPT_BYTES of tokens.
        """
        by_file: dict[int, list[tuple[int, int]]] = {}
        for which, index in enumerate(_whole_number(index) for index in indices):
            if not 0 <= index < self.num_rows:
                raise IndexError(f"row {index} of {self.num_rows}")
            by_file.setdefault(bisect.bisect_right(self._ends, index), []).append((which, index))
        found: dict[int, dict[str, Any]] = {}
        for number in sorted(by_file):
            name, num_rows = self.files[number]
            first, rows = self._ends[number] - num_rows, self._kept(name, num_rows)
            found.update({which: rows.row(index - first) for which, index in by_file[number]})
        return [found[which] for which in range(len(found))]

    def _kept(self, name: str, num_rows: int) -> Rows:
        """All rows of a file, from memory if they are still there."""
        rows = self._recent.pop(name, None)
        if rows is None:
            rows = self._read(name, 0, num_rows)
        self._recent[name] = rows
        while len(self._recent) > 1 and sum(one.values.nbytes for one in self._recent.values()) > KEPT_BYTES:
            self._recent.popitem(last=False)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows in memory, which another process reads itself."""
        return {**self.__dict__, "_open": None, "_recent": collections.OrderedDict()}

    def in_order(self, epoch: int, low: int, high: int) -> Rows:
        """Rows low..high of the order that an epoch has when one stream reads it all.

        With shuffling, low must be a multiple of shuffle_window, and high too or num_rows. Raises ValueError.
        """
        if self.window and (low % self.window or (high % self.window and high != self.num_rows)):
            raise ValueError(f"rows {low}..{high} are not whole windows of {self.window} rows (shuffle_window)")
        whole = Segment(0, self.num_rows, low, high)
        return joined([rows.take(order) for rows, order in self._spans([whole], epoch)])

    def lengths(self) -> np.ndarray:
        """The number of tokens of each row of the output: int64 [num_rows]. Reads only the shapes, in threads."""
        parts = map_in_threads(self._read_lengths, [name for name, _ in self.files], READERS)
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def find(self, key: str, view: int = 0) -> int:
        """The number of the row with this key. Reads the keys of the files until it is found.

        Keys may repeat in other shards: it is the first one. If the output has views, the rows of a key follow each
        other: find(key), find(key) + 1 and so on are its views 0, 1 and so on. Raises KeyError, and ValueError for a
        view that the output does not have.
        """
        if not isinstance(key, str):
            raise TypeError(f"key is {key!r}; keys are text, as in the column key")
        if not 0 <= view < self.layout.rows_per_sample:
            raise ValueError(f"view is {view}; each sample has {self.layout.rows_per_sample} rows, numbered from 0")
        for (name, num_rows), end in zip(self.files, self._ends, strict=True):
            if (place := pc.index(self._read_file(name)["key"], key).as_py()) >= 0:
                return end - num_rows + place + view
        raise KeyError(key)

    def _share(self, total: int) -> tuple[int, int]:
        """Which of `total` rows this rank reads: start..stop."""
        total = total // self.world_size * self.world_size if self.equal_length else total
        return split(0, total, self.rank, self.world_size)

    def _sequence(self, epoch: int) -> list[tuple[str, int]]:
        if not self.window:
            return self.files
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.files))
        return [self.files[i] for i in order]

    def _window(
        self, sequence: list[tuple[str, int]], low: int, high: int, already: int, epoch: int
    ) -> Iterator[tuple[Rows, np.ndarray]]:
        """Rows low..high of the sequence, permuted when shuffling, without the first `already`."""
        pieces = _pieces(sequence, low, high)
        if not self.window:  # one file at a time in memory
            for name, first, last in pieces:
                skip = min(already, last - first)
                already -= skip
                if skip < last - first:
                    yield self._read(name, first, last), np.arange(skip, last - first)
            return
        order = np.random.default_rng([self.seed, epoch, low]).permutation(high - low)[already:]
        yield joined([self._read(*piece) for piece in pieces]), order

    def _read(self, name: str, first: int, last: int) -> Rows:
        opened = self._open  # another thread may replace it
        if opened is None or opened[0] != name:
            opened = self._open = (name, self._read_file(name))
        return Rows.of_table(opened[1].slice(first, last - first), self.layout.token_dtype)

    def _read_file(self, name: str) -> pa.Table:
        """The columns of one token file. Raises BrokenOutput if the file is damaged or does not fit the layout."""
        with self._named(name) as url:
            table = self._table(name, ["tokens", "shape", "key", *self.columns])
            _check_writer(table, url, self.layout)
            if name not in self._checked:  # once: shuffling reads a file several times
                _check_rows(table, self.layout, self._entries[name].num_rows)
                _check_shard(table, name)
                self._checked.add(name)
        return table

    def _read_lengths(self, name: str) -> np.ndarray:
        with self._named(name):
            table = self._table(name, ["shape"])
            _check_num_rows(table, self._entries[name].num_rows)
            shapes = table["shape"].combine_chunks()
            return _products(shapes.flatten().to_numpy(zero_copy_only=False), shapes)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[str]:
        """The URL of a token file. An error that reading it raises names the file, and says how to repair it."""
        url = self.output.tokens_url(name)
        try:
            yield url
        except (StorageError, PermissionError, OutputMismatch):
            raise
        except FileNotFoundError as error:
            raise BrokenOutput(f"{url}: the file is missing; {REPAIR_AND_RERUN}") from error
        except (OSError, ValueError) as error:
            raise BrokenOutput(f"{url}: {error}; {REPAIR_AND_RERUN}") from error

    def _table(self, name: str, columns: Sequence[str]) -> pa.Table:
        url = self.output.tokens_url(name)
        fs, path = storage.locate(url)
        columns = list(dict.fromkeys(columns))
        if storage.is_local(fs):
            return read_parquet(path, columns, memory_map=True)
        version = self._entries[name].version  # a shard that is made again has a new entry
        if self._cache and version:
            return read_parquet(self._cache.read(url, version), columns)
        return read_parquet(storage.read(url), columns)


def _check_writer(table: pa.Table, url: str, layout: ShardLayout) -> None:
    """Raises OutputMismatch if another tokenizer wrote the file, UnsupportedSchema if a newer version of ours did."""
    footer = table.schema.metadata or {}
    writer = footer.get(b"tokenizer_id", b"").decode(errors="replace")
    if writer != layout.tokenizer_id:
        raise OutputMismatch(f"{url} was written by tokenizer {writer!r}, not by {layout.tokenizer_id}")
    version = footer.get(b"schema_version", b"1").decode(errors="replace")
    try:
        check_schema_version(int(version) if version.isdigit() else version)
    except UnsupportedSchema as error:
        raise UnsupportedSchema(f"{url}: {error}") from error


def _check_shard(table: pa.Table, name: str) -> None:
    """Raises ValueError if the table is the one of another shard than its file name says."""
    source = (table.schema.metadata or {}).get(b"source_shard", b"").decode(errors="replace")
    if Shard(source, None).name != shard_name(name):
        raise ValueError(f"it holds the rows of {source}")


def _check_rows(table: pa.Table, layout: ShardLayout, num_rows: int) -> None:
    """Raises ValueError if the table does not hold that many rows of this layout."""
    _check_num_rows(table, num_rows)
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


def _check_num_rows(table: pa.Table, num_rows: int) -> None:
    if table.num_rows != num_rows:
        raise ValueError(f"{table.num_rows} rows, the manifest says {num_rows}")


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


def _in_batches(spans: Iterable[tuple[Rows, np.ndarray]], size: int) -> Iterator[Rows]:
    """Batches of `size` rows, and a last one with the rest."""
    parts, missing = [], size
    for rows, order in spans:
        start = 0
        while start < len(order):
            part = order[start : start + missing]
            parts.append(rows.take(part))
            start, missing = start + len(part), missing - len(part)
            if not missing:
                yield joined(parts)
                parts, missing = [], size
    if parts:
        yield joined(parts)


def _whole_number(value: Any) -> int:
    """Raises TypeError for floats, text and truth values, which would be read as some other row."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{value} is no number of a row; for a mask of rows, give np.flatnonzero(mask)")
    return operator.index(value)


def _left_in(state: dict[str, Any]) -> list[Segment]:
    """What a state's stream had not yielded. Older states do not list it, but say which stream it was."""
    if "left" in state:
        return [Segment(*segment) for segment in state["left"]]
    total = state["num_rows"]
    total = total // state["world_size"] * state["world_size"] if state["equal_length"] else total
    start, stop = split(0, total, state["rank"], state["world_size"])
    if state["num_workers"]:
        start, stop = split(start, stop, state["worker"], state["num_workers"])
    return _skipped([Segment(start, stop, 0, stop - start)], state["position"])


def _check_complete(states: list[dict[str, Any]]) -> None:
    """Raises OutputMismatch unless the states are those of all streams of one run, each once."""
    if not states:
        raise OutputMismatch("there is no state of a TokenDataset in it; give what its state_dict returned")
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
