"""MosaicML MDS: shards and index.json for streaming.StreamingDataset; columns key (str) and tokens (ndarray),
and view (int16) if the output has views.

A shard is the number of samples and their offsets as uint32, its settings as JSON, then the samples. A sample is the
sizes of its key and tokens as uint32, then both. Tokens start with their shape.
A view has a fixed size, so it comes last without one.
"""

import json
from typing import Any

import numpy as np

from jobs.config import ConfigError
from jobs.exporting.format import FORMATS, Chunks, Format, Part, offset_table, refuse_large
from jobs.exporting.rows import Rows

SIDES = ("<u1", "<u2", "<u4")  # dtypes of a shape, by the number in its first byte


@FORMATS.register("mds")
class MDS(Format):
    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        samples = [self._sample(*row) for row in zip(rows.keys, rows.grids(), rows.views, strict=True)]
        settings = json.dumps(self._settings(), sort_keys=True).encode()
        head, name = 4 * (len(samples) + 2) + len(settings), _name(number)
        refuse_large(name, head + sum(map(len, samples)))
        offsets = offset_table(head, samples)
        return {name: b"".join([np.uint32(len(samples)).tobytes(), offsets.tobytes(), settings, *samples])}

    def index(self, parts: list[Part], folder: str) -> dict[str, Chunks]:
        shards = [
            {
                **self._settings(),
                "raw_data": {"basename": name, "bytes": file["num_bytes"], "hashes": {}},
                "samples": part.num_rows,
                "zip_data": None,
            }
            for part in parts
            for name, file in part.files.items()
        ]
        text = json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode()
        return {"index.json": lambda: [text]}

    def _settings(self) -> dict[str, Any]:
        views = self.layout.views is not None
        return {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": None,
            "column_names": ["key", "tokens", *(["view"] if views else [])],
            "column_encodings": ["str", f"ndarray:{self.dtype.name}", *(["int16"] if views else [])],
            "column_sizes": [None, None, *([2] if views else [])],
        }

    def _sample(self, key: str, grid: np.ndarray, view: int | None) -> bytes:
        if not grid.size or not grid.ndim:
            raise ConfigError(
                f"key {key!r} has tokens of shape {grid.shape}; MDS cannot hold it; choose another format"
            )
        name, tokens = key.encode(), _shape(grid.shape) + grid.astype(self.dtype).tobytes()
        last = b"" if view is None else np.array(view, "<i2").tobytes()
        return np.array([len(name), len(tokens)], "<u4").tobytes() + name + tokens + last


def _shape(shape: tuple[int, ...]) -> bytes:
    width = next(i for i, dtype in enumerate(SIDES) if max(shape) <= np.iinfo(dtype).max)
    return bytes([len(shape) << 2 | width]) + np.array(shape, SIDES[width]).tobytes()


def _name(number: int) -> str:
    return f"shard.{number:05d}.mds"
