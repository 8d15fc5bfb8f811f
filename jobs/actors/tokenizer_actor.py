"""A tokenizer as a stage of your own Ray Data pipeline: from a column of encoded files to columns of tokens."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data.block import BlockAccessor
from ray.data.extensions import ArrowPythonObjectType

from jobs.actors.cluster import device_for
from jobs.artifacts import load_tokenizer
from jobs.config import ConfigError
from jobs.shards import DecodedSample, decode_sample, encode_batch
from pipeline import storage
from pipeline.corpus.batches import in_buckets, map_in_threads
from pipeline.corpus.samples import Sample
from pipeline.tokens import Quarantined, TokenRow
from pipeline.tokens.schema import token_dtype
from tokenizer.tokenizer import Tokenizer


class TokenizerActor:
    """Tokenizes the files in one column of each batch: `ds.map_batches(TokenizerActor, fn_constructor_kwargs=...)`.

    Returns an Arrow table: the batch with these columns added.
        tokens        list of unsigned integers, the flat token grid, in the dtype of token shards
        shape         list of int32, the shape of the token grid
        height, width (images) or sample_rate, num_samples (audio): int32, num_samples int64; the size of the original
        tokenizer_id  string, in every row
        error         string, why this row has no tokens; null if it has them
    A bad file does not fail the batch: tokens, shape and size are null in its row, and error gives the reason.

    tokenizer: folder or URL; every node must see it. column: holds the bytes of whole files, such as JPEGs.
    extension: only formats without a signature (g722, tga) need it; all others are recognised by their content.
    batch_budget: megapixels of images or seconds of audio encoded at once; 0 is the modality's default.
    The nets run on a GPU if Ray assigned one (`num_gpus`). As many threads as assigned CPUs (`num_cpus`) decode files.

    Prefer `batch_format="pyarrow"`: Ray's default, NumPy, may change the types of the other columns.
    """

    def __init__(self, tokenizer: str, column: str, *, extension: str = "", batch_budget: float = 0.0):
        assigned = _assigned_resources()
        self.threads = max(1, int(assigned.get("CPU", 1)))
        torch.set_num_threads(self.threads)  # Ray would leave one thread per process
        self.tokenizer = _load(tokenizer, device_for(assigned.get("GPU", 0)))
        self.modality = self.tokenizer.modality
        self.column = column
        self.extension = extension.lower().removeprefix(".") or self.modality.extensions[0]
        if self.extension not in self.modality.extensions:
            raise ValueError(f"extension is {extension!r}; choose one of: {', '.join(self.modality.extensions)}")
        self.budget = self.modality.elements(batch_budget or self.modality.default_budget)

    def __call__(self, batch: Any) -> pa.Table:
        """batch: in any of Ray Data's formats. Raises ValueError if the column is missing or does not hold bytes."""
        table = BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()
        rows, errors = self._tokenize(self._cells(table))
        added = self._columns(rows, errors, len(table))
        if taken := [name for name in added if name in table.column_names]:
            raise ValueError(f"the batch already has columns named {', '.join(taken)}; rename or drop them first")
        for name, values in added.items():
            table = table.append_column(name, values)
        return table

    def _cells(self, table: pa.Table) -> list[Any]:
        """The column as Python objects: bytes, or None or NaN where a row has no file."""
        if self.column not in table.column_names:
            raise ValueError(f"column is {self.column!r}; choose one of: {', '.join(table.column_names)}")
        cells = table[self.column]
        if isinstance(cells.type, ArrowPythonObjectType):  # bytes mixed with NaN, as read_webdataset returns them
            return cells.to_pylist()
        if cells.is_null(nan_is_null=True).to_numpy().all():  # NumPy batches have NaN for null
            return [None] * len(cells)
        if not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)):
            raise ValueError(
                f"column {self.column!r} holds {cells.type}; it must hold binary, the bytes of whole files "
                f"({', '.join(self.modality.extensions)})"
            )
        return cells.to_pylist()

    def _tokenize(self, cells: list[Any]) -> tuple[dict[int, TokenRow], dict[int, str]]:
        """A token row or an error for each cell, by its position in the batch. Uses the same code as `tokenize`."""
        member = f"file.{self.extension}"
        samples = [Sample(i, str(i), {member: cell}) for i, cell in enumerate(cells) if isinstance(cell, bytes)]
        rows: list[TokenRow] = []
        quarantined: list[Quarantined] = []

        def decoded() -> Iterator[DecodedSample]:
            for outcome in map_in_threads(lambda sample: decode_sample(sample, self.modality), samples, self.threads):
                if isinstance(outcome, Quarantined):
                    quarantined.append(outcome)
                else:
                    yield outcome

        for batch in in_buckets(decoded(), lambda one: one.decoded.array, self.modality.bucket, self.budget):
            rows += encode_batch(batch, self.tokenizer, (), quarantined)
        errors = {
            i: f"column {self.column!r} has no bytes here" for i, c in enumerate(cells) if not isinstance(c, bytes)
        }
        errors |= {one.source_index: one.message for one in quarantined}
        return {row.source_index: row for row in rows}, errors

    def _columns(self, rows: dict[int, TokenRow], errors: dict[int, str], num_rows: int) -> dict[str, pa.Array]:
        assert sorted([*rows, *errors]) == list(range(num_rows))
        ordered = [rows.get(i) for i in range(num_rows)]
        dtype = token_dtype(self.tokenizer.codebook_size)
        tokens = [row and row.tokens.reshape(-1).astype(dtype) for row in ordered]
        sizes = {name: [row and row.size[name] for row in ordered] for name in self.modality.size_columns}
        return {
            "tokens": pa.array(tokens, pa.list_(pa.from_numpy_dtype(dtype))),
            "shape": pa.array([row and list(row.tokens.shape) for row in ordered], pa.list_(pa.int32())),
            **{name: pa.array(values, _size_type(name)) for name, values in sizes.items()},
            "tokenizer_id": pa.array([self.tokenizer.id] * num_rows, pa.string()),
            "error": pa.array([errors.get(i) for i in range(num_rows)], pa.string()),
        }


def _size_type(column: str) -> pa.DataType:
    """As in token shards."""
    return pa.int64() if column == "num_samples" else pa.int32()


def _assigned_resources() -> dict[str, float]:
    """The resources that Ray assigned to this actor; empty if the class is used without Ray."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return {}
    return ray.get_runtime_context().get_assigned_resources()


def _load(url: str, device: str) -> Tokenizer:
    """Loads the tokenizer. Raises ConfigError, which names the tokenizers in this folder or beside it."""
    url = storage.normalise(url)
    try:
        return load_tokenizer(url, device)
    except ConfigError as error:
        nearby = [*storage.list_folders(url), *storage.list_folders(url.rsplit("/", 1)[0])]
        tokenizers = [folder for folder in nearby if storage.exists(storage.join(folder, "tokenizer.json"))]
        if not tokenizers:
            raise
        raise ConfigError(f"{url} is not a tokenizer; choose one of: {', '.join(tokenizers)}") from error
