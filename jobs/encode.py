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
from pipeline.errors import ShardError
from pipeline.tokens import Commit, Output, commit_shard
from pipeline.tokens.commit import NEW
from pipeline.tokens.repeats import lists_by_url
from pipeline.tokens.writer import hash_of_shard
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
    settings["known"] = {} if config.tokens.same_names == NEW else _known_samples(output, todo)
    settings["member"] = output.layout.member
    worker = CachedTokenizeWorker if config.tokens.latents else TokenizeWorker
    results = run_shards(command, todo, worker, settings, config.workers)
    return [result.failure for result in results if result.failure]


def _known_samples(output: Output, todo: list[Shard]) -> dict[str, str]:
    """samples_sha256 of committed shards that another run was given than any of those to do: hash -> URL."""
    listed = lists_by_url(output.input_lists())
    ours = set().union(*(listed.get(shard.url, set()) for shard in todo))
    return {
        entry.samples_sha256: entry.source_shard
        for entry in output.commits()
        if entry.samples_sha256 and listed.get(entry.source_shard, set()) - ours
    }


@dataclass
class Committed(ShardResult):
    """What the commit of a shard counts, in samples but for the tokens."""

    num_tokenized: int = 0
    num_quarantined: int = 0
    num_tokens: int = 0

    @classmethod
    def of(cls, shard: Shard, commit: Commit) -> "Committed":
        return cls(shard, None, commit.num_samples - commit.num_quarantined, commit.num_quarantined, commit.num_tokens)

    def counts(self) -> dict[str, float]:
        return {"samples": self.num_tokenized, "tokens": self.num_tokens, "quarantined": self.num_quarantined}


class TokenizeWorker(EncodeWorker[LatentEncoder]):
    """Takes a shard from bytes to its commit. With an encoder that has no codebook, the rows hold latents."""

    in_flight = 2  # one shard is read, decoded and written while the other's batches are on the device
    result = Committed

    def __init__(self, output_url: str, known: dict[str, str] | None = None, **rest: Any):
        super().__init__(**rest)
        self.output = Output.open(output_url)
        self.known = known or {}

    def process(self, shard: Shard) -> ShardResult:
        return self._noted(super().process(shard))

    def failed(self, shard: Shard, reason: str) -> ShardResult:
        return self._noted(super().failed(shard, reason))

    def finished(self, shard: Shard) -> ShardResult | None:
        history = self.output.committed_shard(shard.name)
        return None if history is None else Committed.of(shard, history.first)

    def work(self, shard: Shard) -> ShardResult:
        encoded = self.encode(shard)
        self._refuse_twin(shard, encoded)
        with self.ticking(shard):
            commit = commit_shard(
                self.output,
                shard,
                encoded.rows,
                encoded.quarantined,
                encoded.seconds,
                now=time.time(),
                num_samples=encoded.num_samples,
                same_names=self.options.same_names,
                notes=encoded.notes,
            )
        return Committed.of(shard, commit)

    def _refuse_twin(self, shard: Shard, encoded: EncodedShard) -> None:
        other = self.known.get(hash_of_shard(self.output.layout, encoded.rows, encoded.quarantined) or "")
        if other not in (None, shard.url):
            raise ShardError(
                f"{shard.url} holds the same samples as {other}, which {self.output.url} has: it may be the same shard "
                "under another path. Withdraw its list (`tokenmill verify` says how), or set tokens.same_names=new"
            )

    def encode(self, shard: Shard) -> EncodedShard:
        tick = partial(self.tick, shard)
        views = self.output.layout.views
        return encode_shard(shard, self.encoder, self.options, self.device_lock, tick, member=self.member, views=views)

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
