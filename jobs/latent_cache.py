"""RUN/latents: an output like that of `tokenize`, whose rows hold latents [..., in_dim] in place of tokens.

Written once, so that another codebook, and tokens from it, need no second look at the pixels.
"""

import io
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.config import ConfigError, TokensConfig
from jobs.reading import TokenizedShard
from pipeline.errors import ShardError
from pipeline.manifest import Shard
from pipeline.tokens import Output, TokenRow
from pipeline.tokens.entry import what_changed
from pipeline.tokens.layout import SIZE_COLUMNS, LatentLayout, tokens_as_lists
from tokenizer.latents import LatentEncoder
from tokenizer.tokenizer import Tokenizer

ROWS_AT_ONCE = 256


def layout_of(encoder: LatentEncoder, options: TokensConfig) -> LatentLayout:
    return LatentLayout(
        tokenizer_id=encoder.encoder_id,
        codebook_id="",
        codebook_size=0,
        modality=encoder.modality.name,
        index_order="",
        preprocessing=json.dumps(encoder.preprocessing, sort_keys=True),
        encoding="packed",
        passthrough=tuple(options.passthrough),
    )


def open_cache(url: str, tokenizer: Tokenizer, shards: list[Shard], options: TokensConfig) -> Output:
    """Raises ConfigError where the tokens of these shards cannot be made from it."""
    try:
        cache = Output.open(url)
    except FileNotFoundError as error:
        raise ConfigError(f"tokens.latents: {error}; `tokenmill codebook codebook.cache=true` makes one") from error
    if not isinstance(cache.layout, LatentLayout):
        raise ConfigError(f"tokens.latents: {url} holds tokens, not latents")
    if cache.layout.tokenizer_id != tokenizer.encoder_id:
        raise ConfigError(
            f"tokens.latents: {url} holds those of encoder {cache.layout.tokenizer_id}, and the tokenizer's encoder is "
            f"{tokenizer.encoder_id}: the nets or data.preprocess differ"
        )
    if unknown := sorted(set(options.passthrough) - set(cache.layout.passthrough)):
        raise ConfigError(
            f"tokens.passthrough: {unknown[0]} is not in {url}; leave it out, or tokenize from the shards themselves"
        )
    done = cache.committed_names()
    if missing := [shard.url for shard in shards if shard.name not in done]:
        raise ConfigError(
            f"tokens.latents: {url} lacks {len(missing)} of {len(shards)} shards, the first {missing[0]}; "
            "run `tokenmill codebook codebook.cache=true` over them"
        )
    return cache


def tokenize_cached(shard: Shard, cache: Output, tokenizer: Tokenizer, options: TokensConfig) -> TokenizedShard:
    """As `tokenize_shard`, from the latents that it left; what was bad then is still. Raises ShardError."""
    started = time.monotonic()
    history = cache.history(shard.name)
    if history is None:
        raise ShardError(f"{shard.url}: its latents are no longer in {cache.url}")
    if changed := what_changed(history.first, shard):
        raise ShardError(f"{shard.url} {changed} when its latents were made: it was replaced")
    rows: list[TokenRow] = []
    kept = read_rows(cache, shard.name, options.passthrough)
    read_s = time.monotonic() - started
    for i in range(0, len(kept), ROWS_AT_ONCE):
        some = kept[i : i + ROWS_AT_ONCE]
        grids = tokenizer.quantize([torch.from_numpy(row.tokens).to(tokenizer.device) for row in some])
        rows += [replace(row, tokens=grid) for row, grid in zip(some, grids, strict=True)]
    total = time.monotonic() - started
    seconds = {"read": read_s, "encode": total - read_s, "total": total}
    return TokenizedShard(rows, cache.quarantined(history.first), history.first.num_samples, seconds)


def read_rows(cache: Output, name: str, passthrough: list[str]) -> list[TokenRow]:
    """The rows of one shard. passthrough: the columns to keep of those that the cache has."""
    table = pq.read_table(io.BytesIO(cache.read_tokens(name)))
    columns = {
        column: table[column].to_pylist() for column in ("key", "source_index", "shape", *SIZE_COLUMNS, *passthrough)
    }
    rows = []
    for i, flat in enumerate(_flat_latents(table, cache)):
        size = {column: columns[column][i] for column in SIZE_COLUMNS if columns[column][i] is not None}
        members = {column: columns[column][i] for column in passthrough if columns[column][i] is not None}
        as_bytes = {column: v.encode() if isinstance(v, str) else v for column, v in members.items()}
        latents = flat.reshape(columns["shape"][i])
        rows.append(TokenRow(columns["key"][i], columns["source_index"][i], latents, size, as_bytes))
    return rows


def read_latents(cache: Output, name: str, dim: int) -> np.ndarray:
    """All latents of one shard, in the order of its samples: [N, dim] float32."""
    table = pq.read_table(io.BytesIO(cache.read_tokens(name)), columns=["tokens"])
    if not len(table):
        return np.empty((0, dim), np.float32)
    return np.array(tokens_as_lists(table["tokens"].combine_chunks(), cache.layout.token_dtype).values).reshape(-1, dim)


def _flat_latents(table: pa.Table, cache: Output) -> Iterator[np.ndarray]:
    if not len(table):
        return
    lists = tokens_as_lists(table["tokens"].combine_chunks(), cache.layout.token_dtype)
    values, ends = np.array(lists.values), lists.offsets.to_numpy()
    yield from (values[start:stop] for start, stop in itertools.pairwise(ends))
