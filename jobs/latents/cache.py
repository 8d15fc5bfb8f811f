"""The cache RUN/latents: an output like that of `tokenize`, but its rows hold latents [..., in_dim] instead of tokens.

With it, further codebooks, and tokens from them, need no second pass over the samples.
"""

import hashlib
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.config import ConfigError, TokensConfig
from jobs.shards import EncodedShard
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError
from pipeline.tokens import Output, TokenRow
from pipeline.tokens.commit import Commit, what_changed
from pipeline.tokens.schema import LATENT_DTYPE, SIZE_COLUMNS, tokens_as_lists
from tokenizer.tokenizer import Tokenizer

MAX_BATCH = 2**18  # numbers (latents times channels) that are quantized together


def open_cache(url: str, tokenizer: Tokenizer, shards: list[Shard], options: TokensConfig) -> Output:
    """Opens the cache. Raises ConfigError if it cannot give this tokenizer's tokens of these shards."""
    try:
        cache = Output.open(url)
    except FileNotFoundError as error:
        raise ConfigError(f"tokens.latents: {error}; make one with `tokenmill codebook codebook.cache=true`") from error
    if not cache.layout.holds_latents:
        raise ConfigError(
            f"tokens.latents: {url} holds tokens, not latents; give the URL of a cache such as RUN/latents"
        )
    if cache.layout.tokenizer_id != tokenizer.encoder_id:
        raise ConfigError(
            f"tokens.latents: {url} was written by encoder {cache.layout.tokenizer_id}, but the tokenizer has encoder "
            f"{tokenizer.encoder_id}: the nets or data.preprocess differ; use a cache of the same run"
        )
    if unknown := sorted(set(options.passthrough) - set(cache.layout.passthrough)):
        raise ConfigError(
            f"tokens.passthrough: {unknown[0]} is not in {url}; leave it out, or leave tokens.latents empty"
        )
    done = cache.committed_names()
    if missing := [shard.url for shard in shards if shard.name not in done]:
        raise ConfigError(
            f"tokens.latents: {url} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]}; "
            "add them with `tokenmill codebook codebook.cache=true`"
        )
    return cache


def tokenize_cached(
    shard: Shard,
    cache: Output,
    tokenizer: Tokenizer,
    options: TokensConfig,
    device_lock: threading.Lock,
    tick: Callable[[], None],
) -> EncodedShard:
    """Like `encode_shard`, but from cached latents. Samples that were quarantined then still are. Raises ShardError."""
    start = time.monotonic()
    history = cache.committed_shard(shard.name)
    if history is None:
        raise ShardError(f"{shard.url}: its latents are no longer in {cache.url}")
    if changed := what_changed(history.first, shard):
        raise ShardError(f"{shard.url} {changed} when its latents were cached: it was replaced")
    rows: list[TokenRow] = []
    latents = read_rows(cache, history.first, options.passthrough)
    read_s = time.monotonic() - start
    for batch in _batches(latents):
        tick()
        with device_lock:
            grids = tokenizer.quantize([torch.from_numpy(row.tokens).to(tokenizer.device) for row in batch])
        rows += [replace(row, tokens=grid) for row, grid in zip(batch, grids, strict=True)]
    total = time.monotonic() - start
    seconds = {"read": read_s, "encode": total - read_s, "total": total}
    first = history.first
    return EncodedShard(rows, cache.quarantined(first), first.num_samples, seconds, first.notes)


def _batches(rows: list[TokenRow]) -> Iterator[list[TokenRow]]:
    batch: list[TokenRow] = []
    for row in rows:
        if batch and sum(one.tokens.size for one in batch) + row.tokens.size > MAX_BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def read_rows(cache: Output, entry: Commit, passthrough: list[str]) -> list[TokenRow]:
    """The rows of one shard. passthrough: which of the cache's columns to keep. Raises ShardError."""
    table = _read_table(cache, entry)
    columns = {
        column: table[column].to_pylist() for column in ("key", "source_index", "shape", *SIZE_COLUMNS, *passthrough)
    }
    rows = []
    for i, flat in enumerate(_flat_latents(table)):
        size = {column: columns[column][i] for column in SIZE_COLUMNS if columns[column][i] is not None}
        members = {column: columns[column][i] for column in passthrough if columns[column][i] is not None}
        as_bytes = {column: v.encode() if isinstance(v, str) else v for column, v in members.items()}
        latents = flat.reshape(columns["shape"][i])
        rows.append(TokenRow(columns["key"][i], columns["source_index"][i], latents, size, as_bytes))
    return rows


def read_latents(cache: Output, entry: Commit, dim: int) -> np.ndarray:
    """All latents of one shard, in the order of its samples: [N, dim] float32. Raises ShardError."""
    rows = list(_flat_latents(_read_table(cache, entry, ["tokens"])))
    return np.concatenate(rows).reshape(-1, dim) if rows else np.empty((0, dim), np.float32)


def _read_table(cache: Output, entry: Commit, columns: list[str] | None = None) -> pa.Table:
    data = cache.read_tokens(entry.name)
    if hashlib.sha256(data).hexdigest() != entry.tokens_sha256:
        raise ShardError(
            f"{cache.tokens_url(entry.name)} is not the file that was committed; delete {cache.url} and rerun "
            "`tokenmill codebook`"
        )
    return pq.read_table(io.BytesIO(data), columns=columns)


def _flat_latents(table: pa.Table) -> Iterator[np.ndarray]:
    """The latents of each row, [n * dim]. Chunk by chunk, since one Arrow array of bytes may be too small for all."""
    for chunk in table["tokens"].chunks:
        lists = tokens_as_lists(chunk, LATENT_DTYPE)
        values, ends = np.array(lists.values), lists.offsets.to_numpy()
        yield from (values[start:stop] for start, stop in itertools.pairwise(ends))
