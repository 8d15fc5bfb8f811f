"""Takes up quarantined samples and failed shards again, after what was wrong with them was mended: `output`.

A decoder was installed, a bug fixed, a shard uploaded once more, memory added. `tokenizer`: the one that wrote the
output; the run's only one if empty. What is recovered of a shard that is committed already is added to it, under the
names of its files and +1 (+2 the next time); what is still bad stays in quarantine. Nothing that is committed changes,
and if nothing can be recovered, nothing is written. Two retries at a time do no harm: one of them wins each shard.
"""

import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jobs import cluster, tokenize_corpus
from jobs.config import Config, TokensConfig
from jobs.frozen import load_tokenizer, writer_url
from jobs.progress import Progress
from jobs.reading import Stopwatch, Tally, decoded_batches, rows_of
from jobs.shard_pool import ShardWorker, map_shards
from jobs.status import open_output
from pipeline import storage
from pipeline.errors import ShardError
from pipeline.manifest import Shard, look_up
from pipeline.tokens import History, Output, Quarantined, TokenRow

SHOWN = 10


@dataclass
class RetryResult:
    """What comes back from a worker. won: whether this retry's result is the one that stands, if it has any."""

    num_rows: int = 0
    num_still_bad: int = 0
    won: bool = True
    failure: str | None = None


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    url = writer_url(output, config)
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(output.url)
    # rows that come later must look like those that are there, whatever this command was told
    layout = output.layout
    # ... and from the shards, since in a cache of latents they are as they were
    options = replace(config.tokens, encoding=layout.encoding, passthrough=list(layout.passthrough), latents="")
    config = replace(config, tokens=options)
    shards = output.histories()
    done = {shard.first.name for shard in shards}
    bad = [shard.first.source_shard for shard in shards if shard.num_quarantined]
    failed = [note["source_shard"] for note in output.failures() if note["name"] not in done]
    num_bad = sum(shard.num_quarantined for shard in shards)
    print(f"retry: {num_bad} quarantined samples in {len(bad)} shards, and {len(failed)} failed shards")
    failures = [*_recover(bad, url, output, config), *_redo(failed, url, output, config)]
    return _outcome(output, failures, config)


def _redo(urls: list[str], url: str, output: Output, config: Config) -> list[str]:
    """Failed shards, of which nothing is committed, once more from the start; returns what failed."""
    if not urls:
        return []
    inputs = look_up(urls)  # a shard that was mended has another size than the one that failed
    output.take_inputs(inputs)
    return tokenize_corpus.tokenize_shards(inputs.shards, url, output, config)


def _recover(urls: list[str], url: str, output: Output, config: Config) -> list[str]:
    """The quarantined samples of committed shards; returns what failed."""
    if not urls:
        return []
    shards = look_up(urls).shards
    output.refuse_replaced(shards)
    cluster.start()
    settings = {"tokenizer_url": url, "output_url": output.url, "options": config.tokens}
    progress = Progress("retry", total=len(shards), unit="shards")
    results = []
    for result in map_shards(shards, RetryWorker, settings, config.workers):
        results.append(result)
        progress.advance(recovered=result.num_rows, still_bad=result.num_still_bad)
    progress.close()
    if lost := sum(not result.won for result in results):
        print(f"retry: {lost} shards were taken up by another retry at the same time, whose result stands")
    print(f"retry: recovered {sum(result.num_rows for result in results)} samples")
    return [result.failure for result in results if result.failure]


def _outcome(output: Output, failures: list[str], config: Config) -> int:
    for failure in failures[:SHOWN]:
        print(f"retry: failed shard: {failure.splitlines()[0]}")
    shards = output.histories()
    rows, bad = sum(shard.num_rows for shard in shards), sum(shard.num_quarantined for shard in shards)
    print(f"retry: {rows} samples in {len(shards)} shards, {bad} quarantined, at {output.url}")
    if failures:
        print(f"retry: incomplete: {len(failures)} shards failed; mend them and run the same command again")
        return 3
    if untried := {shard.name for shard in output.inputs()} - {shard.first.name for shard in shards}:
        print(f"retry: incomplete: {len(untried)} shards are not done yet; run the same `tokenmill tokenize` again")
        return 3
    if bad > config.tokens.max_bad_fraction * max(1, rows + bad):
        print(f"retry: done, but {bad} quarantined exceed tokens.max_bad_fraction={config.tokens.max_bad_fraction}")
        return 4
    print("retry: done")
    return 0


class RetryWorker(ShardWorker):
    """Holds the tokenizer and takes up the quarantined samples of one shard after the other."""

    def __init__(self, tokenizer_url: str, output_url: str, options: TokensConfig, **resources: Any):
        super().__init__(**resources)
        self.tokenizer = load_tokenizer(tokenizer_url, self.device)
        self.output = Output.open(output_url)
        self.options = options

    def process(self, shard: Shard) -> RetryResult:
        try:
            return self._retry(shard)
        except ShardError as error:
            return RetryResult(failure=str(error))
        except Exception as error:  # one shard must not end a job of days
            return RetryResult(failure=f"{shard.url}: {type(error).__name__}: {error}\n{traceback.format_exc()}")

    @staticmethod
    def failed(shard: Shard, reason: str) -> RetryResult:
        return RetryResult(failure=f"{shard.url}: {reason}")

    def _retry(self, shard: Shard) -> RetryResult:
        history = self.output.history(shard.name)
        assert history is not None, f"{shard.name} was committed when this command began"
        rows, quarantined, seconds = self._take_up(shard, history)
        entry = self.output.commit_retry(shard, history, rows, quarantined, seconds, now=time.time())
        if entry is None:
            return RetryResult(num_still_bad=len(quarantined), won=not rows)
        return RetryResult(entry.num_rows, entry.num_quarantined)

    def _take_up(self, shard: Shard, history: History) -> tuple[list[TokenRow], list[Quarantined], dict[str, float]]:
        """Rows of the samples that stand in quarantine, those that are still bad, and seconds by stage."""
        before = {sample.source_index: sample.key for sample in self.output.quarantined(history.last)}
        rows: list[TokenRow] = []
        quarantined: list[Quarantined] = []
        tally, watch = Tally(partial(self.tick, shard)), Stopwatch()
        batches = decoded_batches(
            shard.url, self.tokenizer, self.options, quarantined, version=shard.version, only=before, tally=tally
        )
        for batch in batches:
            watch.lap("wait")
            rows += rows_of(batch, self.tokenizer, self.options.passthrough, quarantined)
            watch.lap("encode")
            self.tick(shard)
        watch.lap("wait")
        places: list[TokenRow | Quarantined] = [*rows, *quarantined]
        found = {sample.source_index: sample.key for sample in places}
        if found != before or tally.num_samples != history.first.num_samples:
            raise ShardError(
                f"{shard.url} does not hold the samples that {self.output.url} has of it: it was replaced. "
                "Put the old one back, or choose another output"
            )
        stages = {"read": tally.read_s, "decode": tally.decode_s, "encode": watch.seconds.get("encode", 0.0)}
        return (
            sorted(rows, key=lambda row: row.source_index),
            quarantined,
            {**stages, "total": sum(watch.seconds.values())},
        )
