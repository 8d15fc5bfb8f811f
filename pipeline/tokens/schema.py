"""Schema 1 of a token shard: one row per sample (or view of it), in the order of the input shard. See
docs/token-shards.md.

The tokens column is a list, which every Parquet tool can read. With encoding "packed" it holds the same integers as
little-endian bytes, which Parquet reads 5 to 6 times faster. Our reader returns Arrow list arrays for both.
"""

import collections
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UnsupportedSchema, one_line
from pipeline.tokens.fields import wrong_field
from pipeline.tokens.views import Views

SCHEMA_VERSION = 1
ENCODINGS = ("list", "packed")
SIZE_COLUMNS = ("height", "width", "sample_rate", "num_samples")
NUM_SAMPLES_DTYPES = ("int32", "int64")
UNSTATED_NUM_SAMPLES = "int32"  # of outputs whose dataset.json does not state it
RESERVED = ("key", "source_shard", "source_index", "modality", "tokens", "shape", *SIZE_COLUMNS)
LATENT_DTYPE = np.dtype(np.float32)
TEXT_EXTENSIONS = ("txt", "json", "cls", "text", "caption")
ROWS_PER_GROUP = 4096  # with 128 rows per group the footer alone takes 379 kB; with 8192 rows it takes 6 kB


@dataclass
class TokenRow:
    """One tokenized sample, or one view of it. tokens: integers in the shape of the token grid; or float32 latents
    [..., channels].
    """

    key: str
    source_index: int
    tokens: np.ndarray
    size: dict[str, int]
    passthrough: dict[str, bytes] = field(default_factory=dict)
    view: int | None = None  # its number, if the layout has views

    @property
    def place(self) -> tuple[int, int]:
        """Sorts the rows of a shard."""
        return self.source_index, self.view or 0


