"""Tokenizes a random sample of committed rows again and compares: `output`, `tokenizer`, `audit.rows`, `audit.seed`.

Reads the input shards that hold them, each once, and writes nothing. Every token must be the same; exit code 3 if one
is not, or if a sample cannot be read and tokenized any more. `tokenizer`: the run's only one if empty.
"""

import io
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import cluster
from jobs.config import Config, TokensConfig
from jobs.frozen import load_tokenizer, writer_url
from jobs.progress import Progress
from jobs.reading import Tally, decoded_batches, rows_of
from jobs.shard_pool import ShardWorker, map_shards
from jobs.status import open_output
from pipeline.manifest import Shard, look_up
from pipeline.tokens import Commit, Output, Quarantined, TokenRow
from pipeline.tokens.entry import shard_name
from pipeline.tokens.layout import tokens_as_lists

SHOWN = 10
Drawn = dict[str, list[int]]  # name of an entry: which of its rows


@dataclass
class Part:
    """What one shard adds. differing: sentences that begin with the key. failure: why it could not be compared."""

    num_rows: int = 0
    num_tokens: int = 0
    num_tokens_differing: int = 0
    differing: list[str] = field(default_factory=list)
    failure: str | None = None


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    url = writer_url(output, config)
    entries = [entry for entry in output.commits() if entry.num_rows]
    drawn = draw(entries, config.audit.rows, config.audit.seed)
    urls = sorted({entry.source_shard for entry in entries if entry.name in drawn})
    shards = look_up(urls).shards
    output.refuse_replaced(shards)
    return _outcome(_compare(shards, drawn, url, output, config), output)


def draw(entries: list[Commit], count: int, seed: int) -> Drawn:
    """`count` rows of the entries, or all if there are fewer, each as likely as any other."""
    starts = np.cumsum([0] + [entry.num_rows for entry in entries])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    drawn: Drawn = {}
    for row, which in zip(chosen.tolist(), (np.searchsorted(starts, chosen, side="right") - 1).tolist(), strict=True):
        drawn.setdefault(entries[which].name, []).append(row - int(starts[which]))
    return drawn


def _compare(shards: list[Shard], drawn: Drawn, url: str, output: Output, config: Config) -> list[Part]:
    if not shards:
        return []
    cluster.start()
    settings = {"tokenizer_url": url, "output_url": output.url, "options": config.tokens, "drawn": drawn}
    progress = Progress("audit", total=len(shards), unit="shards")
    parts = []
    for part in map_shards(shards, AuditWorker, settings, config.workers):
        parts.append(part)
        progress.advance(rows=part.num_rows, differing=len(part.differing))
    progress.close()
    return parts


def _outcome(parts: list[Part], output: Output) -> int:
    failures = [part.failure for part in parts if part.failure]
    differing = sorted(row for part in parts for row in part.differing)
    for failure in failures[:SHOWN]:
        print(f"audit: not compared: {failure}")
    for row in differing[:SHOWN]:
        print(f"audit: differs: {row}")
    rows, tokens = sum(part.num_rows for part in parts), sum(part.num_tokens for part in parts)
    wrong = sum(part.num_tokens_differing for part in parts)
    print(
        f"audit: {rows - len(differing)} of {rows} rows exactly as in {output.url}; {wrong} of {tokens} tokens differ"
    )
    if failures or differing:
        print(f"audit: FAILED: {len(differing)} rows differ, {len(failures)} shards could not be compared")
        return 3
    print(f"audit: tokenizer {output.layout.tokenizer_id} gives every drawn row again" if rows else "audit: no rows")
    return 0


class AuditWorker(ShardWorker):
    """Holds the tokenizer, and makes the drawn rows of one shard after the other again."""

    def __init__(self, tokenizer_url: str, output_url: str, options: TokensConfig, drawn: Drawn, **resources: Any):
        super().__init__(**resources)
        self.tokenizer = load_tokenizer(tokenizer_url, self.device)
        self.output = Output.open(output_url)
        self.options, self.drawn = options, drawn

    def process(self, shard: Shard) -> Part:
        try:
            stored = self._stored(shard)
            rows, quarantined = self._again(shard, stored)
        except (OSError, pa.ArrowInvalid) as error:
            return Part(failure=str(error))
        part = Part(num_rows=len(stored))
        reasons = {sample.source_index: f"{sample.stage}: {sample.message}" for sample in quarantined}
        for index, row in stored.items():
            part.num_tokens += row.tokens.size
            part.num_tokens_differing += _num_differing(row.tokens, rows.get(index))
            if what := _difference(row, rows.get(index), reasons.get(index, "the shard ends before it")):
                part.differing.append(f"{row.key} (sample {index} of {shard.url}): {what}")
        return part

    @staticmethod
    def failed(shard: Shard, reason: str) -> Part:
        return Part(failure=f"{shard.url}: {reason}")

    def _stored(self, shard: Shard) -> dict[int, TokenRow]:
        """The drawn rows of a shard by source_index, as they were committed."""
        stored: dict[int, TokenRow] = {}
        for name in (name for name in self.drawn if shard_name(name) == shard.name):
            data = io.BytesIO(self.output.read_tokens(name))
            table = pq.read_table(data, columns=["key", "source_index", "tokens", "shape"]).take(self.drawn[name])
            lists = tokens_as_lists(table["tokens"].combine_chunks(), self.output.layout.token_dtype)
            columns = (table[column].to_pylist() for column in ("key", "source_index", "shape"))
            for tokens, key, index, shape in zip(lists, *columns, strict=True):
                stored[index] = TokenRow(key, index, np.array(tokens.values).reshape(shape), {})
        return stored

    def _again(self, shard: Shard, stored: Collection[int]) -> tuple[dict[int, TokenRow], list[Quarantined]]:
        rows: dict[int, TokenRow] = {}
        quarantined: list[Quarantined] = []
        batches = decoded_batches(
            *(shard.url, self.tokenizer, self.options, quarantined),
            version=shard.version,
            only=stored,
            tally=Tally(partial(self.tick, shard)),
        )
        for batch in batches:
            rows |= {row.source_index: row for row in rows_of(batch, self.tokenizer, (), quarantined)}
            self.tick(shard)
        return rows, quarantined


def _num_differing(tokens: np.ndarray, row: TokenRow | None) -> int:
    same_grid = row is not None and row.tokens.shape == tokens.shape
    return int((row.tokens != tokens).sum()) if same_grid else tokens.size  # type: ignore[union-attr]


def _difference(stored: TokenRow, again: TokenRow | None, reason: str) -> str | None:
    """What is not the same, in words; None if all is."""
    if again is None:
        return f"cannot be tokenized any more ({reason})"
    if again.key != stored.key:
        return f"the shard has {again.key!r} in its place"
    if again.tokens.shape != stored.tokens.shape:
        return f"shape {again.tokens.shape}, committed {stored.tokens.shape}"
    wrong = _num_differing(stored.tokens, again)
    return f"{wrong} of {stored.tokens.size} tokens" if wrong else None
