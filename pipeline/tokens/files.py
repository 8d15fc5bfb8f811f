"""What a listing and the end of a Parquet file tell about it, without reading the rest."""

import io

import pyarrow.parquet as pq

from pipeline import storage

MAGIC = b"PAR1"
TAIL = 32 * 1024  # bytes: most footers; a longer one costs a second request


def sizes(folder: str) -> dict[str, int]:
    """Bytes of each file right in the folder, by its name without the ending; {} if there is no such folder."""
    named = {found.url.rsplit("/", 1)[1]: found.num_bytes for found in storage.scan(folder)}
    return {name.rsplit(".", 1)[0]: size for name, size in named.items() if size is not None}


def footer(url: str, num_bytes: int) -> pq.FileMetaData:
    """The metadata of a Parquet file of that size. Raises OSError, or ValueError where it is none."""
    tail = _read_end(url, num_bytes, TAIL)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != MAGIC or not 12 < length <= num_bytes:
        raise ValueError(f"its {num_bytes} bytes do not end as a Parquet file does")
    if length > len(tail):
        tail = _read_end(url, num_bytes, length)
    return pq.read_metadata(io.BytesIO(MAGIC + tail[-length:]))


def footer_fields(metadata: pq.FileMetaData) -> dict[str, str]:
    """What the writer of the file wrote down there."""
    return {k.decode(): v.decode(errors="replace") for k, v in (metadata.metadata or {}).items()}


def column_ranges(metadata: pq.FileMetaData, column: str) -> list[tuple[int, int, int]] | None:
    """Rows, smallest and largest value of the column in each row group; None where the writer did not note them."""
    ranges = []
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        paths = [chunks.column(i).path_in_schema for i in range(chunks.num_columns)]
        if column not in paths:
            return None
        noted = chunks.column(paths.index(column)).statistics
        if chunks.num_rows and (noted is None or not noted.has_min_max):
            return None
        if chunks.num_rows:
            ranges.append((chunks.num_rows, noted.min, noted.max))
    return ranges


def _read_end(url: str, num_bytes: int, length: int) -> bytes:
    return storage.read(url, max(0, num_bytes - length), num_bytes)
