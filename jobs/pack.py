"""Packs a folder of files, a Parquet file or a CSV file into WebDataset shards: `pack.source`, `pack.shards`.

`pack.shards` is a pattern such as corpus/photos-%06d.tar. In a folder, files with the same name up to the first dot
form one sample. In a table, each column is a member (`jpg`, `cls`, ...): bytes are copied, other values become text.
A `key` column names the samples. A CSV file holds images and audio in base64.
"""

import base64
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from jobs.config import Config, ConfigError
from pipeline import storage
from pipeline.corpus.samples import NAME
from tokenizer.modalities.base import build_modality

Packed = dict[str, Any]  # __key__ and members, as webdataset has them


def run(config: Config) -> int:
    config.require("pack.source", "pack.shards")
    options = config.pack
    pattern = options.shards if "%" in options.shards else f"{options.shards}-%06d.tar"
    media = build_modality(config.model.modality, config.data.preprocess).extensions
    source = storage.normalise(options.source)
    samples = _from_table(source, media) if source.endswith((".parquet", ".csv")) else _from_folder(source)
    if options.shuffle_seed >= 0:
        samples = _shuffled(samples, options.shuffle_seed)
    num_samples = num_shards = 0
    for part in _parts(samples, options.samples_per_shard):
        url = storage.normalise(pattern % num_shards)
        try:
            storage.write_once(url, _to_tar(part))
        except FileExistsError as error:
            raise ConfigError(f"{url} already exists; choose another pack.shards, or remove it") from error
        num_samples, num_shards = num_samples + len(part), num_shards + 1
    if num_samples == 0:
        raise ConfigError(f"pack.source: {source} holds no samples")
    print(f"pack: {num_samples} samples in {num_shards} shards; the first is {storage.normalise(pattern % 0)}")
    return 0


def _from_folder(folder: str) -> Iterator[Packed]:
    """Yields members as paths, not bytes, so that a folder may be larger than memory."""
    if not Path(folder).is_dir():
        raise ConfigError(f"pack.source: {folder} is neither a folder nor a .parquet or .csv file")
    groups: dict[str, dict[str, Path]] = {}
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        match = NAME.match(file.relative_to(folder).as_posix())
        if match is None:
            raise ConfigError(f"{file} is not named KEY.EXTENSION; rename or remove it")
        members = groups.setdefault(match[1], {})
        if match[2].lower() in members:
            raise ConfigError(
                f"{file} and {members[match[2].lower()]} would become the same member of a sample; rename one of them"
            )
        members[match[2].lower()] = file
    for key, members in groups.items():
        yield {"__key__": key, **members}


def _from_table(file: str, media: tuple[str, ...]) -> Iterator[Packed]:
    if not storage.exists(file):
        raise ConfigError(f"pack.source: {file} does not exist")
    is_csv = file.endswith(".csv")
    for index, row in enumerate(_csv_rows(file) if is_csv else _parquet_rows(file)):
        key = str(row.pop("key", f"{index:09d}"))
        if NAME.match(f"{key}.x") is None or "." in key.rsplit("/", 1)[-1]:
            raise ConfigError(
                f"row {index}: key {key!r} cannot be part of a file name; it must not be empty or contain dots"
            )
        try:
            members = {n: _member(n, value, is_csv and n in media) for n, value in row.items() if value is not None}
        except ValueError as error:
            raise ConfigError(f"row {index}, key {key!r}: {error}") from error
        yield {"__key__": key, **members}


def _parquet_rows(file: str) -> Iterator[dict[str, Any]]:
    with storage.open_stream(file) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(1024):
            yield from batch.to_pylist()


def _csv_rows(file: str) -> Iterator[dict[str, Any]]:
    """Reads all columns as text, so that a class 007 does not become 7."""
    with storage.open_stream(file) as stream:
        names = pyarrow.csv.open_csv(stream).schema.names
    options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    with storage.open_stream(file) as stream:
        yield from pyarrow.csv.read_csv(stream, convert_options=options).to_pylist()


def _member(name: str, value: Any, base64_text: bool) -> bytes:
    if base64_text:
        return base64.b64decode(value, validate=True)
    if isinstance(value, (dict, list)):
        raise ValueError(
            f"columns must hold bytes, text or numbers, not {str(value)[:60]}...; flatten the column first"
        )
    return value if isinstance(value, bytes) else str(value).encode()


def _shuffled(samples: Iterator[Packed], seed: int) -> Iterator[Packed]:
    everything = list(samples)
    random.Random(seed).shuffle(everything)
    return iter(everything)


def _parts(samples: Iterator[Packed], size: int) -> Iterator[list[Packed]]:
    part: list[Packed] = []
    seen: set[str] = set()
    for sample in samples:
        if sample["__key__"] in seen:
            raise ConfigError(f"key {sample['__key__']!r} occurs twice in pack.source; keys must be unique")
        seen.add(sample["__key__"])
        part.append(sample)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _to_tar(samples: list[Packed]) -> bytes:
    """The bytes of one shard. They depend on the samples only, not on the time or the user."""
    import webdataset  # imports torch, which is slow

    out = io.BytesIO()
    with webdataset.TarWriter(out, encoder=False, mtime=0, user="tokenmill", group="tokenmill") as writer:
        for sample in samples:
            writer.write({name: v.read_bytes() if isinstance(v, Path) else v for name, v in sample.items()})
    return out.getvalue()
