"""The samples of Parquet and CSV files: one for each row."""

import itertools
from collections.abc import Iterator
from typing import Any

from jobs.config import ConfigError
from jobs.packing.columns import Columns, columns_of, exists
from jobs.packing.media import Media
from jobs.packing.names import printable, sample_key
from jobs.packing.rows import Row, open_rows
from jobs.packing.sample import Packed
from jobs.packing.tally import Tally

HEAD_ROWS = 32  # that tell what a column holds


def table_samples(urls: list[str], media: Media, tally: Tally) -> Iterator[Packed]:
    """Rows without a key column are numbered over all tables. Raises ConfigError for a table or row that is wrong."""
    numbers = itertools.count()
    for url in urls:
        names, rows = open_rows(url)
        head = list(itertools.islice(rows, HEAD_ROWS))
        columns = columns_of(names, head, media, url, tally)
        for index, row in enumerate(itertools.chain(head, rows)):
            number = next(numbers)
            try:
                sample = _sample(row, number, columns, tally)
            except ValueError as error:
                raise ConfigError(f"{url}, row {index}{_named(row, columns)}: {error}") from error
            if sample is not None:
                yield sample


def _sample(row: Row, number: int, columns: Columns, tally: Tally) -> Packed | None:
    """None if the row has no medium; then it is counted."""
    key = f"{number:09d}" if columns.key is None else _key(row[columns.key])
    members = columns.members(row)
    missing = [content for content in members.values() if not exists(content)]
    if missing:
        tally.skip("rows whose file does not exist", str(missing[0]))
    elif not members:
        tally.skip(f"rows without {columns.media.kind} data", key)
    else:
        return Packed(key, members)
    return None


def _key(cell: Any) -> str:
    if cell is None or isinstance(cell, bytes | list | dict):
        raise ValueError(f"the key is {cell!r}; it must be text or a number")
    return sample_key(str(cell))


def _named(row: Row, columns: Columns) -> str:
    return "" if columns.key is None else f", key {printable(str(row[columns.key]))!r}"
