"""A corpus of many small shards of real images, with some bad samples, and the expected result of tokenizing it."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.corpus.samples import read_samples
from tests.corpus import tar_bytes
from tests.jobs.helpers import SAMPLES, tokenize_without_ray

NUM_SHARDS, PER_SHARD = 24, 5
WITH_BAD = range(1, NUM_SHARDS, 4)  # shards with three additional bad samples
NUM_SAMPLES = PER_SHARD * (NUM_SHARDS - 1) + 3 * len(WITH_BAD)  # the first shard is empty
Place = tuple[str, int]  # file name of the shard, and index of the sample


@dataclass(frozen=True)
class Damage:
    """Number of samples in no row, of additional rows for a sample, and of rows that differ from an undisturbed run."""

    lost: int
    doubled: int
    wrong: int


@dataclass(frozen=True)
class Expected:
    """The row of each sample in an undisturbed run."""

    rows: dict[Place, str]

    def damage(self, output_url: str) -> Damage:
        found = Counter(rows_of(output_url))
        places = Counter(place for place, _ in found.elements())
        return Damage(
            lost=sum(place not in places for place in self.rows),
            doubled=sum(count - 1 for count in places.values()),
            wrong=sum(self.rows.get(place) != row for place, row in found),
        )


def write_corpus(folder: Path) -> str:
    """Writes the shards and returns their glob. Keys are unique across shards."""
    folder.mkdir(parents=True)
    pictures = _real_pictures()
    for shard in range(NUM_SHARDS):
        members = [(f"{shard:02d}-{i}.jpg", next(pictures)) for i in range(PER_SHARD if shard else 0)]
        if shard in WITH_BAD:
            cut = members[1][1][: len(members[1][1]) // 2]
            members += [(f"{shard:02d}-cut.jpg", cut), (f"{shard:02d}-text.txt", b"no picture"), members[0]]
        (folder / f"photos-{shard:02d}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/photos-*.tar"


def undisturbed(shards: str, tokenizer: str, folder: Path) -> Expected:
    """Tokenizes the shards in this process, without faults."""
    tokenize_without_ray(shards, tokenizer, folder)
    rows = list(rows_of(str(folder)))
    assert len(dict(rows)) == len(rows) == NUM_SAMPLES, f"{len(rows)} rows of {NUM_SAMPLES} samples, undisturbed"
    return Expected(dict(rows))


def rows_of(output_url: str) -> Iterator[tuple[Place, str]]:
    """Every committed row and quarantine row, read independently of the code that wrote them."""
    for entry_url in storage.list_files(storage.join(output_url, "manifest")):
        name, entry = Path(entry_url).stem, json.loads(storage.read(entry_url))
        yield from _rows(storage.join(output_url, "tokens", f"{name}.parquet"), ("key", "tokens", "shape", "height"))
        if entry["num_quarantined"]:
            yield from _rows(storage.join(output_url, "quarantine", f"{name}.parquet"), ("key", "stage", "error"))


def _rows(url: str, columns: tuple[str, ...]) -> Iterator[tuple[Place, str]]:
    for row in pq.read_table(io.BytesIO(storage.read(url))).to_pylist():
        yield (Path(row["source_shard"]).name, row["source_index"]), json.dumps([row[name] for name in columns])


def _real_pictures() -> Iterator[bytes]:
    for file in sorted(SAMPLES.glob("*/photos-*.tar")):
        for sample in read_samples(str(file)):
            yield sample.members["jpg"]
