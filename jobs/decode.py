"""Decodes token rows to images or audio files: `output`, `decode.output`, and `decode.keys` or `decode.limit`."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from jobs.artifacts import load_tokenizer, writer_url
from jobs.config import Config, ConfigError
from jobs.outputs import open_output
from jobs.reports.progress import counted
from pipeline import storage
from pipeline.tokens import Output, TokenDataset
from pipeline.tokens.schema import SIZE_COLUMNS
from tokenizer.tokenizer import Tokenizer

MAX_NAME = 200  # bytes; file systems allow 255, for the extension and the suffix of an unfinished file too


def run(config: Config) -> int:
    config.require("output", "decode.output")
    folder = storage.normalise(config.decode.output)
    output = open_output(config.output)
    tokenizer = load_tokenizer(writer_url(output, config))
    files = (_write(row, tokenizer, folder) for row in _chosen(config))
    written = list(counted("decode", files, "files", len(config.decode.keys) or config.decode.limit))
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


def _chosen(config: Config) -> Iterator[dict[str, Any]]:
    columns = ("source_shard", "source_index", *SIZE_COLUMNS)
    rows = iter(TokenDataset(config.output, columns=columns, rank=0, world_size=1))
    if config.decode.keys:
        wanted = set(config.decode.keys)
        yield from (row for row in rows if row["key"] in wanted)
        return
    for _, row in zip(range(config.decode.limit), rows, strict=False):
        yield row


def _write(row: dict[str, Any], tokenizer: Tokenizer, folder: str) -> tuple[str, str]:
    size = {name: row[name] for name in tokenizer.modality.size_columns}
    [array] = tokenizer.decode([row["tokens"]], [size])
    shard = row["source_shard"].rsplit("/", 1)[1].split(".")[0]
    name = _file_name(f"{shard}-{row['source_index']:06d}-{row['key']}")
    url = storage.join(folder, f"{name}.{tokenizer.modality.written_as}")
    storage.replace(url, tokenizer.modality.to_bytes(array))
    return row["key"], url


def _file_name(text: str) -> str:
    """The text without characters that file names lack. A long one is cut, with a hash of the rest of it."""
    name = re.sub(r"[^\w.-]", "_", text)
    if len(name.encode()) <= MAX_NAME:
        return name
    start = name.encode()[: MAX_NAME - 17].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