@dataclass(frozen=True)
class ShardLayout:
    """What all shards of one output have in common. It is written to dataset.json and to the footer of each shard.

    Use `for_tokens` or `for_latents`. A shard of latents holds float32 values in its tokens column, with the channels
    on the last axis. It has no codebook: codebook_id and index_order are None, codebook_size is 0.
    """

    tokenizer_id: str
    codebook_id: str | None
    codebook_size: int
    modality: str
    index_order: str | None
    preprocessing: str  # JSON
    encoding: str
    passthrough: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION
    member: str = ""  # of the samples, which was encoded; empty: their only image or sound
    num_samples_dtype: str = "int64"
    views: Views | None = None  # None: one row per sample, which is the whole of it

    @classmethod
    def for_tokens(
        cls,
        *,
        tokenizer_id: str,
        codebook_id: str,
        codebook_size: int,
        modality: str,
        index_order: str,
        preprocessing: dict[str, Any],
        encoding: str = "list",
        passthrough: Sequence[str] = (),
        member: str = "",
        views: Views | None = None,
    ) -> "ShardLayout":
        """Raises ValueError for an unknown encoding and for passthrough columns that clash."""
        fixed = json.dumps(preprocessing, sort_keys=True)
        columns = tuple(passthrough)
        ids = (tokenizer_id, codebook_id, codebook_size)
        return cls(*ids, modality, index_order, fixed, encoding, columns, member=member, views=views)

    @classmethod
    def for_latents(
        cls,
        *,
        encoder_id: str,
        modality: str,
        preprocessing: dict[str, Any],
        passthrough: Sequence[str] = (),
        member: str = "",
    ) -> "ShardLayout":
        """Always packed. The encoder's id takes the place of the tokenizer's. Raises ValueError like `for_tokens`."""
        fixed = json.dumps(preprocessing, sort_keys=True)
        return cls(encoder_id, None, 0, modality, None, fixed, "packed", tuple(passthrough), member=member)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"tokens.encoding is {self.encoding!r}; choose one of: {', '.join(ENCODINGS)}")
        if self.num_samples_dtype not in NUM_SAMPLES_DTYPES:
            raise ValueError(f"num_samples_dtype is {self.num_samples_dtype!r}, not {' or '.join(NUM_SAMPLES_DTYPES)}")
        reserved = (*RESERVED, "view") if self.views else RESERVED
        for name in self.passthrough:
            if name in reserved or self.passthrough.count(name) > 1:
                raise ValueError(f"tokens.passthrough: a column {name!r} already exists; remove it from the list")

    @property
    def holds_latents(self) -> bool:
        return self.codebook_id is None

    @property
    def view_numbers(self) -> Sequence[int | None]:
        """The numbers of the rows of each sample: (None,) without views."""
        return range(self.views.count) if self.views else (None,)

    @property
    def rows_per_sample(self) -> int:
        return len(self.view_numbers)

    @property
    def token_dtype(self) -> np.dtype:
        return LATENT_DTYPE if self.holds_latents else token_dtype(self.codebook_size)

    def to_dict(self) -> dict[str, Any]:
        """As dataset.json stores it: an absent codebook is written as empty strings, an empty member and absent views
        are left out.
        """
        fields = {name: "" if value is None else value for name, value in asdict(self).items()}
        if not self.views:
            del fields["views"]
        if not self.member:
            del fields["member"]
        if self.num_samples_dtype == UNSTATED_NUM_SAMPLES:
            del fields["num_samples_dtype"]  # so that an old output keeps its files to the byte
        return {**fields, "passthrough": list(self.passthrough), "token_dtype": self.token_dtype.name}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ShardLayout":
        """Ignores fields that it does not know. Raises UnsupportedSchema if a newer schema is needed to read them.

        Raises KeyError, TypeError or ValueError if fields are missing or have values that no layout has.
        """
        check_schema_version(fields["schema_version"])
        stated = {"member": "", "num_samples_dtype": UNSTATED_NUM_SAMPLES, "views": None, **fields}
        known = {name: stated[name] for name in cls.__dataclass_fields__}
        known["views"] = Views.from_dict(fields["views"]) if "views" in fields else None
        if fields["token_dtype"] == LATENT_DTYPE.name:
            known |= {"codebook_id": None, "index_order": None}
        layout = cls(**{**known, "passthrough": tuple(known["passthrough"])})
        if wrong := wrong_field(layout):
            raise ValueError(wrong)
        if fields["token_dtype"] != layout.token_dtype.name:
            raise ValueError(f"token_dtype is {fields['token_dtype']!r}; {layout.codebook_size} codes need another")
        return layout

    def schema(self, source_shard: str) -> pa.Schema:
        tokens = pa.binary() if self.encoding == "packed" else pa.list_(pa.from_numpy_dtype(self.token_dtype))
        columns = [
            pa.field("key", pa.string(), nullable=False),
            pa.field("source_shard", pa.string(), nullable=False),
            pa.field("source_index", pa.int32(), nullable=False),
            *([pa.field("view", pa.int16(), nullable=False)] if self.views else []),
            pa.field("modality", pa.string(), nullable=False),
            pa.field("tokens", tokens, nullable=False),
            pa.field("shape", pa.list_(pa.int32()), nullable=False),
            *[pa.field(name, pa.int32()) for name in SIZE_COLUMNS[:-1]],
            pa.field("num_samples", pa.type_for_alias(self.num_samples_dtype)),
            *[pa.field(name, _passthrough_type(name)) for name in self.passthrough],
        ]
        return pa.schema(columns, metadata={**self.footer(), "source_shard": source_shard})

    def footer(self) -> dict[str, str]:
        """The fields that every token file of the output has in its footer."""
        fields = {name: value for name, value in self.to_dict().items() if name != "passthrough"}
        return {name: json.dumps(v, sort_keys=True) if name == "views" else str(v) for name, v in fields.items()}

    def to_table(self, rows: list[TokenRow], source_shard: str) -> pa.Table:
        """Arrow table of the rows. Raises ValueError if a token is not an index into the codebook, and if num_samples
        does not fit into its column.
        """
        schema = self.schema(source_shard)
        flat = [self._flat_tokens(row) for row in rows]
        self._check_num_samples(rows)
        columns: dict[str, Any] = {
            "key": [row.key for row in rows],
            "source_shard": [source_shard] * len(rows),
            "source_index": [row.source_index for row in rows],
            "view": [row.view for row in rows],
            "modality": [self.modality] * len(rows),
            "tokens": [t.tobytes() for t in flat] if self.encoding == "packed" else _list_array(flat, schema),
            "shape": [list(row.tokens.shape) for row in rows],
            **{name: [row.size.get(name) for row in rows] for name in SIZE_COLUMNS},
            **{name: [passthrough_value(name, row) for row in rows] for name in self.passthrough},
        }
        return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)

    def _check_num_samples(self, rows: list[TokenRow]) -> None:
        largest = np.iinfo(self.num_samples_dtype).max
        for row in rows:
            if row.size.get("num_samples", 0) > largest:
                raise ValueError(
                    f"key {row.key!r} has {row.size['num_samples']} samples; an earlier version created this output, "
                    f"with {self.num_samples_dtype} num_samples, which hold up to {largest}; choose another output"
                )

    def _flat_tokens(self, row: TokenRow) -> np.ndarray:
        tokens = row.tokens.reshape(-1)
        has_tokens = tokens.size > 0 and not self.holds_latents
        if has_tokens and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise ValueError(
                f"key {row.key!r} has tokens in {tokens.min()}..{tokens.max()}; "
                f"the codebook allows 0..{self.codebook_size - 1}"
            )
        return tokens.astype(self.token_dtype.newbyteorder("<"))


