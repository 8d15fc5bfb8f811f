"""Creating the files of a commit beside other writers, alive or dead, of the same shard."""

import io
from collections.abc import Callable, Collection

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.tokens.schema import to_parquet


def place(url: str, table: pa.Table, fits: Callable[[pa.Table], bool], is_committed: Callable[[], bool]) -> bytes:
    """Creates the Parquet file and returns the bytes that stand there.

    A file of a run that died before its manifest entry is taken over if it fits, so that two drivers that race end up
    describing one file; a torn one, which no manifest entry names, is written anew.
    """
    data = to_parquet(table)
    while True:  # again where another driver has just replaced the same torn file
        try:
            storage.write_once(url, data)
            return data
        except FileExistsError:
            there = _read_if_there(url)
        if there is None:
            continue
        if (found := _parsed(there)) is not None and fits(found):
            return there
        if is_committed():  # never remove what an entry names
            return there
        storage.remove(url)


def same_samples(there: pa.Table, table: pa.Table) -> bool:
    """Whether both are of the same shard, written by the same tokenizer, and hold the same samples."""
    return same_origin(there, table) and all(there[name].equals(table[name]) for name in ("key", "source_index"))


def some_of(there: pa.Table, table: pa.Table, indices: Collection[int]) -> bool:
    """Whether a file beside `table` holds samples of the same shard that are among the indices, each once."""
    found = there["source_index"].to_pylist() if same_origin(there, table) else []
    return bool(found) and len(set(found)) == len(found) and set(found) <= set(indices)


def same_origin(there: pa.Table, table: pa.Table) -> bool:
    # the footers apart: check_metadata would also compare the names of list items, which Parquet changes
    return there.schema.equals(table.schema) and _origin(there) == _origin(table)


def _origin(table: pa.Table) -> dict[bytes, bytes]:
    return {name: value for name, value in (table.schema.metadata or {}).items() if name != b"num_tokens"}


def _read_if_there(url: str) -> bytes | None:
    try:
        return storage.read(url)
    except FileNotFoundError:
        return None


def _parsed(parquet: bytes) -> pa.Table | None:
    try:
        return pq.read_table(io.BytesIO(parquet))
    except (pa.ArrowInvalid, OSError):
        return None
