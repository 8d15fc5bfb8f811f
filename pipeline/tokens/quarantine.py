"""Quarantine files: the samples of a shard that could not be tokenized, in Parquet."""

from dataclasses import asdict, dataclass

import pyarrow as pa

from pipeline.tokens.schema import read_parquet

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source_shard", pa.string(), nullable=False),
        pa.field("source_index", pa.int32(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


@dataclass
class Quarantined:
    """A sample that could not be tokenized. stage: read, decode, encode or passthrough."""

    key: str
    source_index: int
    stage: str
    error: str
    message: str


def quarantine_table(source_shard: str, quarantined: list[Quarantined]) -> pa.Table:
    ordered = sorted(quarantined, key=lambda sample: sample.source_index)
    rows = [{**asdict(sample), "source_shard": source_shard} for sample in ordered]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def parse_quarantine(data: bytes) -> list[Quarantined]:
    """Raises OSError or ValueError if the data is damaged."""
    rows = read_parquet(data, list(Quarantined.__dataclass_fields__)).to_pylist()
    return [Quarantined(**row) for row in rows]
