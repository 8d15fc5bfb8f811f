"""RUN/latents: an output like that of `tokenize`, whose rows hold latents [..., in_dim] in place of tokens.

Written once, so that another codebook, and tokens from it, need no second look at the pixels.
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
from pipeline.tokens import Output, ShardLayout, TokenRow
from pipeline.tokens.commit import Commit, what_changed
from pipeline.tokens.schema import LATENT_DTYPE, SIZE_COLUMNS, tokens_as_lists
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import Tokenizer

LATENTS_AT_ONCE = 2**18  # channels counted: of the rows that are quantized together


def latent_layout(encoder: LatentEncoder, options: TokensConfig) -> ShardLayout:
    """The layout of every shard in the cache."""
    return ShardLayout.for_latents(
        encoder_id=encoder.encoder_id,
        modality=encoder.modality.name,
        preprocessing=encoder.preprocessing,
        passthrough=options.passthrough,
    )


def open_cache(url: str, tokenizer: Tokenizer, shards: list[Shard], options: TokensConfig) -> Output:
    """Raises ConfigError where the tokens of these shards cannot be made from it."""
    try:
        cache = Output.open(url)
    except FileNotFoundError as error:
        raise ConfigError(f"tokens.latents: {error}; `tokenmill codebook codebook.cache=true` makes one") from error
    if not cache.layout.holds_latents:
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


def tokenize_cached(
    shard: Shard,
    cache: Output,
    tokenizer: Tokenizer,
    options: TokensConfig,
    device_lock: threading.Lock,
    tick: Callable[[], None],
) -> EncodedShard:
    """As `encode_shard`, from the latents that it left; what was bad then is still. Raises ShardError."""
    started = time.monotonic()
    history = cache.committed_shard(shard.name)
    if history is None:
        raise ShardError(f"{shard.url}: its latents are no longer in {cache.url}")
    if changed := what_changed(history.first, shard):
        raise ShardError(f"{shard.url} {changed} when its latents were made: it was replaced")
    rows: list[TokenRow] = []
    kept = read_rows(cache, history.first, options.passthrough)
    read_s = time.monotonic() - started
    for some in _batched(kept):
        tick()
        with device_lock:
            grids = tokenizer.quantize([torch.from_numpy(row.tokens).to(tokenizer.device) for row in some])
        rows += [replace(row, tokens=grid) for row, grid in zip(some, grids, strict=True)]
    total = time.monotonic() - started
    seconds = {"read": read_s, "encode": total - read_s, "total": total}
    return EncodedShard(rows, cache.quarantined(history.first), history.first.num_samples, seconds)


def _batched(rows: list[TokenRow]) -> Iterator[list[TokenRow]]:
    some: list[TokenRow] = []
    for row in rows:
        if some and sum(one.tokens.size for one in some) + row.tokens.size > LATENTS_AT_ONCE:
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def read_rows(cache: Output, entry: Commit, passthrough: list[str]) -> list[TokenRow]:
    """The rows of one shard. passthrough: the columns to keep of those that the cache has. Raises ShardError."""
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
    parts = list(_flat_latents(_read_table(cache, entry, ["tokens"])))
    return np.concatenate(parts).reshape(-1, dim) if parts else np.empty((0, dim), np.float32)


def _read_table(cache: Output, entry: Commit, columns: list[str] | None = None) -> pa.Table:
    data = cache.read_tokens(entry.name)
    if hashlib.sha256(data).hexdigest() != entry.tokens_sha256:
        raise ShardError(f"{cache.tokens_url(entry.name)} is not the file that was committed; delete {cache.url}")
    return pq.read_table(io.BytesIO(data), columns=columns)


def _flat_latents(table: pa.Table) -> Iterator[np.ndarray]:
    """Of each row [n * dim]. Chunk by chunk: together they may exceed what one Arrow array of bytes can hold."""
    for chunk in table["tokens"].chunks:
        lists = tokens_as_lists(chunk, LATENT_DTYPE)
        values, ends = np.array(lists.values), lists.offsets.to_numpy()
        yield from (values[start:stop] for start, stop in itertools.pairwise(ends))
