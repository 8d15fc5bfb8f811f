"""Rows of token files in memory, and the batches made of them."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.tokens.schema import tokens_as_lists


class Rows:
    """Rows of one or several files. len(rows): their number.

    values: the tokens of all rows, one after another, in the stored dtype, read-only if they come from a file. Those
    of row i are values[offsets[i]:offsets[i + 1]]. shapes: int64 [rows, dimensions of the grid], or a list of arrays
    if the grids have different numbers of dimensions. columns: the other columns by name, each a list.
    """

    def __init__(
        self,
        values: np.ndarray,
        offsets: np.ndarray,
        shapes: np.ndarray | list[np.ndarray],
        columns: dict[str, list[Any]],
    ):
        self.values, self.offsets, self.shapes, self.columns = values, offsets, shapes, columns

    @classmethod
    def of_table(cls, table: pa.Table, dtype: np.dtype) -> "Rows":
        tokens = tokens_as_lists(table["tokens"].combine_chunks(), dtype)
        offsets = tokens.offsets.to_numpy()  # of a slice of the file, so the first offset may not be 0
        values = tokens.values[offsets[0] : offsets[-1]].to_numpy()
        names = [name for name in table.column_names if name not in ("tokens", "shape")]
        columns = {name: table[name].to_pylist() for name in names}
        return cls(values, (offsets - offsets[0]).astype(np.int64), _shapes(table["shape"].combine_chunks()), columns)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def _all_are_as_long(self) -> bool:
        """Whether all rows have the same number of tokens, so that they form a matrix, which numpy gathers faster."""
        lengths = np.diff(self.offsets)
        return bool(len(lengths) and (lengths == lengths[0]).all())

    def row(self, i: int) -> dict[str, Any]:
        """One row: `tokens` in the shape of its grid, and the other columns."""
        tokens = self.values[self.offsets[i] : self.offsets[i + 1]].reshape(tuple(self.shapes[i])).copy()
        return {"tokens": tokens, **{name: values[i] for name, values in self.columns.items()}}

    def take(self, order: np.ndarray) -> "Rows":
        """The rows of these numbers, copied."""
        lengths = self.offsets[order + 1] - self.offsets[order]
        offsets = _offsets(lengths)
        shapes = self.shapes[order] if isinstance(self.shapes, np.ndarray) else [self.shapes[i] for i in order]
        columns = {name: [values[i] for i in order.tolist()] for name, values in self.columns.items()}
        return Rows(self._gathered(order, lengths, offsets), offsets, shapes, columns)

    def _gathered(self, order: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        if self._all_are_as_long:
            return self.values.reshape(len(self), -1)[order].reshape(-1)
        return self.values[np.repeat(self.offsets[order] - offsets[:-1], lengths) + np.arange(offsets[-1])]


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    values = np.concatenate([part.values for part in parts])
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    columns = {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns}
    return Rows(values, _offsets(lengths), _as_array([shape for part in parts for shape in part.shapes]), columns)


def padded(rows: Rows, pad: int = 0, dtype: Any = np.int64) -> dict[str, Any]:
    """Rows as one batch, which may share memory with them. Raises ValueError if the grids have different numbers of
    dimensions.

    tokens: [B, ...], padded with `pad` at the end of each dimension to the largest shape in the batch. mask: bool of
    that shape, False for padding. Each other column: an array of its numbers, or a list of its other values.
    """
    shapes = rows.shapes
    if not isinstance(shapes, np.ndarray):
        raise ValueError(
            f"one batch cannot hold grids of {sorted({len(shape) for shape in shapes})} dimensions; use ragged=True"
        )
    shape = (len(rows), *shapes.max(axis=0).tolist())
    if (shapes == shapes[0]).all():
        tokens, mask = rows.values.astype(dtype, copy=False).reshape(shape), np.ones(shape, bool)
    else:
        mask = np.ones(shape, bool)
        for axis, sides in enumerate(shapes.T, start=1):
            inside = np.arange(shape[axis]) < sides[:, None]
            mask &= inside.reshape(len(rows), *(-1 if axis == other else 1 for other in range(1, len(shape))))
        tokens = np.full(shape, pad, dtype)
        tokens[mask] = rows.values
    return {"tokens": tokens, "mask": mask, **_columns(rows)}


def ragged(rows: Rows, dtype: Any = np.int64) -> dict[str, Any]:
    """Rows as one batch without padding. tokens: [sum of the lengths], offsets: int64 [B + 1], shapes: int64
    [B, dimensions] or a list of arrays, and the other columns."""
    return {
        "tokens": rows.values.astype(dtype, copy=False),
        "offsets": rows.offsets,
        "shapes": rows.shapes,
        **_columns(rows),
    }


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`DataLoader(dataset, batch_size=8, collate_fn=collate)`: rows as a batch of torch tensors.

    tokens: int64 [B, ...], or float32 for latents, padded with 0 at the end of each dimension to the largest shape in
    the batch. mask: bool of that shape, False for padding. Each other column: a tensor of its numbers, or a list of
    its other values.
    """
    names = [name for name in rows[0] if name != "tokens"]
    grids = [row["tokens"] for row in rows]
    made = Rows(
        np.concatenate([grid.reshape(-1) for grid in grids]),
        _offsets(np.array([grid.size for grid in grids])),
        _as_array([np.array(grid.shape) for grid in grids]),
        {name: [row[name] for row in rows] for name in names},
    )
    return as_tensors(padded(made, dtype=np.int64 if made.values.dtype.kind in "iu" else made.values.dtype))


def as_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with torch tensors in place of its arrays."""
    import torch

    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def _columns(rows: Rows) -> dict[str, Any]:
    return {name: np.array(values) if all(map(_is_number, values)) else values for name, values in rows.columns.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shapes(shapes: pa.ListArray) -> np.ndarray | list[np.ndarray]:
    sides = shapes.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = shapes.offsets.to_numpy() - shapes.offsets[0].as_py()
    dimensions = np.diff(offsets)
    if len(dimensions) and (dimensions == dimensions[0]).all():
        return sides.reshape(len(dimensions), -1)
    return [sides[start:stop] for start, stop in itertools.pairwise(offsets)]


def _as_array(shapes: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    return np.stack(shapes) if len({len(shape) for shape in shapes}) == 1 else shapes


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
