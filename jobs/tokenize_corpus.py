"""Shards to token shards: `tokenizer`, `data.shards`, `output`.

todo = shards without a manifest entry -> an actor per device reads a shard, decodes in threads, buckets by shape,
encodes, writes tokens and quarantine, and commits -> one small row of counts comes back.
"""

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs import cluster
from jobs.config import Config, ConfigError, TokensConfig
from jobs.frozen import load_tokenizer, tokenizer_url
from jobs.latent_cache import open_cache, tokenize_cached
from jobs.progress import Progress
from jobs.reading import Stopwatch, Tally, TokenizedShard, decoded_batches, rows_of
from jobs.shard_pool import ShardWorker, map_shards
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.manifest import Manifest, Shard, find_shards
from pipeline.tokens import Layout, Output, Quarantined, TokenRow
from tokenizer.latents import LatentEncoder
from tokenizer.tokenizer import INDEX_ORDER, Tokenizer

TICK_S = 5.0  # while waiting for the device or for storage


@dataclass
class ShardResult:
    """What comes back from a worker. failure is None where the shard was committed; lost: the shard that killed it."""

    num_rows: int = 0
    num_quarantined: int = 0
    num_tokens: int = 0
    failure: str | None = None
    lost: Shard | None = None


def run(config: Config) -> int:
    config.require("data.shards", "output")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    inputs = find_shards(config.data.shards)
    _refuse_uploaded(inputs)
    try:
        layout = layout_of(tokenizer, config.tokens)
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


def _refuse_uploaded(inputs: Manifest) -> None:
    """A shard's URL is its name in the output, and Ray's copies of a working directory have new ones each time."""
    for shard in inputs.shards:
        if "/working_dir_files/_ray_pkg_" in shard.url:
            raise ConfigError(
                f"data.shards: {shard.url} is Ray's copy of a working directory; give the whole path or URL"
            )


def tokenize_shards(todo: list[Shard], url: str, output: Output, config: Config) -> list[str]:
    """Runs the workers; returns what failed."""
    cluster.start()
    settings = {"tokenizer_url": url, "output_url": output.url, "options": config.tokens}
    progress = Progress("tokenize", total=len(todo), unit="shards")
    failures = []
    for result in map_shards(todo, TokenizeWorker, settings, config.workers):
        if result.failure:
            failures.append(result.failure)
        if result.lost and result.failure:
            _note_failure(output, result.lost, result.failure)
        progress.advance(samples=result.num_rows, tokens=result.num_tokens, quarantined=result.num_quarantined)
    progress.close()
    return failures


def _note_failure(output: Output, shard: Shard, failure: str) -> None:
    """For `status`. Where that cannot be written either, the result of the shard still tells."""
    with contextlib.suppress(OSError):
        output.note_failure(shard, failure, now=time.time())


def _outcome(output: Output, shards: list[Shard], failures: list[str], config: Config) -> int:
    for failure in failures[:10]:
        print(f"tokenize: failed shard: {failure.splitlines()[0]}")
    done = {history.first.name: history for history in output.histories()}
    mine = [done[shard.name] for shard in shards if shard.name in done]
    rows, bad = sum(one.num_rows for one in mine), sum(one.num_quarantined for one in mine)
    print(f"tokenize: {rows} samples in {len(mine)} of {len(shards)} shards, {bad} quarantined, at {output.url}")
    if len(mine) < len(shards):
        print(
            f"tokenize: incomplete: {len(shards) - len(mine)} shards failed; mend them and run the same command again"
        )
        return 3
    if bad > config.tokens.max_bad_fraction * max(1, rows + bad):
        print(f"tokenize: done, but {bad} quarantined exceed tokens.max_bad_fraction={config.tokens.max_bad_fraction}")
        return 4
    print("tokenize: done")
    return 0


