"""Reads token shards for training: sharded, shuffled and resumable. Needs no ray, and no torch.

If torch is installed, TokenDataset is a torch IterableDataset.

The rows of all committed shards form one sequence; with shuffling, the shards are permuted by (seed, epoch). The
sequence is split into consecutive parts, one per stream (ranks times DataLoader workers), and their lengths differ by
at most one row. Each stream permutes `shuffle_window` rows at a time; 0 reads everything in order.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.errors import BrokenOutput, OutputMismatch, StorageError, UnsupportedSchema
from pipeline.tokens.commit import shard_name
from pipeline.tokens.output import REPAIR_AND_RERUN, Output
from pipeline.tokens.schema import ShardLayout, check_schema_version, read_parquet, tokens_as_lists

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

    One pass is one epoch, and the next pass uses the order of the next epoch. DataLoader workers read in copies of
    the dataset that do not count epochs: call `set_epoch` before each epoch there.
    state_dict holds the number of rows that this stream has yielded; load_state_dict resumes right after them. With
    DataLoader workers use torchdata's StatefulDataLoader, which stores the state of each worker.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer_id: str | None = None,
        columns: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_window: int = 0,
        equal_length: bool = False,
    ):
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
        self.epoch = self.position = 0
        self._open: tuple[str, pa.Table] | None = None  # the last file read: windows are often smaller than files
        self._resumed = 0  # rows of the epoch that were yielded before the loaded state was saved
        self._resumed_by = (0, 0)

    def __len__(self) -> int:
        """Number of rows that this rank reads per epoch."""
        start, stop = self._share()
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Starts the given epoch, with its own order of rows, at its first row."""
        self.epoch, self.position, self._resumed = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        worker, num_workers = _worker()
        where = {"epoch": self.epoch, "position": self.position, "worker": worker, "num_workers": num_workers}
        return {**where, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises OutputMismatch if this dataset would yield rows in a different order than the saved one."""
        for name, now in self._identity().items():
            if state[name] != now:
                raise OutputMismatch(f"the state was saved with {name}={state[name]}; this dataset has {name}={now}")
        self.epoch, self.position, self._resumed = state["epoch"], state["position"], state["position"]
        self._resumed_by = (state["worker"], state["num_workers"])

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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        if self._resumed and self._resumed_by != (worker, num_workers):
            raise OutputMismatch(
                "the state belongs to DataLoader worker {} of {}, ".format(*self._resumed_by)
                + f"this is worker {worker} of {num_workers}; resume with the same number of workers, and with "
                "torchdata's StatefulDataLoader if there are any"
            )
        start, stop = self._share()
        if num_workers:
            start, stop = _split(start, stop, worker, num_workers)
        window = self.window or max(1, stop - start)
        sequence = self._sequence()
        resumed, self._resumed = self._resumed, 0
        self.position = resumed
        for low in range(start + resumed // window * window, stop, window):
            already = max(0, start + resumed - low)
            for row in self._window(sequence, low, min(low + window, stop), already):
                self.position += 1
                yield row
        self.set_epoch(self.epoch + 1)

    def _share(self) -> tuple[int, int]:
        """The rows start..stop of the sequence that this rank reads."""
        total = self.num_rows // self.world_size * self.world_size if self.equal_length else self.num_rows
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
