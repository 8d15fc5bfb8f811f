"""Tokenizes a random sample of committed rows again and compares: `output`, `tokenizer`, `audit.rows`, `audit.seed`.

Reads each input shard of the sample once, and writes nothing. Exits with code 3 if any token differs, or if a sample
can no longer be read or tokenized. `tokenizer`: by default the only one of the run.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.actors.run import SHOWN, EncodeWorker, ShardResult, run_shards
from jobs.artifacts import load_tokenizer, writer_url
from jobs.config import Config
from jobs.outputs import open_output
from jobs.shards import encode_shard
from pipeline.corpus.shards import Shard, look_up
from pipeline.errors import ShardError
from pipeline.tokens import Commit, Output, TokenRow
from pipeline.tokens.commit import shard_name
from pipeline.tokens.output import REPAIR_AND_RERUN
from pipeline.tokens.schema import read_parquet, tokens_as_lists, views_of
from tokenizer.tokenizer import Tokenizer


@dataclass
class Compared(ShardResult):
    """differing: a sentence for each row that differs, beginning with its key."""

    num_rows: int = 0
    num_tokens: int = 0
    num_tokens_differing: int = 0
    differing: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, float]:
        return {"rows": self.num_rows, "differing": len(self.differing)}


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    url = writer_url(output, config)
    entries = [entry for entry in output.commits() if entry.num_rows]
    drawn = draw(entries, config.audit.rows, config.audit.seed)
    urls = sorted({entry.source_shard for entry in entries if entry.name in drawn})
    shards = look_up(urls).shards
    output.refuse_replaced(shards)
    settings = {"load": partial(load_tokenizer, url), "options": replace(config.tokens, passthrough=[])}
    settings |= {"output_url": output.url, "drawn": drawn, "member": output.layout.member}
    results = list(run_shards("audit", shards, AuditWorker, settings, config.workers)) if shards else []
    return _outcome(results, output)


def draw(entries: list[Commit], count: int, seed: int) -> dict[str, list[int]]:
    """A uniform sample of `count` rows (all if there are fewer): name of an entry -> numbers of its rows."""
    starts = np.cumsum([0] + [entry.num_rows for entry in entries])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    drawn: dict[str, list[int]] = {}
    for row, which in zip(chosen.tolist(), (np.searchsorted(starts, chosen, side="right") - 1).tolist(), strict=True):
        drawn.setdefault(entries[which].name, []).append(row - int(starts[which]))
    return drawn


def _outcome(results: list[Compared], output: Output) -> int:
    failures = [result.failure for result in results if result.failure]
    differing = sorted(row for result in results for row in result.differing)
    for failure in failures[:SHOWN]:
        print(f"audit: not compared: {failure.splitlines()[0]}")
    for row in differing[:SHOWN]:
        print(f"audit: differs: {row}")
    rows, tokens = sum(result.num_rows for result in results), sum(result.num_tokens for result in results)
    wrong = sum(result.num_tokens_differing for result in results)
    same = rows - len(differing)
    print(f"audit: {same} of {rows} rows are the same as in {output.url}; {wrong} of {tokens} tokens differ")
    if failures or differing:
        print(f"audit: FAILED: {len(differing)} rows differ, {len(failures)} shards could not be compared")
        return 3
    print(f"audit: tokenizer {output.layout.tokenizer_id} reproduces every row" if rows else "audit: no rows")
    return 0


class AuditWorker(EncodeWorker[Tokenizer]):
    """Encodes the drawn rows of a shard again and compares them."""

    result = Compared

    def __init__(self, output_url: str, drawn: dict[str, list[int]], **rest: Any):
        super().__init__(**rest)
        self.output, self.drawn = Output.open(output_url), drawn

    def work(self, shard: Shard) -> ShardResult:
        stored = self._stored(shard)
        tick = partial(self.tick, shard)
        encoded = encode_shard(
            shard,
            self.encoder,
            self.options,
            self.device_lock,
            tick,
            only={index for index, _ in stored},
            member=self.member,
            views=self.output.layout.views,
        )
        again = {row.place: row for row in encoded.rows}
        reasons = {sample.source_index: f"{sample.stage}: {sample.message}" for sample in encoded.quarantined}
        compared = Compared(shard, num_rows=len(stored))
        for place, row in stored.items():
            compared.num_tokens += row.tokens.size
            compared.num_tokens_differing += _num_differing(row.tokens, again.get(place))
            reason = reasons.get(row.source_index, "the shard ends before it")
            if difference := _difference(row, again.get(place), reason):
                view = "" if row.view is None else f", view {row.view}"
                compared.differing.append(f"{row.key} (sample {row.source_index}{view} of {shard.url}): {difference}")
        return compared

    def _stored(self, shard: Shard) -> dict[tuple[int, int], TokenRow]:
        """The drawn rows of a shard as committed, by their place."""
        stored: dict[tuple[int, int], TokenRow] = {}
        for name in (name for name in self.drawn if shard_name(name) == shard.name):
            table = self._table(name).take(self.drawn[name])
            lists = tokens_as_lists(table["tokens"].combine_chunks(), self.output.layout.token_dtype)
            columns = (table[column].to_pylist() for column in ("key", "source_index", "shape"))
            for tokens, view, key, index, shape in zip(lists, views_of(table), *columns, strict=True):
                row = TokenRow(key, index, np.array(tokens.values).reshape(shape), {}, view=view)
                stored[row.place] = row
        return stored

    def _table(self, name: str) -> pa.Table:
        try:
            views = ["view"] if self.output.layout.views else []
            return read_parquet(self.output.read_tokens(name), ["key", "source_index", *views, "tokens", "shape"])
        except FileNotFoundError as error:
            raise ShardError(f"{self.output.tokens_url(name)} is missing; {REPAIR_AND_RERUN}") from error
        except ValueError as error:
            raise ShardError(f"{self.output.tokens_url(name)}: {error}; {REPAIR_AND_RERUN}") from error


def _num_differing(tokens: np.ndarray, row: TokenRow | None) -> int:
    same_grid = row is not None and row.tokens.shape == tokens.shape
    return int((row.tokens != tokens).sum()) if same_grid else tokens.size  # type: ignore[union-attr]


def _difference(stored: TokenRow, again: TokenRow | None, reason: str) -> str | None:
    """The difference in words; None if there is none. reason: why the sample gave no row now."""
    if again is None:
        return f"can no longer be tokenized ({reason})"
    if again.key != stored.key:
        return f"the shard now has {again.key!r} there"
    if again.tokens.shape != stored.tokens.shape:
        return f"shape is now {again.tokens.shape}, committed {stored.tokens.shape}"
    wrong = _num_differing(stored.tokens, again)
    return f"{wrong} of {stored.tokens.size} tokens differ" if wrong else None