def layout_of(tokenizer: Tokenizer, options: TokensConfig) -> Layout:
    """What stands in the footer of every shard that this tokenizer writes."""
    return Layout(
        tokenizer_id=tokenizer.id,
        codebook_id=tokenizer.codebook_id,
        codebook_size=tokenizer.codebook_size,
        modality=tokenizer.modality.name,
        index_order=INDEX_ORDER,
        preprocessing=json.dumps(tokenizer.preprocessing, sort_keys=True),
        encoding=options.encoding,
        passthrough=tuple(options.passthrough),
    )


class TokenizeWorker(ShardWorker):
    """Holds the tokenizer on its device and takes shards from bytes to commit."""

    in_flight = 2  # one is read, decoded and written while the other's batches are on the device

    def __init__(self, tokenizer_url: str, output_url: str, options: TokensConfig, **resources: Any):
        super().__init__(**resources)
        self.encoder: LatentEncoder = load_tokenizer(tokenizer_url, self.device)
        self.output = Output.open(output_url)
        self.cache = Output.open(options.latents) if options.latents else None
        self.options = options

    def process(self, shard: Shard) -> ShardResult:
        try:
            return self._commit(shard)
        except ShardError as error:
            failure = str(error)
        except Exception as error:  # one shard must not end a job of days; `status` shows the reason
            failure = f"{shard.url}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        with self._ticking(shard):
            _note_failure(self.output, shard, failure)
        return ShardResult(failure=failure)

    @contextlib.contextmanager
    def _ticking(self, shard: Shard) -> Iterator[None]:
        """Inside, work on the shard counts as getting on: storage has a patience, and an end to it, of its own."""
        done = threading.Event()

        def tick() -> None:
            while not done.wait(TICK_S):
                self.tick(shard)

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @staticmethod
    def failed(shard: Shard, reason: str) -> ShardResult:
        return ShardResult(failure=f"{shard.url}: {reason}", lost=shard)

    def _commit(self, shard: Shard) -> ShardResult:
        tick = partial(self.tick, shard)
        if self.cache is not None and isinstance(self.encoder, Tokenizer):
            found = tokenize_cached(shard, self.cache, self.encoder, self.options, self.device_lock, tick)
        else:
            found = tokenize_shard(shard, self.encoder, self.options, self.device_lock, tick)
        with self._ticking(shard):
            entry = self.output.commit(
                shard, found.rows, found.quarantined, found.seconds, now=time.time(), num_samples=found.num_samples
            )
        return ShardResult(entry.num_rows, entry.num_quarantined, entry.num_tokens)


def tokenize_shard(
    shard: Shard,
    encoder: LatentEncoder,
    options: TokensConfig,
    device_lock: "threading.Lock | None" = None,
    tick: Callable[[], None] = lambda: None,
) -> TokenizedShard:
    """Reads, decodes and encodes a shard: to tokens where encoder is a tokenizer, else to latents.

    device_lock is held while a batch is encoded. tick is called for each sample that is read and each batch that is
    encoded, and while another shard has the device.

    Raises ShardError if the shard cannot be read to its end.
    """
    rows: list[TokenRow] = []
    quarantined: list[Quarantined] = []
    tally, watch = Tally(tick), Stopwatch()
    device_lock = device_lock or threading.Lock()
    batches = decoded_batches(shard.url, encoder, options, quarantined, version=shard.version, tally=tally)
    for batch in batches:
        watch.lap("wait")
        while not device_lock.acquire(timeout=TICK_S):
            tick()
        try:
            watch.lap("queue")
            rows += rows_of(batch, encoder, options.passthrough, quarantined)
            watch.lap("encode")
        finally:
            device_lock.release()
        tick()
    watch.lap("wait")
    seconds = {"read": tally.read_s, "decode": tally.decode_s, **watch.seconds, "total": sum(watch.seconds.values())}
    return TokenizedShard(sorted(rows, key=lambda row: row.source_index), quarantined, tally.num_samples, seconds)
