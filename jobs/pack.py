"""Packs a folder of files, or Parquet or CSV files, into WebDataset shards: `pack.source`, `pack.shards`.

`pack.shards` is a pattern such as corpus/photos-%06d.tar. Each image or recording of a folder is a sample, together
with the other files of its name. In a table, each row is a sample and each column a member.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from jobs.config import Config, ConfigError
from jobs.packing.folder import Folder
from jobs.packing.media import Media
from jobs.packing.rows import is_table
from jobs.packing.sample import Packed
from jobs.packing.shards import shard_pattern, write_shards
from jobs.packing.table import table_samples
from jobs.packing.tally import Tally
from jobs.reports.progress import counted
from pipeline import storage
from tokenizer.modalities.base import MODALITIES, build_modality


def run(config: Config) -> int:
    config.require("pack.source", "pack.shards")
    options, tally = config.pack, Tally()
    pattern = shard_pattern(options.shards)
    if "://" in pattern and config.storage.create_only == storage.SERVER:
        storage.check_create_only(pattern.rpartition("/")[0])
    modality = build_modality(config.model.modality, config.data.preprocess)
    media = Media(modality.name, modality.extensions)
    samples = _unique(_samples(storage.normalise(options.source), media, tally), media, tally)
    if options.shuffle_seed >= 0:
        samples = _shuffled(samples, options.shuffle_seed)
    shards = write_shards(_parts(samples, options.samples_per_shard), pattern, options.workers)
    written = list(counted("pack", shards, "shards"))
    for line in tally.lines():
        print(f"pack: {line}")
    if not written:
        raise ConfigError(
            f"pack.source: {options.source} holds no samples with {media.kind} data{_hint(options.source, media)}"
        )
    _refuse_leftover(storage.normalise(pattern % len(written)))
    num_samples, num_old = sum(shard.num_samples for shard in written), sum(not shard.is_new for shard in written)
    old = f", {num_old} of which already existed with the same content" if num_old else ""
    first = storage.normalise(pattern % 0)
    print(f"pack: {num_samples} samples in {len(written)} shards{old}; the first is {first}")
    return 0


def _samples(source: str, media: Media, tally: Tally) -> Iterator[Packed]:
    if Path(source).is_dir():
        return Folder(Path(source), media, tally).samples()
    tables = [source] if storage.exists(source) else [found.url for found in storage.glob(source)]
    if not tables:
        raise ConfigError(
            f"pack.source: {source} does not exist; a folder must be on this machine, a table may be a URL"
        )
    for table in tables:
        if not is_table(table):
            raise ConfigError(f"pack.source: {table} is neither a folder nor a .parquet, .csv or .tsv file")
    return table_samples(tables, media, tally)


def _unique(samples: Iterator[Packed], media: Media, tally: Tally) -> Iterator[Packed]:
    """Raises ConfigError for a key that occurs twice. Counts samples with several media."""
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ConfigError(f"key {sample.key!r} occurs twice in pack.source; keys must be unique")
        seen.add(sample.key)
        names = [name for name in sample.members if media.extension(f".{name}")]
        if len(names) > 1:
            tally.add(f"samples with several members that hold {media.kind} data", f"{sample.key} ({', '.join(names)})")
        yield sample


def _shuffled(samples: Iterator[Packed], seed: int) -> Iterator[Packed]:
    everything = list(samples)
    random.Random(seed).shuffle(everything)
    return iter(everything)


def _parts(samples: Iterator[Packed], size: int) -> Iterator[list[Packed]]:
    while part := list(itertools.islice(samples, size)):
        yield part


def _hint(source: str, media: Media) -> str:
    """What the folder holds instead, and the setting that packs it."""
    names = [path.name for path in Path(source).rglob("*") if path.is_file()]
    if any(map(is_table, names)):
        return "; to pack the tables in this folder, give a glob such as FOLDER/*.parquet"
    for other in set(MODALITIES.names()) - {media.kind}:
        if any(map(Media(other, MODALITIES.get(other).extensions).extension, names)):
            return f"; it holds {other} files: set model.modality={other} to pack them"
    return ""


def _refuse_leftover(url: str) -> None:
    """Raises ConfigError if the shard after the last one exists: patterns such as *.tar would match it too."""
    if storage.exists(url):
        raise ConfigError(
            f"all samples are packed, but {url} is not part of them; remove it, or choose another pack.shards"
        )
