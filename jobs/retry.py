"""Takes up quarantined samples and failed shards again, after what was wrong with them was mended: `output`.

A decoder was installed, a bug fixed, a shard uploaded once more, memory added. `tokenizer`: the one that wrote the
output; the run's only one if empty. What is recovered of a shard that is committed already is added to it, under the
names of its files and +1 (+2 the next time); what is still bad stays in quarantine. Nothing that is committed changes,
and if nothing can be recovered, nothing is written. Two retries at a time do no harm: one of them wins each shard.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jobs import tokenize_corpus
from jobs.actors.run import FIX_AND_RERUN, EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import load_tokenizer, writer_url
from jobs.config import Config
from jobs.shards import EncodedShard, encode_shard
from jobs.status import open_output
from pipeline import storage
from pipeline.corpus.shards import Shard, look_up
from pipeline.errors import ShardError
from pipeline.tokens import CommittedShard, Output, Quarantined, TokenRow, commit_retry
from tokenizer.tokenizer import Tokenizer


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
    shards = output.committed_shards()
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
    output.add_inputs(inputs)
    return tokenize_corpus.tokenize_shards(inputs.shards, url, output, config)


def _recover(urls: list[str], url: str, output: Output, config: Config) -> list[str]:
    """The quarantined samples of committed shards; returns what failed."""
    if not urls:
        return []
    shards = look_up(urls).shards
    output.refuse_replaced(shards)
    settings = {"load": partial(load_tokenizer, url), "output_url": output.url, "options": config.tokens}
    results = list(run_shards("retry", shards, RetryWorker, settings, config.workers))
    if lost := sum(not result.won for result in results):
        print(f"retry: another retry processed {lost} shards at the same time; its result stands")
    print(f"retry: recovered {sum(result.num_rows for result in results)} samples")
    return [result.failure for result in results if result.failure]


def _outcome(output: Output, failures: list[str], config: Config) -> int:
    print_failures("retry", failures)
    shards = output.committed_shards()
    rows, bad = sum(shard.num_rows for shard in shards), sum(shard.num_quarantined for shard in shards)
    print(f"retry: {rows} samples in {len(shards)} shards, {bad} quarantined, at {output.url}")
    if failures:
        print(f"retry: incomplete: {len(failures)} shards failed; {FIX_AND_RERUN}")
        return 3
    if untried := {shard.name for shard in output.inputs()} - {shard.first.name for shard in shards}:
        print(f"retry: incomplete: {len(untried)} shards are not done yet; run the same `tokenmill tokenize` again")
        return 3
    if bad > config.tokens.max_bad_fraction * max(1, rows + bad):
        print(f"retry: done, but {bad} quarantined exceed tokens.max_bad_fraction={config.tokens.max_bad_fraction}")
        return 4
    print("retry: done")
    return 0


@dataclass
class Recovered(ShardResult):
    """won: whether this retry's result is the one that stands, if it has any."""

    num_rows: int = 0
    num_still_bad: int = 0
    won: bool = True

    def counts(self) -> dict[str, float]:
        return {"recovered": self.num_rows, "still_bad": self.num_still_bad}


class RetryWorker(EncodeWorker[Tokenizer]):
    """Holds the tokenizer and encodes the quarantined samples of one shard after the other."""

    result = Recovered

    def __init__(self, output_url: str, **rest: Any):
        super().__init__(**rest)
        self.output = Output.open(output_url)

    def work(self, shard: Shard) -> ShardResult:
        history = self.output.committed_shard(shard.name)
        assert history is not None, f"{shard.name} was committed when this command began"
        before = {sample.source_index: sample.key for sample in self.output.quarantined(history.last)}
        tick = partial(self.tick, shard)
        found = encode_shard(shard, self.encoder, self.options, self.device_lock, tick, only=before)
        self._refuse_replaced(shard, history, before, found)
        with self.ticking(shard):
            entry = commit_retry(
                self.output, shard, history, found.rows, found.quarantined, found.seconds, now=time.time()
            )
        if entry is None:
            return Recovered(shard, num_still_bad=len(found.quarantined), won=not found.rows)
        return Recovered(shard, None, entry.num_rows, entry.num_quarantined)

    def _refuse_replaced(
        self, shard: Shard, history: CommittedShard, before: dict[int, str], found: EncodedShard
    ) -> None:
        places: list[TokenRow | Quarantined] = [*found.rows, *found.quarantined]
        again = {sample.source_index: sample.key for sample in places}
        if again != before or found.num_samples != history.first.num_samples:
            raise ShardError(
                f"{shard.url} does not hold the samples that {self.output.url} has of it: it was replaced. "
                "Put the old one back, or choose another output"
            )
