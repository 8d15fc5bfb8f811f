"""The rows of one token file in memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import BrokenOutput, OutputMismatch
from pipeline.tokens import Commit, Output, ShardLayout
from pipeline.tokens.output import REPAIR_AND_RERUN
from pipeline.tokens.schema import read_parquet, tokens_as_lists, views_of


@dataclass(frozen=True)
class Rows:
    """table: all columns, with the tokens as lists. values [num_tokens], in the stored dtype: the tokens of all rows.

    offsets [rows + 1], int64: where each row starts in values. shapes: of the token grids, in C order.
    """

    table: pa.Table
    values: np.ndarray
    offsets: np.ndarray
    shapes: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def keys(self) -> list[str]:
        return self.table["key"].to_pylist()

    @property
    def views(self) -> list[int | None]:
        """The number of each row's view; None if the output has no views."""
        return views_of(self.table)

    def grids(self) -> Iterator[np.ndarray]:
        """The tokens of each row in the shape of its grid."""
        for i, shape in enumerate(self.shapes):
            yield self.values[self.offsets[i] : self.offsets[i + 1]].reshape(shape)


def read_rows(output: Output, entry: Commit) -> Rows:
    """The rows of one commit. Raises BrokenOutput unless the file has the bytes that were committed, and OutputMismatch
    if another tokenizer wrote it."""
    url = output.tokens_url(entry.name)
    try:
        data = output.read_tokens(entry.name)
    except FileNotFoundError as error:
        raise BrokenOutput(f"{url}: the file is missing; {REPAIR_AND_RERUN}") from error
    if hashlib.sha256(data).hexdigest() != entry.tokens_sha256:
        raise BrokenOutput(f"{url}: its checksum is not the one that was committed; {REPAIR_AND_RERUN}")
    table = read_parquet(data)
    writer = (table.schema.metadata or {}).get(b"tokenizer_id", b"").decode(errors="replace")
    if writer != output.layout.tokenizer_id:
        raise OutputMismatch(f"{url} was written by tokenizer {writer!r}, not by {output.layout.tokenizer_id}")
    rows = rows_of(table, output.layout)
    _check(rows, output.layout, url)
    return rows


def rows_of(table: pa.Table, layout: ShardLayout) -> Rows:
    tokens = tokens_as_lists(table["tokens"].combine_chunks(), layout.token_dtype)
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    shapes = [tuple(shape) for shape in table["shape"].to_pylist()]
    column = table.schema.get_field_index("tokens")
    kind = pa.list_(pa.from_numpy_dtype(layout.token_dtype))  # Parquet names the items differently
    table = table.set_column(column, pa.field("tokens", kind, nullable=False), tokens.cast(kind))
    values = tokens.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return Rows(table, values, offsets - offsets[0], shapes)


def _check(rows: Rows, layout: ShardLayout, url: str) -> None:
    if len(rows.values) and int(rows.values.max()) >= layout.codebook_size:
        raise BrokenOutput(
            f"{url}: token {int(rows.values.max())} is not below {layout.codebook_size}, the size of the codebook; "
            f"{REPAIR_AND_RERUN}"
        )
    products = np.array([np.prod(shape, dtype=np.int64) for shape in rows.shapes], np.int64)
    if not np.array_equal(products, rows.lengths):
        raise BrokenOutput(f"{url}: a row has another number of tokens than its shape says; {REPAIR_AND_RERUN}")
