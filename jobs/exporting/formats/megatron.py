"""Megatron-LM: tokens.bin and tokens.idx, an IndexedDataset in which each row is a sequence and a document."""

import struct
from collections.abc import Iterable, Iterator

import numpy as np

from jobs.exporting.format import FORMATS, PARTS, Chunks, Format, Part, joined
from jobs.exporting.rows import Rows

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
CODES = {"uint16": 8, "int32": 4}  # of megatron.core.datasets.indexed_dataset.DType


@FORMATS.register("megatron")
class Megatron(Format):
    dtypes = tuple(CODES)

    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        lengths = (rows.lengths + self.marks).astype("<i4")
        where = f"{PARTS}/{number:06d}"
        return {f"{where}.bin": self.flatten(rows).tobytes(), f"{where}.lengths": lengths.tobytes()}

    def index(self, parts: list[Part], folder: str) -> dict[str, Chunks]:
        tokens, lengths = (
            joined(folder, [name for part in parts for name in part.files if name.endswith(end)])
            for end in (".bin", ".lengths")
        )
        num_rows = sum(part.num_rows for part in parts)

        def index() -> Iterable[bytes]:
            yield HEADER + struct.pack("<QBQQ", VERSION, CODES[self.dtype.name], num_rows, num_rows + 1)
            yield from lengths()
            yield from _pointers(lengths(), self.dtype.itemsize)
            yield np.arange(num_rows + 1, dtype="<i8").tobytes()

        return {"tokens.bin": tokens, "tokens.idx": index}


def _pointers(lengths: Iterable[bytes], itemsize: int) -> Iterator[bytes]:
    """The first byte of each sequence, int64. lengths: int32, in chunks."""
    start = 0
    for chunk in lengths:
        sizes = np.frombuffer(chunk, "<i4").astype("<i8") * itemsize
        ends = start + np.cumsum(sizes)
        yield (ends - sizes).tobytes()
        start = int(ends[-1])
