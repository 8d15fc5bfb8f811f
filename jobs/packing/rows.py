"""The rows of a Parquet or CSV file, read a few at a time."""

import csv
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.config import ConfigError
from pipeline import storage
from pipeline.errors import ReplacedObject, StorageError, one_line

Row = dict[str, Any]  # by column
ROWS_AT_ONCE = 64
MAX_FIELD = 2**31 - 1  # characters; csv's own limit of 131,072 is too low for base64
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".parq", ".pq")


def is_table(url: str) -> bool:
    return url.lower().endswith((*PARQUET, *SEPARATORS))


def open_rows(url: str) -> tuple[list[str], Iterator[Row]]:
    """The columns and the rows. CSV cells are text. Raises ConfigError, also from the iterator, for a broken file."""
    rows = _parquet_rows(url) if url.lower().endswith(PARQUET) else _csv_rows(url)
    columns: list[str] = next(rows)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ConfigError(f"{url} has several columns with the name {', '.join(map(repr, twice))}; rename them")
    return columns, rows


def _parquet_rows(url: str) -> Iterator[Any]:
    """First the columns, then the rows."""
    try:
        with storage.open_stream(url) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            yield file.schema_arrow.names
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (StorageError, ReplacedObject, PermissionError):
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # pyarrow raises OSError for damaged pages
        raise ConfigError(f"{url} cannot be read as Parquet: {one_line(error)}") from error


def _csv_rows(url: str) -> Iterator[Any]:
    """First the columns, then the rows. Cells stay text, so that a class 007 does not become 7."""
    csv.field_size_limit(MAX_FIELD)
    separator = next(sign for end, sign in SEPARATORS.items() if url.lower().endswith(end))
    with storage.open_stream(url) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        try:
            columns = next(reader, [])
            yield columns
            for cells in filter(None, reader):
                if len(cells) != len(columns):
                    raise ConfigError(
                        f"{url}, line {reader.line_num}: {len(cells)} cells, but the first line names {len(columns)} "
                        "columns; put quotes around text with commas or line breaks"
                    )
                yield dict(zip(columns, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{url} cannot be read as CSV after line {reader.line_num}: {error}; save it as CSV in UTF-8"
            ) from error
