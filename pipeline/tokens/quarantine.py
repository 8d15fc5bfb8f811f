"""Quarantine files: the samples of a shard that could not be tokenized, in Parquet."""

import io
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

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
    """Raises pa.ArrowInvalid if the data is not a Parquet file."""
    rows = pq.read_table(io.BytesIO(data), columns=list(Quarantined.__dataclass_fields__)).to_pylist()
    return [Quarantined(**row) for row in rows]
