"""Tokenizes shards: `tokenizer`, `data.shards`, `output`.

Each shard without a commit goes to an actor, one per device. The actor reads the shard, decodes in threads, encodes
batches of one shape, writes tokens and quarantine, and commits. Only a small row of counts comes back.
"""

import collections
import contextlib
import itertools
from functools import partial

from jobs.actors.run import FIX_AND_RERUN, print_failures, print_notes
from jobs.artifacts import check_limits, check_member, load_tokenizer, token_layout, tokenizer_url
from jobs.config import Config, ConfigError, TokensConfig
from jobs.encode import encode_missing
from jobs.latents.cache import open_cache
from jobs.outputs import exit_code
from pipeline import storage
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard, find_shards
from pipeline.errors import ShardError
from pipeline.tokens import Output
from pipeline.tokens.index import write_index

LOOK_AT = 100  # samples


def run(config: Config) -> int:
    config.require("data.shards", "output")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    check_limits(tokenizer.modality, config.tokens)
    inputs = find_shards(config.data.shards)
    _refuse_uploaded(inputs.shards)
    check_member(config.data.member, tokenizer.modality)
    layout = token_layout(tokenizer, config.tokens, config.data.member)
    if config.tokens.latents:
        member = config.data.member
        config.tokens.latents = open_cache(config.tokens.latents, tokenizer, inputs.shards, config.tokens, member).url
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(storage.normalise(config.output))
    same_names = config.tokens.same_names
    output = Output.create(config.output, layout, inputs, config.to_dict(), same_names=same_names)
    warn_of_absent(inputs.shards, output, config.tokens)
    failures = encode_missing("tokenize", inputs.shards, output, partial(load_tokenizer, url), config)
    return _outcome(output, inputs.shards, failures, config)


def _refuse_uploaded(shards: list[Shard]) -> None:
    """A shard is identified by its URL, and Ray copies a working directory to a new path each time."""
    for shard in shards:
        if "/working_dir_files/_ray_pkg_" in shard.url:
            raise ConfigError(
                f"data.shards: {shard.url} is Ray's copy of a working directory; give an absolute path or a URL"
            )


def warn_of_absent(shards: list[Shard], output: Output, options: TokensConfig) -> None:
    """Prints a line before the work begins if the first samples lack a member of tokens.passthrough: a typing error?

    Later samples may have it, so this is no mistake. The last lines of the job count the rows that lack it.
    """
    absent, found, count = set(options.passthrough), set[str](), 0
    done = output.committed_names() if absent else set()
    first = next((shard for shard in shards if shard.name not in done), None)
    if first is None or not absent or options.latents:  # the cache of latents has been checked
        return
    with contextlib.suppress(ShardError):  # its worker reports it
        for sample in itertools.islice(read_samples(first.url, first.version), LOOK_AT):
            absent, found, count = absent - sample.members.keys(), found | sample.members.keys(), count + 1
            if not absent:
                return
    for name in sorted(absent) if count else []:
        print(
            f"tokenize: warning: none of the first {count} samples of {first.url} has a member {name} "
            f"(tokens.passthrough); they have: {', '.join(sorted(found)) or 'nothing'}",
            flush=True,
        )


def _outcome(output: Output, shards: list[Shard], failures: list[str], config: Config) -> int:
    print_failures("tokenize", failures)
    write_index(output)
    committed = output.committed_shards()
    histories = {history.first.name: history for history in committed}
    done = [histories[shard.name] for shard in shards if shard.name in histories]
    rows, quarantined = sum(one.num_rows for one in done), sum(one.num_quarantined for one in done)
    samples, views = rows // output.layout.rows_per_sample, output.layout.views
    made = f"{samples} samples" + (f" ({rows} rows, {views.count} views each)" if views else "")
    print(f"tokenize: {made} in {len(done)} of {len(shards)} shards, {quarantined} quarantined, at {output.url}")
    print_notes("tokenize", sum((one.notes for one in done), collections.Counter()), rows)
    if elsewhere := {shard.url for shard in output.inputs() if shard.name not in histories} - {s.url for s in shards}:
        print(
            f"tokenize: {len(elsewhere)} shards of other runs are not tokenized, such as {min(elsewhere)}; rerun "
            "`tokenmill tokenize` with them, or withdraw their list (`tokenmill verify` says which)"
        )
    if len(done) < len(shards):
        print(f"tokenize: incomplete: {len(shards) - len(done)} shards failed; {FIX_AND_RERUN}")
        return 3
    then = ", then rerun the same command"
    return exit_code("tokenize", output, committed, (samples, quarantined), config, then=then)
