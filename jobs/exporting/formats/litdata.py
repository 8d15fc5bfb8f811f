"""litdata: chunks and index.json for its StreamingDataset; an item is {"key": str, "tokens": array}.

If the output has views, an item also has "view": int.
A chunk is the number of items and their offsets as uint32, then the items. An item is the sizes of its key and tokens
as uint32, then both. Tokens start with their dtype's number, number of dimensions and shape as uint32.
"""

import json
from typing import Any

import numpy as np

from jobs.exporting.format import FORMATS, Chunks, Format, Part, offset_table, refuse_large
from jobs.exporting.rows import Rows

DTYPES = {"uint8": 4, "uint16": 5, "uint32": 6}
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


@FORMATS.register("litdata")
class LitData(Format):
    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        items = [self._item(*row) for row in zip(rows.keys, rows.grids(), rows.views, strict=True)]
        head = 4 * (len(items) + 2)
        name = f"chunk-0-{number}.bin"
        refuse_large(name, head + sum(map(len, items)))
        data = b"".join([np.uint32(len(items)).tobytes(), offset_table(head, items).tobytes(), *items])
        return {name: data}

    def index(self, parts: list[Part], folder: str) -> dict[str, Chunks]:
        chunks = [
            {"filename": name, "chunk_bytes": file["num_bytes"], "chunk_size": part.num_rows, "dim": None}
            for part in parts
            for name, file in part.files.items()
        ]
        names = ["key", "tokens", *(["view"] if self.layout.views else [])]
        spec = {"type": "builtins.dict", "context": json.dumps(names), "children_spec": [LEAF] * len(names)}
        config = {
            "compression": None,
            "chunk_size": None,
            "chunk_bytes": max(chunk["chunk_bytes"] for chunk in chunks),
            "data_format": ["str", "numpy", "int"][: len(names)],
            "data_spec": json.dumps([1, spec]),  # torch's pytree
            "encryption": None,
            "item_loader": "PyTreeLoader",
        }
        text = json.dumps({"chunks": chunks, "config": config}).encode()
        return {"index.json": lambda: [text]}

    def _item(self, key: str, grid: np.ndarray, view: int | None) -> bytes:
        head = np.array([DTYPES[self.dtype.name], grid.ndim, *grid.shape], "<u4").tobytes()
        fields = [key.encode(), head + grid.astype(self.dtype).tobytes()]
        fields += [] if view is None else [np.array(view, "<i8").tobytes()]
        return np.array(list(map(len, fields)), "<u4").tobytes() + b"".join(fields)
