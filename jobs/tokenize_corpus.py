"""Tokenizes shards: `tokenizer`, `data.shards`, `output`.

Each shard without a commit goes to an actor, one per device. The actor reads the shard, decodes in threads, encodes
batches of one shape, writes tokens and quarantine, and commits. Only a small row of counts comes back.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.actors.run import FIX_AND_RERUN, EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import load_tokenizer, token_layout, tokenizer_url
from jobs.config import Config, ConfigError, TokensConfig, WorkersConfig
from jobs.latents.cache import open_cache, tokenize_cached
from jobs.shards import EncodedShard, encode_shard
from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.tokens import Commit, Output
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import Tokenizer


def run(config: Config) -> int:
    config.require("data.shards", "output")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    inputs = find_shards(config.data.shards)
    _refuse_uploaded(inputs.shards)
    layout = token_layout(tokenizer, config.tokens)
    if config.tokens.latents:
        config.tokens.latents = open_cache(config.tokens.latents, tokenizer, inputs.shards, config.tokens).url
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(storage.normalise(config.output))
    output = Output.create(config.output, layout, inputs, config.to_dict())
    load = partial(load_tokenizer, url)
    failures = encode_missing("tokenize", inputs.shards, output, load, config.tokens, config.workers)
    return _outcome(output, inputs.shards, failures, config)


def _refuse_uploaded(shards: list[Shard]) -> None:
    """A shard is identified by its URL, and Ray copies a working directory to a new path each time."""
    for shard in shards:
        if "/working_dir_files/_ray_pkg_" in shard.url:
            raise ConfigError(
                f"data.shards: {shard.url} is Ray's copy of a working directory; give an absolute path or a URL"
            )


def encode_missing(
    command: str,
    shards: list[Shard],
    output: Output,
    load: Callable[[str], LatentEncoder],
    options: TokensConfig,
    workers: WorkersConfig,
) -> list[str]:
    """Encodes and commits the shards that the output lacks. Starts Ray if there are any. Returns the failures.

    load: from a device to the encoder: a tokenizer, or for latents an encoder without a codebook.
    """
    done = output.committed_names()
    todo = [shard for shard in shards if shard.name not in done]
    print(f"{command}: {len(shards)} shards, {len(shards) - len(todo)} done before, {len(todo)} to do")
    if not todo:
        return []
    settings = {"load": load, "output_url": output.url, "options": options}
    results = run_shards(command, todo, TokenizeWorker, settings, workers)
    return [result.failure for result in results if result.failure]


def _outcome(output: Output, shards: list[Shard], failures: list[str], config: Config) -> int:
    print_failures("tokenize", failures)
    histories = {history.first.name: history for history in output.histories()}
    done = [histories[shard.name] for shard in shards if shard.name in histories]
    rows, quarantined = sum(one.num_rows for one in done), sum(one.num_quarantined for one in done)
    print(
        f"tokenize: {rows} samples in {len(done)} of {len(shards)} shards, {quarantined} quarantined, at {output.url}"
    )
    if len(done) < len(shards):
        print(f"tokenize: incomplete: {len(shards) - len(done)} shards failed; {FIX_AND_RERUN}")
        return 3
    allowed = config.tokens.max_bad_fraction
    if quarantined > allowed * max(1, rows + quarantined):
        print(f"tokenize: done, but {quarantined} quarantined samples exceed tokens.max_bad_fraction={allowed}")
        return 4
    print("tokenize: done")
    return 0


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
        self.cache = Output.open(self.options.latents) if self.options.latents else None

    def process(self, shard: Shard) -> ShardResult:
        return self._noted(super().process(shard))

    def failed(self, shard: Shard, reason: str) -> ShardResult:
        return self._noted(super().failed(shard, reason))

    def finished(self, shard: Shard) -> ShardResult | None:
        history = self.output.history(shard.name)
        return None if history is None else Committed.of(shard, history.first)

    def work(self, shard: Shard) -> ShardResult:
        encoded = self._encode(shard)
        with self.ticking(shard):
            commit = self.output.commit(
                shard,
                encoded.rows,
                encoded.quarantined,
                encoded.seconds,
                now=time.time(),
                num_samples=encoded.num_samples,
            )
        return Committed.of(shard, commit)

    def _encode(self, shard: Shard) -> EncodedShard:
        tick = partial(self.tick, shard)
        if self.cache is None:
            return encode_shard(shard, self.encoder, self.options, self.device_lock, tick)
        assert isinstance(self.encoder, Tokenizer)
        return tokenize_cached(shard, self.cache, self.encoder, self.options, self.device_lock, tick)

    def _noted(self, result: ShardResult) -> ShardResult:
        """Notes a failure in the output, for `status`. If that fails too, the driver still prints it."""
        if result.failure:
            with self.ticking(result.shard), contextlib.suppress(OSError):
                self.output.note_failure(result.shard, result.failure, now=time.time())
        return result
