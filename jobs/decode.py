"""Decodes token rows to images or audio files: `output`, `decode.output`, and `decode.keys` or `decode.limit`.

If the output has views, each view of a sample becomes a file.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.artifacts import load_tokenizer, writer_url
from jobs.config import Config, ConfigError
from jobs.outputs import open_output
from jobs.reports.progress import counted
from pipeline import storage
from pipeline.tokens import Output, TokenDataset
from pipeline.tokens.schema import SIZE_COLUMNS
from pipeline.tokens.views import Views
from tokenizer.tokenizer import Tokenizer

MAX_NAME = 200  # bytes; file systems allow 255, for the extension and the suffix of an unfinished file too


def run(config: Config) -> int:
    config.require("output", "decode.output")
    folder = storage.normalise(config.decode.output)
    output = open_output(config.output)
    tokenizer = load_tokenizer(writer_url(output, config))
    tokenizer.require_decoder()
    views = output.layout.views
    files = (_write(row, tokenizer, folder, views) for row in _chosen(config, views))
    wanted = len(config.decode.keys) * output.layout.rows_per_sample or config.decode.limit
    written = list(counted("decode", files, "files", wanted))
    if missing := set(config.decode.keys) - {key for key, _ in written}:
        raise ConfigError(f"decode.keys: {output.url} has no rows with keys {', '.join(_why_missing(output, missing))}")
    print(f"decode: {len(written)} files in {folder}")
    return 0


def _why_missing(output: Output, keys: set[str]) -> list[str]:
    """Each key, with the reason if it is in quarantine."""
    histories = [history for history in output.committed_shards() if history.num_quarantined]
    why = {
        sample.key: f"{sample.key} (in quarantine, shard {history.first.source_shard}: {sample.message})"
        for history in histories
        for sample in output.quarantined(history.last)
        if sample.key in keys
    }
    return [why.get(key, key) for key in sorted(keys)]


def _chosen(config: Config, views: Views | None) -> Iterator[dict[str, Any]]:
    columns = ("source_shard", "source_index", *SIZE_COLUMNS, *(("view",) if views else ()))
    rows = iter(TokenDataset(config.output, columns=columns, rank=0, world_size=1))
    if config.decode.keys:
        wanted = set(config.decode.keys)
        yield from (row for row in rows if row["key"] in wanted)
        return
    for _, row in zip(range(config.decode.limit), rows, strict=False):
        yield row


def _write(row: dict[str, Any], tokenizer: Tokenizer, folder: str, views: Views | None) -> tuple[str, str]:
    array = decoded(row, tokenizer, views)
    shard = row["source_shard"].rsplit("/", 1)[1].split(".")[0]
    view = f"-view{row['view']}" if views else ""
    name = _file_name(f"{shard}-{row['source_index']:06d}-{row['key']}{view}")
    url = storage.join(folder, f"{name}.{tokenizer.modality.written_as}")
    storage.replace(url, tokenizer.modality.to_bytes(array))
    return row["key"], url


def decoded(row: dict[str, Any], tokenizer: Tokenizer, views: Views | None) -> np.ndarray:
    """The sample or view without the padding of the encoder. The size in a row is that of the whole sample."""
    modality = tokenizer.modality
    if views is None:
        [array] = tokenizer.decode([row["tokens"]], [{name: row[name] for name in modality.size_columns}])
        return array
    [padded] = tokenizer.decode([row["tokens"]])
    return modality.crop(padded, modality.view_length(views.crop), (0.0, 0.0, False))


def _file_name(text: str) -> str:
    """The text without characters that file names lack. A long one is cut, with a hash of the rest of it."""
    name = re.sub(r"[^\w.-]", "_", text)
    if len(name.encode()) <= MAX_NAME:
        return name
    start = name.encode()[: MAX_NAME - 17].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
