"""Reads the footer of a Parquet file without reading the rest of the file."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import one_line

MAGIC = b"PAR1"
TAIL = 32 * 1024  # bytes; enough for most footers, and a longer footer costs a second request


def read_footer(url: str, num_bytes: int) -> pq.FileMetaData:
    """The metadata of a Parquet file of that size. Raises OSError, or ValueError if it is not a Parquet file."""
    tail = _read_end(url, num_bytes, TAIL)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != MAGIC or not 12 < length <= num_bytes:
        raise ValueError(f"its {num_bytes} bytes do not end in a Parquet footer")
    if length > len(tail):
        tail = _read_end(url, num_bytes, length)
    return parse_footer(MAGIC + tail[-length:])


def parse_footer(data: bytes) -> pq.FileMetaData:
    """The metadata of a Parquet file, or of its magic number and footer alone. Raises OSError or ValueError."""
    try:
        metadata = pq.read_metadata(io.BytesIO(data))
        metadata.schema.to_arrow_schema()  # callers need it, and it may be damaged too
    except (pa.ArrowException, OSError) as error:
        raise ValueError(one_line(error)) from error
    return metadata


def footer_fields(metadata: pq.FileMetaData) -> dict[str, str]:
    """The key-value metadata of the file."""
    return {k.decode(): v.decode(errors="replace") for k, v in (metadata.metadata or {}).items()}


def column_ranges(metadata: pq.FileMetaData, column: str) -> list[tuple[int, int, int]] | None:
    """(rows, min, max) of the column in each row group. None if the file has no statistics for it."""
    ranges = []
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        paths = [chunks.column(i).path_in_schema for i in range(chunks.num_columns)]
        if column not in paths:
            return None
        statistics = chunks.column(paths.index(column)).statistics
        if chunks.num_rows and (statistics is None or not statistics.has_min_max):
            return None
        if chunks.num_rows:
            ranges.append((chunks.num_rows, statistics.min, statistics.max))
    return ranges


def _read_end(url: str, num_bytes: int, length: int) -> bytes:
    return storage.read(url, max(0, num_bytes - length), num_bytes)
