"""Decodes token rows to images or audio files: `output`, `decode.output`, and `decode.keys` or `decode.limit`."""

import re
from collections.abc import Iterator
from typing import Any

from jobs.artifacts import load_tokenizer, writer_url
from jobs.config import Config, ConfigError
from jobs.status import open_output
from pipeline import storage
from pipeline.tokens import TokenDataset
from pipeline.tokens.schema import SIZE_COLUMNS
from tokenizer.tokenizer import Tokenizer


def run(config: Config) -> int:
    config.require("output", "decode.output")
    folder = storage.normalise(config.decode.output)
    output = open_output(config.output)
    tokenizer = load_tokenizer(writer_url(output, config))
    written = [_write(row, tokenizer, folder) for row in _chosen(config)]
    missing = set(config.decode.keys) - {key for key, _ in written}
    if missing:
        raise ConfigError(f"decode.keys: {output.url} has no rows with keys {', '.join(sorted(missing))}")
    print(f"decode: {len(written)} files in {folder}")
    return 0


def _chosen(config: Config) -> Iterator[dict[str, Any]]:
    rows = iter(TokenDataset(config.output, columns=("source_shard", "source_index", *SIZE_COLUMNS)))
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
    name = re.sub(r"[^\w.-]", "_", f"{shard}-{row['source_index']:06d}-{row['key']}")
    url = storage.join(folder, f"{name}.{tokenizer.modality.written_as}")
    storage.replace(url, tokenizer.modality.to_bytes(array))
    return row["key"], url
