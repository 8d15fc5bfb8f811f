"""Tokenizes shards: `tokenizer`, `data.shards`, `output`.

Each shard without a commit goes to an actor, one per device. The actor reads the shard, decodes in threads, encodes
batches of one shape, writes tokens and quarantine, and commits. Only a small row of counts comes back.
"""

from functools import partial

from jobs.actors.run import FIX_AND_RERUN, print_failures
from jobs.artifacts import check_limits, load_tokenizer, token_layout, tokenizer_url
from jobs.config import Config, ConfigError
from jobs.encode import encode_missing
from jobs.latents.cache import open_cache
from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.tokens import Output
from pipeline.tokens.commit import total_notes


def run(config: Config) -> int:
    config.require("data.shards", "output")
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    check_limits(tokenizer.modality, config.tokens)
    inputs = find_shards(config.data.shards)
    _refuse_uploaded(inputs.shards)
    layout = token_layout(tokenizer, config.tokens)
    if config.tokens.latents:
        config.tokens.latents = open_cache(config.tokens.latents, tokenizer, inputs.shards, config.tokens).url
    if config.storage.create_only == storage.SERVER:
        storage.check_create_only(storage.normalise(config.output))
    output = Output.create(config.output, layout, inputs, config.to_dict())
    failures = encode_missing("tokenize", inputs.shards, output, partial(load_tokenizer, url), config)
    return _outcome(output, inputs.shards, failures, config)


def _refuse_uploaded(shards: list[Shard]) -> None:
    """A shard is identified by its URL, and Ray copies a working directory to a new path each time."""
    for shard in shards:
        if "/working_dir_files/_ray_pkg_" in shard.url:
            raise ConfigError(
                f"data.shards: {shard.url} is Ray's copy of a working directory; give an absolute path or a URL"
            )


def _outcome(output: Output, shards: list[Shard], failures: list[str], config: Config) -> int:
    print_failures("tokenize", failures)
    histories = {history.first.name: history for history in output.committed_shards()}
    done = [histories[shard.name] for shard in shards if shard.name in histories]
    rows, quarantined = sum(one.num_rows for one in done), sum(one.num_quarantined for one in done)
    print(
        f"tokenize: {rows} samples in {len(done)} of {len(shards)} shards, {quarantined} quarantined, at {output.url}"
    )
    for note, count in total_notes([entry for one in done for entry in one.entries]).items():
        print(f"tokenize: {count} samples: {note}")
    if len(done) < len(shards):
        print(f"tokenize: incomplete: {len(shards) - len(done)} shards failed; {FIX_AND_RERUN}")
        return 3
    allowed = config.tokens.max_bad_fraction
    if quarantined > allowed * max(1, rows + quarantined):
        print(f"tokenize: done, but {quarantined} quarantined samples exceed tokens.max_bad_fraction={allowed}")
        return 4
    print("tokenize: done")
    return 0
