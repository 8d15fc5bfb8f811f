"""Shards to token shards: `tokenizer`, `data.shards`, `output`.

todo = shards without a manifest entry -> an actor per device reads a shard, decodes in threads, buckets by shape,
encodes, writes tokens and quarantine, and commits -> one small row of counts comes back.
"""

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.actors.run import FIX_AND_RERUN, EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import load_tokenizer, tokenizer_url
from jobs.config import Config, ConfigError, TokensConfig
from jobs.latents.cache import open_cache, tokenize_cached
from jobs.shards import EncodedShard, encode_shard
from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.tokens import Commit, Output, ShardLayout, commit_shard
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import INDEX_ORDER, Tokenizer


def run(config: Config) -> int:
    config.require("data.shards", "output")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    inputs = find_shards(config.data.shards)
    _refuse_uploaded(inputs)
    try:
        layout = token_layout(tokenizer, config.tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.tokens.latents:
        config.tokens.latents = open_cache(config.tokens.latents, tokenizer, inputs.shards, config.tokens).url
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(storage.normalise(config.output))
    output = Output.create(config.output, layout, inputs, config.to_dict())
    done = output.committed_names()
    todo = [shard for shard in inputs.shards if shard.name not in done]
    print(f"tokenize: {len(inputs.shards)} shards, {len(inputs.shards) - len(todo)} done before, {len(todo)} to do")
    failures = tokenize_shards(todo, url, output, config) if todo else []
    return _outcome(output, inputs.shards, failures, config)


def _refuse_uploaded(inputs: ShardList) -> None:
    """A shard's URL is its name in the output, and Ray's copies of a working directory have new ones each time."""
    for shard in inputs.shards:
        if "/working_dir_files/_ray_pkg_" in shard.url:
            raise ConfigError(
                f"data.shards: {shard.url} is Ray's copy of a working directory; give the whole path or URL"
            )


def tokenize_shards(todo: list[Shard], url: str, output: Output, config: Config) -> list[str]:
    """Runs the workers; returns what failed."""
    settings = {"load": partial(load_tokenizer, url), "output_url": output.url, "options": config.tokens}
    worker: type[TokenizeWorker] = TokenizeWorker
    if config.tokens.latents:
        worker, settings = CachedTokenizeWorker, settings | {"cache_url": config.tokens.latents}
    results = run_shards("tokenize", todo, worker, settings, config.workers)
    return [result.failure for result in results if result.failure]


def _outcome(output: Output, shards: list[Shard], failures: list[str], config: Config) -> int:
    print_failures("tokenize", failures)
    done = {history.first.name: history for history in output.committed_shards()}
    mine = [done[shard.name] for shard in shards if shard.name in done]
    rows, bad = sum(one.num_rows for one in mine), sum(one.num_quarantined for one in mine)
    print(f"tokenize: {rows} samples in {len(mine)} of {len(shards)} shards, {bad} quarantined, at {output.url}")
    if len(mine) < len(shards):
        print(f"tokenize: incomplete: {len(shards) - len(mine)} shards failed; {FIX_AND_RERUN}")
        return 3
    if bad > config.tokens.max_bad_fraction * max(1, rows + bad):
        print(f"tokenize: done, but {bad} quarantined exceed tokens.max_bad_fraction={config.tokens.max_bad_fraction}")
        return 4
    print("tokenize: done")
    return 0


def token_layout(tokenizer: Tokenizer, options: TokensConfig) -> ShardLayout:
    """The layout of every shard that this tokenizer writes."""
    return ShardLayout.for_tokens(
        tokenizer_id=tokenizer.id,
        codebook_id=tokenizer.codebook_id,
        codebook_size=tokenizer.codebook_size,
        modality=tokenizer.modality.name,
        index_order=INDEX_ORDER,
        preprocessing=tokenizer.preprocessing,
        encoding=options.encoding,
        passthrough=options.passthrough,
    )


@dataclass
class Committed(ShardResult):
    """What the commit of a shard has."""

    num_rows: int = 0
    num_quarantined: int = 0
    num_tokens: int = 0

    def counts(self) -> dict[str, float]:
        return {"samples": self.num_rows, "tokens": self.num_tokens, "quarantined": self.num_quarantined}


class TokenizeWorker(EncodeWorker[LatentEncoder]):
    """Takes shards from bytes to commit. With an encoder that has no codebook, the rows hold latents."""

    in_flight = 2  # one is read, decoded and written while the other's batches are on the device
    result = Committed

    def __init__(self, output_url: str, **rest: Any):
        super().__init__(**rest)
        self.output = Output.open(output_url)

    def process(self, shard: Shard) -> ShardResult:
        return self._noted(super().process(shard))

    def failed(self, shard: Shard, reason: str) -> ShardResult:
        return self._noted(super().failed(shard, reason))

    def finished(self, shard: Shard) -> ShardResult | None:
        history = self.output.committed_shard(shard.name)
        return None if history is None else _committed(shard, history.first)

    def work(self, shard: Shard) -> ShardResult:
        found = self.encode(shard)
        with self.ticking(shard):
            entry = commit_shard(
                self.output,
                shard,
                found.rows,
                found.quarantined,
                found.seconds,
                now=time.time(),
                num_samples=found.num_samples,
            )
        return _committed(shard, entry)

    def encode(self, shard: Shard) -> EncodedShard:
        return encode_shard(shard, self.encoder, self.options, self.device_lock, partial(self.tick, shard))

    def _noted(self, result: ShardResult) -> ShardResult:
        """A failure is noted in the output, for `status`. If that fails, too, the driver still prints it."""
        if result.failure:
            with self.ticking(result.shard), contextlib.suppress(OSError):
                self.output.record_failure(result.shard, result.failure, now=time.time())
        return result


class CachedTokenizeWorker(TokenizeWorker):
    """Makes tokens from a cache of latents instead of the samples."""

    encoder: Tokenizer

    def __init__(self, cache_url: str, **rest: Any):
        super().__init__(**rest)
        self.cache = Output.open(cache_url)

    def encode(self, shard: Shard) -> EncodedShard:
        tick = partial(self.tick, shard)
        return tokenize_cached(shard, self.cache, self.encoder, self.options, self.device_lock, tick)


def _committed(shard: Shard, entry: Commit) -> Committed:
    return Committed(shard, None, entry.num_rows, entry.num_quarantined, entry.num_tokens)
