"""What all formats have in common."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.config import ConfigError
from jobs.config.schema import ExportConfig
from jobs.exporting.rows import Rows
from pipeline import storage
from pipeline.tokens import ShardLayout
from tokenizer.registry import Registry

FORMATS: "Registry[Format]" = Registry("export.format", "jobs.exporting.formats")
PARTS = "parts"  # folder of what is removed at the end
CHUNK_BYTES = 2**24
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Part:
    """What was written for one token file. files: name in the folder -> {"sha256", "num_bytes"}."""

    number: int
    commit: str
    num_rows: int
    num_tokens: int
    files: dict[str, dict[str, Any]]


class Format:
    """Turns the rows of token files into files. Raises ConfigError for settings that the format does not have."""

    name: str
    dtypes: tuple[str, ...] = ()  # that flat tokens can have, the narrowest first; none if rows keep their shape

    def __init__(self, options: ExportConfig, layout: ShardLayout):
        self.options, self.layout = options, layout
        self.dtype = self._flat_dtype() if self.dtypes else self._stored_dtype()

    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        """The files of the part with that number, by name. Those in parts/ are removed at the end."""
        raise NotImplementedError

    def index(self, parts: list[Part], folder: str) -> dict[str, Chunks]:
        """The files that are made from all parts."""
        return {}

    @property
    def vocabulary_size(self) -> int:
        return max(self.layout.codebook_size + self.options.offset, self.options.bos + 1, self.options.eos + 1)

    @property
    def marks(self) -> int:
        """Number of begin and end tokens of each row."""
        return (self.options.bos >= 0) + (self.options.eos >= 0)

    def flatten(self, rows: Rows) -> np.ndarray:
        """The tokens of all rows, one after another, each with its begin and end tokens."""
        begins, before = self.options.bos >= 0, np.arange(len(rows)) * self.marks
        out = np.empty(len(rows.values) + len(rows) * self.marks, self.dtype)
        places = np.arange(len(rows.values)) + np.repeat(before + begins, rows.lengths)
        out[places] = rows.values.astype(np.int64) + self.options.offset
        if begins:
            out[rows.offsets[:-1] + before] = self.options.bos
        if self.options.eos >= 0:
            out[rows.offsets[1:] + before + self.marks - 1] = self.options.eos
        return out

    def _flat_dtype(self) -> np.dtype:
        largest, allowed = self.vocabulary_size - 1, self.dtypes
        if self.options.dtype not in ("", *allowed):
            raise ConfigError(f"export.dtype is {self.options.dtype!r}; {self.name} has: {', '.join(allowed)}")
        self._refuse_shared_marks()
        for name in (self.options.dtype,) if self.options.dtype else allowed:
            if largest <= np.iinfo(name).max:
                return np.dtype(name).newbyteorder("<")
        raise ConfigError(
            f"tokens go up to {largest} (codebook_size {self.layout.codebook_size}, export.offset "
            f"{self.options.offset}, export.bos {self.options.bos}, export.eos {self.options.eos}), but {name} holds "
            f"up to {np.iinfo(name).max}; choose a wider export.dtype of: {', '.join(allowed)}, or lower the numbers"
        )

    def _refuse_shared_marks(self) -> None:
        """A begin or end token that is also a token of the codebook would make documents end inside of rows."""
        low, high = self.options.offset, self.options.offset + self.layout.codebook_size
        for key, mark in (("bos", self.options.bos), ("eos", self.options.eos)):
            if low <= mark < high:
                raise ConfigError(
                    f"export.{key} is {mark}, which is also a token of the codebook ({low}..{high - 1}); choose "
                    f"{high} or more, or raise export.offset"
                )

    def _stored_dtype(self) -> np.dtype:
        plain = ExportConfig()
        for key in ("bos", "eos", "offset", "dtype"):
            if getattr(self.options, key) != getattr(plain, key):
                raise ConfigError(
                    f"export.{key} is for flat tokens (nanogpt, megatron); {self.name} keeps each row's shape and "
                    "dtype; leave it out"
                )
        return self.layout.token_dtype.newbyteorder("<")


def joined(folder: str, names: list[str]) -> Chunks:
    """The bytes of several files in the folder, one after another, in constant memory."""

    def chunks() -> Iterable[bytes]:
        for name in names:
            with storage.open_stream(storage.join(folder, name)) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk

    return chunks


def refuse_large(name: str, num_bytes: int) -> None:
    """Raises ConfigError for a file whose 32-bit offsets would overflow."""
    if num_bytes >= 2**32:
        raise ConfigError(
            f"{name} would have {num_bytes} bytes; the format allows less than {2**32}; tokenize smaller shards"
        )


def offset_table(start: int, items: list[bytes]) -> np.ndarray:
    """uint32 [items + 1]: where each item starts in a file whose first item starts there."""
    return (start + np.cumsum([0, *map(len, items)])).astype("<u4")
