"""Encodes the shards that an output lacks, to tokens or latents: the driver's part and the worker."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.actors.run import EncodeWorker, ShardResult, run_shards
from jobs.config import Config
from jobs.latents.cache import tokenize_cached
from jobs.shards import EncodedShard, encode_shard
from pipeline.corpus.shards import Shard
from pipeline.tokens import Commit, Output, commit_shard
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import Tokenizer


def encode_missing(
    command: str, shards: list[Shard], output: Output, load: Callable[[str], LatentEncoder], config: Config
) -> list[str]:
    """Encodes and commits the shards that the output lacks. Starts Ray if there are any. Returns the failures.

    load: from a device to the encoder: a tokenizer, or for latents an encoder without a codebook.
    """
    done = output.committed_names()
    todo = [shard for shard in shards if shard.name not in done]
    print(f"{command}: {len(shards)} shards, {len(shards) - len(todo)} done before, {len(todo)} to do")
    if not todo:
        return []
    settings = {"load": load, "output_url": output.url, "options": config.tokens}
    worker = CachedTokenizeWorker if config.tokens.latents else TokenizeWorker
    results = run_shards(command, todo, worker, settings, config.workers)
    return [result.failure for result in results if result.failure]


@dataclass
class Committed(ShardResult):
    """What the commit of a shard counts."""

    num_rows: int = 0
    num_quarantined: int = 0
    num_tokens: int = 0

    @classmethod
    def of(cls, shard: Shard, commit: Commit) -> "Committed":
        return cls(shard, None, commit.num_rows, commit.num_quarantined, commit.num_tokens)

    def counts(self) -> dict[str, float]:
        return {"samples": self.num_rows, "tokens": self.num_tokens, "quarantined": self.num_quarantined}


class TokenizeWorker(EncodeWorker[LatentEncoder]):
    """Takes a shard from bytes to its commit. With an encoder that has no codebook, the rows hold latents."""

    in_flight = 2  # one shard is read, decoded and written while the other's batches are on the device
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
        return None if history is None else Committed.of(shard, history.first)

    def work(self, shard: Shard) -> ShardResult:
        encoded = self.encode(shard)
        with self.ticking(shard):
            commit = commit_shard(
                self.output,
                shard,
                encoded.rows,
                encoded.quarantined,
                encoded.seconds,
                now=time.time(),
                num_samples=encoded.num_samples,
                notes=encoded.notes,
            )
        return Committed.of(shard, commit)

    def encode(self, shard: Shard) -> EncodedShard:
        return encode_shard(shard, self.encoder, self.options, self.device_lock, partial(self.tick, shard))

    def _noted(self, result: ShardResult) -> ShardResult:
        """Notes a failure in the output, for `status`. If that fails too, the driver still prints it."""
        if result.failure:
            with self.ticking(result.shard), contextlib.suppress(OSError):
                self.output.record_failure(result.shard, result.failure, now=time.time())
        return result


class CachedTokenizeWorker(TokenizeWorker):
    """Makes tokens from the cached latents that tokens.latents names, instead of from the samples."""

    encoder: Tokenizer

    def __init__(self, **rest: Any):
        super().__init__(**rest)
        self.cache = Output.open(self.options.latents)

    def encode(self, shard: Shard) -> EncodedShard:
        tick = partial(self.tick, shard)
        return tokenize_cached(shard, self.cache, self.encoder, self.options, self.device_lock, tick)
