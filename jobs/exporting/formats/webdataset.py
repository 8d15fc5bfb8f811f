"""WebDataset: tars with KEY.tokens.npy and KEY.json, which holds the other columns; columns of bytes are members.

If the output has views, KEY is that of the sample with -view0, -view1 and so on.
"""

import io
import json
import tarfile
from typing import Any

import numpy as np

from jobs.config import ConfigError
from jobs.exporting.format import FORMATS, Format
from jobs.exporting.rows import Rows
from jobs.packing.shards import tar_header

TOKENS, COLUMNS = "tokens.npy", "json"


@FORMATS.register("webdataset")
class WebDataset(Format):
    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        out, last = io.BytesIO(), ""
        others = rows.table.drop_columns(["tokens"]).to_pylist()
        with tarfile.open(fileobj=out, mode="w|") as archive:
            for columns, grid in zip(others, rows.grids(), strict=True):
                key = columns["key"] + (f"-view{columns['view']}" if self.layout.views else "")
                _check_key(key, last)
                last = key
                for member, data in _members(columns, _npy(grid.astype(self.dtype))).items():
                    archive.addfile(tar_header(f"{last}.{member}", len(data)), io.BytesIO(data))
        return {f"tokens-{number:06d}.tar": out.getvalue()}


def _members(columns: dict[str, Any], tokens: bytes) -> dict[str, bytes]:
    binary = {name: value for name, value in columns.items() if isinstance(value, bytes)}
    if taken := {TOKENS, COLUMNS} & binary.keys():
        raise ConfigError(f"the column {taken.pop()!r} has the name of a member of the tar; choose another format")
    plain = {name: value for name, value in columns.items() if name not in binary}
    return {**binary, COLUMNS: json.dumps(plain).encode(), TOKENS: tokens}


def _check_key(key: str, last: str) -> None:
    """Raises ConfigError for a key that webdataset would split elsewhere, or join with the row before."""
    if "." in key.rsplit("/", 1)[-1]:
        raise ConfigError(f"key {key!r} holds a dot, where webdataset ends a key; choose another format")
    if key == last:
        raise ConfigError(
            f"two rows in sequence have the key {key!r}; webdataset would join them; choose another format"
        )


def _npy(grid: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, grid, allow_pickle=False)
    return out.getvalue()