def check_schema_version(version: Any) -> None:
    """Raises UnsupportedSchema if this program is too old to read it."""
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise UnsupportedSchema(
            f"schema_version is {version!r}; this version of tokenmill reads up to {SCHEMA_VERSION}; upgrade tokenmill"
        )


def token_dtype(codebook_size: int) -> np.dtype:
    """The narrowest unsigned type that holds 0..codebook_size - 1. Raises ValueError above 2^32 codes."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if codebook_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    raise ValueError(
        f"{codebook_size} codes need more than 32 bits per token; schema {SCHEMA_VERSION} allows at most {2**32} codes"
    )


def to_parquet(table: pa.Table) -> bytes:
    """Bytes of a Parquet file, with zstd and dictionaries: smallest on disk up to K = 16384, and every tool reads it.

    Packed tokens are not compressed: compression saves nothing there and slows reading down.
    """
    out = io.BytesIO()
    packed = pa.types.is_binary(table.schema.field("tokens").type) if "tokens" in table.column_names else False
    plain = {"tokens"} if packed else set()
    pq.write_table(
        table,
        out,
        row_group_size=ROWS_PER_GROUP,
        compression={name: "none" if name in plain else "zstd" for name in _leaves(table.schema)},
        use_dictionary=[name for name in _leaves(table.schema) if name not in plain],
        write_statistics=["source_index"],  # `verify` checks its range in the footers
        write_page_checksum=True,
    )
    return out.getvalue()


def read_parquet(source: Any, columns: Sequence[str] | None = None, *, memory_map: bool = False) -> pa.Table:
    """Reads a Parquet file, and checks its page checksums if it has any: files of older versions have none.

    source: bytes, or a local path. Raises OSError or ValueError if it is damaged.
    """
    source = io.BytesIO(source) if isinstance(source, bytes) else source
    names = None if columns is None else list(columns)
    try:
        return pq.read_table(source, columns=names, memory_map=memory_map, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:  # some classes of Arrow are neither OSError nor ValueError
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # of the storage, not of the content
        raise ValueError(one_line(error)) from error


def tokens_as_lists(column: pa.Array, dtype: np.dtype) -> pa.ListArray:
    """The tokens column, list or packed, as a list array. Packed bytes are viewed in place, not copied."""
    if not pa.types.is_binary(column.type):
        return column
    _, offsets, data = column.buffers()
    positions = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1] // dtype.itemsize
    values = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), len(data or b"") // dtype.itemsize, [None, data])
    return pa.ListArray.from_arrays(pa.array(positions), values)


def views_of(table: pa.Table) -> list[int | None]:
    """The number of each row's view; None if the output has no views. A passthrough column may have the same name."""
    has_views = "view" in table.column_names and table.schema.field("view").type == pa.int16()
    return table["view"].to_pylist() if has_views else [None] * len(table)


def _leaves(schema: pa.Schema) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema]


def _list_array(flat: list[np.ndarray], schema: pa.Schema) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(tokens) for tokens in flat], dtype=np.int32)
    kind = schema.field("tokens").type
    values = np.concatenate(flat) if flat else np.empty(0, kind.value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)


def _passthrough_type(extension: str) -> pa.DataType:
    return pa.string() if extension.rsplit(".", 1)[-1] in TEXT_EXTENSIONS else pa.binary()


def passthrough_value(extension: str, row: TokenRow) -> str | bytes | None:
    """The value for the passthrough column, text without its byte order mark.

    None if the sample has no such member, or if it should be text but is not UTF-8.
    """
    value = row.passthrough.get(extension)
    if value is None or _passthrough_type(extension) == pa.binary():
        return value
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def passthrough_notes(rows: list[TokenRow], names: Sequence[str]) -> dict[str, int]:
    """How many rows have null in a passthrough column, by reason."""
    notes: collections.Counter[str] = collections.Counter()
    for name in names:
        absent = sum(name not in row.passthrough for row in rows)
        notes[f"rows without {name} (tokens.passthrough), which is null there"] = absent
        null = sum(passthrough_value(name, row) is None for row in rows)
        notes[f"rows whose {name} (tokens.passthrough) is not UTF-8, which is null there"] = null - absent
    return dict(+notes)
