"""Makes a page that shows a token output: `tokenmill view OUT`, or `output`, `view.limit`, `view.seed`, `view.page`.

It decodes a random sample of rows, drawn from at most 16 shards, and shows them with their tokens and sizes, how often
each code occurs in these shards, the lengths of their rows, and quarantined samples with their reasons. The page says
how much of the output it is based on. Needs no cluster.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.artifacts import load_tokenizer, writer_url
from jobs.audit import draw
from jobs.config import Config, ConfigError
from jobs.decode import decoded
from jobs.outputs import open_output
from jobs.reports.pages.example import Example
from jobs.reports.pages.gallery import GalleryReport, GalleryRow, gallery_page
from pipeline import storage
from pipeline.tokens import Output, Quarantined
from pipeline.tokens.commit import Commit
from pipeline.tokens.output import REPAIR_AND_RERUN
from pipeline.tokens.schema import SIZE_COLUMNS, read_parquet, tokens_as_lists, views_of
from tokenizer.tokenizer import Tokenizer
from tokenizer.usage import count_codes

MOST_SHARDS = 16
MOST_QUARANTINED = 500
FIXED = ("key", "source_shard", "source_index", "modality", "tokens", "shape", "view", *SIZE_COLUMNS)
MOST_TEXT = 300  # characters of a passthrough column


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    tokenizer = load_tokenizer(writer_url(output, config))
    entries = [entry for entry in output.commits() if entry.num_rows]
    if not entries:
        raise ConfigError(f"{output.url} has no rows yet; run `tokenmill tokenize` first")
    report = _report(output, tokenizer, entries, config)
    page = storage.normalise(config.view.page) if config.view.page else f"{output.url.rstrip('/')}-view.html"
    storage.replace(page, gallery_page(report, tokenizer))
    print(
        f"view: {len(report.rows)} of {report.num_rows} rows, {len(report.quarantined)} quarantined samples, at {page}"
    )
    return 0


def _report(output: Output, tokenizer: Tokenizer, entries: list[Commit], config: Config) -> GalleryReport:
    rng = np.random.default_rng(config.view.seed)
    chosen = sorted(rng.choice(len(entries), size=min(MOST_SHARDS, len(entries)), replace=False).tolist())
    read = [entries[i] for i in chosen]
    drawn = draw(read, config.view.limit, config.view.seed)
    report = GalleryReport(output.url, config.command, output.about(), num_shards=len(entries), num_read=len(read))
    report.num_rows = sum(entry.num_rows for entry in entries)
    quantizer = tokenizer.autoencoder.quantizer
    report.counts = np.zeros((quantizer.num_quantizers, quantizer.codebook_size), dtype=np.int64)
    for entry in read:
        _add(report, output, entry, drawn.get(entry.name, []), tokenizer)
    shards = output.committed_shards()
    report.num_quarantined = sum(shard.num_quarantined for shard in shards)
    report.quarantined = list(itertools.islice(_quarantined(output), MOST_QUARANTINED))
    return report


def _add(report: GalleryReport, output: Output, entry: Commit, drawn: list[int], tokenizer: Tokenizer) -> None:
    """Counts the tokens of a shard, and decodes its drawn rows."""
    table = _table(output, entry)
    grids = _grids(table, output)
    for grid in grids:
        report.counts += count_codes(grid.reshape(len(report.counts), -1), report.counts.shape[1])
        report.lengths.append(int(grid.size))
    if not drawn:
        return
    chosen = table.take(drawn)
    for place, view, row in zip(drawn, views_of(chosen), chosen.drop_columns(["tokens"]).to_pylist(), strict=True):
        row |= {"tokens": grids[place], "view": view}
        array = decoded(row, tokenizer, output.layout.views)
        modality = tokenizer.modality
        example = Example(
            row["key"], modality.mime, (modality.view(array),), (modality.to_bytes(array),), {}, grids[place]
        )
        report.rows.append(GalleryRow(example, row["source_shard"], row["source_index"], view, _size(row), _texts(row)))


def _table(output: Output, entry: Commit) -> pa.Table:
    try:
        return read_parquet(output.read_tokens(entry.name))
    except FileNotFoundError as error:
        raise ConfigError(f"{output.tokens_url(entry.name)} is missing; {REPAIR_AND_RERUN}") from error
    except ValueError as error:
        raise ConfigError(f"{output.tokens_url(entry.name)}: {error}; {REPAIR_AND_RERUN}") from error


def _grids(table: pa.Table, output: Output) -> list[np.ndarray]:
    lists = tokens_as_lists(table["tokens"].combine_chunks(), output.layout.token_dtype)
    shapes = table["shape"].to_pylist()
    return [np.array(tokens.values).reshape(shape) for tokens, shape in zip(lists, shapes, strict=True)]


def _size(row: dict[str, Any]) -> dict[str, int]:
    return {name: row[name] for name in SIZE_COLUMNS if row.get(name) is not None}


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """The passthrough columns of a row, as text."""
    return {name: _shown(value) for name, value in row.items() if name not in FIXED and value is not None}


def _shown(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _quarantined(output: Output) -> Iterator[tuple[str, Quarantined]]:
    """The URL of the shard and the sample, for all shards."""
    for history in output.committed_shards():
        if history.num_quarantined:
            for sample in output.quarantined(history.last):
                yield history.first.source_shard, sample
