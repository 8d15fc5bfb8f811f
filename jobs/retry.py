"""Processes quarantined samples and failed shards again, once you have fixed the cause: `output`, `tokenizer`.

For example, you installed a decoder, fixed a bug, uploaded a shard again, or added memory. `tokenizer`: the one that
wrote the output; by default the only one of the run. The samples recovered from a committed shard are added in files
named after it with +1 (+2 the next time); samples that still fail stay in quarantine. Committed files never change, and
if nothing is recovered, nothing is written. Two retries may run at the same time: only one of them commits each shard.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jobs.actors.run import FIX_AND_RERUN, EncodeWorker, ShardResult, print_failures, run_shards
from jobs.artifacts import load_tokenizer, writer_url
from jobs.config import Config
from jobs.encode import encode_missing
from jobs.outputs import exit_code, open_output
from jobs.shards import EncodedShard, encode_shard
from pipeline import storage
from pipeline.corpus.shards import Shard, look_up
from pipeline.errors import ShardError
from pipeline.tokens import CommittedShard, Output, Quarantined, TokenRow, commit_retry
from pipeline.tokens.index import write_index
from tokenizer.tokenizer import Tokenizer


def run(config: Config) -> int:
    config.require("output")
    output = open_output(config.output)
    url = writer_url(output, config)
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(output.url)
    # new rows must look like the committed ones, and come from the shards: a cache of latents has the old failures
    layout = output.layout
    options = replace(config.tokens, encoding=layout.encoding, passthrough=list(layout.passthrough), latents="")
    config = config.with_changes(tokens=options)
    output.input_lists()  # raises for a damaged one now, and not after the work
    shards = output.committed_shards()
    done = {shard.first.name for shard in shards}
    incomplete = [shard.first.source_shard for shard in shards if shard.num_quarantined]
    failed = [note["source_shard"] for note in output.failures() if note["name"] not in done]
    num_quarantined = sum(shard.num_quarantined for shard in shards)
    print(f"retry: {num_quarantined} quarantined samples in {len(incomplete)} shards, and {len(failed)} failed shards")
    load = partial(load_tokenizer, url)
    failures = _retry_samples(incomplete, load, output, config)
    if failed:
        inputs = look_up(failed)  # a repaired shard has another size than the one that failed
        output.add_inputs(inputs)
        failures += encode_missing("retry", inputs.shards, output, load, config)
    return _outcome(output, failures, config)


def _retry_samples(urls: list[str], load: Callable[[str], Tokenizer], output: Output, config: Config) -> list[str]:
    """Encodes the quarantined samples of committed shards. Returns the failures."""
    if not urls:
        return []
    shards = look_up(urls).shards
    output.refuse_replaced(shards)
    settings = {"load": load, "output_url": output.url, "options": config.tokens, "member": output.layout.member}
    results = list(run_shards("retry", shards, RetryWorker, settings, config.workers))
    if lost := sum(not result.won for result in results):
        print(f"retry: another retry committed {lost} shards first; its result is kept")
    print(f"retry: recovered {sum(result.num_recovered for result in results)} samples")
    return [result.failure for result in results if result.failure]


def _outcome(output: Output, failures: list[str], config: Config) -> int:
    print_failures("retry", failures)
    write_index(output)
    shards = output.committed_shards()
    tokenized = sum(shard.num_rows for shard in shards) // output.layout.rows_per_sample
    quarantined = sum(shard.num_quarantined for shard in shards)
    print(f"retry: {tokenized} samples in {len(shards)} shards, {quarantined} quarantined, at {output.url}")
    if failures:
        print(f"retry: incomplete: {len(failures)} shards failed; {FIX_AND_RERUN}")
        return 3
    if untried := {shard.name for shard in output.inputs()} - {shard.first.name for shard in shards}:
        print(f"retry: incomplete: {len(untried)} shards are not tokenized yet; rerun the same `tokenmill tokenize`")
        return 3
    return exit_code("retry", output, shards, (tokenized, quarantined), config)


@dataclass
class Recovered(ShardResult):
    """Counts samples. won: False if another retry committed its result for this shard first."""

    num_recovered: int = 0
    num_quarantined: int = 0
    won: bool = True

    def counts(self) -> dict[str, float]:
        return {"recovered": self.num_recovered, "still quarantined": self.num_quarantined}


class RetryWorker(EncodeWorker[Tokenizer]):
    """Encodes the quarantined samples of committed shards."""

    result = Recovered

    def __init__(self, output_url: str, **rest: Any):
        super().__init__(**rest)
        self.output = Output.open(output_url)

    def work(self, shard: Shard) -> ShardResult:
        history = self.output.committed_shard(shard.name)
        assert history is not None, f"{shard.name} was committed when this command began"
        before = {sample.source_index: sample.key for sample in self.output.quarantined(history.last)}
        tick = partial(self.tick, shard)
        encoded = encode_shard(
            shard,
            self.encoder,
            self.options,
            self.device_lock,
            tick,
            only=before,
            member=self.member,
            views=self.output.layout.views,
        )
        self._refuse_replaced(shard, history, before, encoded)
        with self.ticking(shard):
            commit = commit_retry(
                self.output,
                shard,
                history,
                encoded.rows,
                encoded.quarantined,
                encoded.seconds,
                now=time.time(),
                notes=encoded.notes,
            )
        if commit is None:
            return Recovered(shard, num_quarantined=len(encoded.quarantined), won=not encoded.rows)
        return Recovered(shard, None, commit.num_samples - commit.num_quarantined, commit.num_quarantined)

    def _refuse_replaced(
        self, shard: Shard, history: CommittedShard, before: dict[int, str], encoded: EncodedShard
    ) -> None:
        retried: list[TokenRow | Quarantined] = [*encoded.rows, *encoded.quarantined]
        now = {sample.source_index: sample.key for sample in retried}
        if now != before or encoded.num_samples != history.first.num_samples:
            raise ShardError(
                f"{shard.url} does not hold the samples that {self.output.url} has of it: it was replaced. "
                "Restore the old shard, or choose another output"
            )
