"""One output of `tokenize`: what it is, and the commit of a shard into it.

OUT/dataset.json, OUT/inputs/<id>.json, OUT/tokens/<name>.parquet, OUT/quarantine/<name>.parquet,
OUT/manifest/<name>.json. A shard is done when its manifest entry exists; nothing else is a ledger.
OUT/failed/<name>.json tells why a shard could not be done the last time; it proves nothing.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import BrokenOutput, OutputMismatch
from pipeline.manifest import Manifest, Shard
from pipeline.tokens.layout import Layout, TokenRow, to_parquet

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
READERS = 16  # threads that read small objects


@dataclass
class Quarantined:
    """A sample that could not be tokenized. stage: read, decode, encode or passthrough."""

    key: str
    source_index: int
    stage: str
    error: str
    message: str


@dataclass
class Commit:
    """A manifest entry: what is proven of one shard."""

    name: str
    source_shard: str
    source_num_bytes: int | None  # None where the storage did not tell
    num_samples: int
    num_rows: int
    num_quarantined: int
    num_tokens: int
    tokens_sha256: str
    quarantine_sha256: str | None
    tokenizer_id: str
    codebook_id: str
    committed_at: float = 0.0  # seconds since 1970
    seconds: dict[str, float] = field(default_factory=dict)


class Output:
    """The folder OUT. Raises OutputMismatch where it is another tokenizer's, or was made with other settings."""

    def __init__(self, url: str, layout: Layout):
        self.url, self.layout = storage.normalise(url), layout

    @classmethod
    def create(cls, url: str, layout: Layout, inputs: Manifest, config: dict[str, Any]) -> "Output":
        """A new output, or the one that is there if the very same makes it."""
        about = {"layout": layout.to_dict(), "input_manifest_id": inputs.id, "config": config}
        try:
            storage.write_once(storage.join(url, "dataset.json"), _json(about))
        except FileExistsError:
            existing = cls.open(url)
            _refuse_other(existing.url, existing.layout.to_dict(), layout.to_dict())
        output = cls(url, layout)
        output._refuse_replaced(inputs)
        with contextlib.suppress(FileExistsError):  # the same list as before, by its id
            storage.write_once(output._at("inputs", f"{inputs.id}.json"), inputs.to_json().encode())
        return output

    @classmethod
    def open(cls, url: str) -> "Output":
        """Raises FileNotFoundError if there is no output."""
        try:
            about = json.loads(storage.read(storage.join(storage.normalise(url), "dataset.json")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{url} is no output of `tokenmill tokenize`: dataset.json is missing") from error
        return cls(url, Layout.from_dict(about["layout"]))

    def about(self) -> dict[str, Any]:
        return json.loads(storage.read(self._at("dataset.json")))

    # -- writing --------------------------------------------------------------------------------------------------

    def commit(
        self, shard: Shard, rows: list[TokenRow], quarantined: list[Quarantined], seconds: dict[str, float], now: float
    ) -> Commit:
        """Writes tokens, quarantine, and last the manifest entry. A second commit of a shard changes nothing.

        Returns the entry that stands, which is another worker's if that one was first.
        """
        if (stands := self._committed(shard.name)) is not None:
            return stands
        tokens = self.layout.to_table(rows, shard.url)
        # so that a file which another run left of a shard that was replaced since is not taken for this one's
        tokens = tokens.replace_schema_metadata(
            {**tokens.schema.metadata, b"source_num_bytes": str(shard.num_bytes).encode()}
        )
        tokens_sha256 = self._place("tokens", shard.name, tokens)
        quarantine_sha256 = None
        if quarantined:
            quarantine_sha256 = self._place("quarantine", shard.name, _quarantine_table(shard.url, quarantined))
        entry = Commit(
            name=shard.name,
            source_shard=shard.url,
            source_num_bytes=shard.num_bytes,
            num_samples=len(rows) + len(quarantined),
            num_rows=len(rows),
            num_quarantined=len(quarantined),
            num_tokens=sum(row.tokens.size for row in rows),
            tokens_sha256=tokens_sha256,
            quarantine_sha256=quarantine_sha256,
            tokenizer_id=self.layout.tokenizer_id,
            codebook_id=self.layout.codebook_id,
            committed_at=now,
            seconds=seconds,
        )
        try:
            storage.write_once(self._at("manifest", f"{shard.name}.json"), _json(asdict(entry)))
        except FileExistsError:
            stands = self._committed(shard.name)
            assert stands is not None
            return stands
        storage.remove(self._at("failed", f"{shard.name}.json"))
        return entry

    def _committed(self, name: str) -> Commit | None:
        url = self._at("manifest", f"{name}.json")
        return _parse_commit(url, storage.read(url)) if storage.exists(url) else None

    def _place(self, folder: str, name: str, table: pa.Table) -> str:
        """Creates the file and returns its SHA-256.

        A file of a run that died before its manifest entry is taken over if it holds the same samples, so that two
        drivers that race end up describing one file; a torn one, which no manifest names, is written anew.
        """
        url, data = self._at(folder, f"{name}.parquet"), to_parquet(table)
        while True:  # again where another driver has just replaced the same torn file
            try:
                storage.write_once(url, data)
                return _sha256(data)
            except FileExistsError:
                there = storage.read(url)
            if _same_samples(there, table) or self._committed(name):  # never remove what an entry names
                return _sha256(there)
            storage.remove(url)

    def note_failure(self, shard: Shard, message: str, now: float) -> None:
        """Leaves word for `status` of why a shard could not be done. A later success removes it."""
        note = {"name": shard.name, "source_shard": shard.url, "message": message, "failed_at": now}
        storage.replace(self._at("failed", f"{shard.name}.json"), _json(note))

    # -- reading --------------------------------------------------------------------------------------------------

    def committed_names(self) -> set[str]:
        return {_stem(url) for url in storage.list_files(self._at("manifest"))}

    def commits(self) -> list[Commit]:
        """All manifest entries, by name. Raises BrokenOutput that names an entry that is not one."""
        entries, problems = self.commits_and_problems()
        if problems:
            raise BrokenOutput(f"{self.url}: {problems[0]}; `tokenmill verify` tells more")
        return entries

    def commits_and_problems(self) -> tuple[list[Commit], list[str]]:
        """The sound manifest entries, and what is wrong with the others."""
        entries, problems = [], []
        for url, text in _read_all(storage.list_files(self._at("manifest"))):
            try:
                entries.append(_parse_commit(url, text))
            except BrokenOutput as error:
                problems.append(str(error))
        return entries, problems

    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(text) for _, text in _read_all(storage.list_files(self._at("failed")))]

    def inputs(self) -> list[Shard]:
        """Every shard that any run was given, by URL."""
        shards: dict[str, Shard] = {}
        for _, text in _read_all(storage.list_files(self._at("inputs"))):
            shards.update({shard.url: shard for shard in Manifest.from_json(text).shards})
        return [shards[url] for url in sorted(shards)]

    def read_tokens(self, name: str) -> bytes:
        return storage.read(self._at("tokens", f"{name}.parquet"))

    def read_quarantine(self, name: str) -> bytes:
        return storage.read(self._at("quarantine", f"{name}.parquet"))

    def tokens_url(self, name: str) -> str:
        return self._at("tokens", f"{name}.parquet")

    def _refuse_replaced(self, inputs: Manifest) -> None:
        committed = self.committed_names()
        if not committed.intersection(shard.name for shard in inputs.shards):
            return
        sizes = {entry.name: entry.source_num_bytes for entry in self.commits()}
        for shard in inputs.shards:
            if None not in (shard.num_bytes, sizes.get(shard.name)) and sizes[shard.name] != shard.num_bytes:
                raise OutputMismatch(
                    f"{shard.url} has {shard.num_bytes} bytes now, and had {sizes[shard.name]} when {self.url} "
                    "tokenized it: it was replaced. Give the new shard another name, or choose another output"
                )

    def _at(self, *parts: str) -> str:
        return storage.join(self.url, *parts)


def _refuse_other(url: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there == here:
        return
    differing = [name for name in here if there.get(name) != here[name]]
    what = "; ".join(f"{name} is {there.get(name)} there and {here[name]} here" for name in differing)
    raise OutputMismatch(f"{url} holds another dataset: {what}. Choose another output")


def _same_samples(parquet: bytes, table: pa.Table) -> bool:
    try:
        there = pq.read_table(io.BytesIO(parquet))
    except (pa.ArrowInvalid, OSError):
        return False
    # the footers apart: check_metadata would also compare the names of list items, which Parquet changes
    return (
        there.schema.equals(table.schema)
        and there.schema.metadata == table.schema.metadata
        and all(there[name].equals(table[name]) for name in ("key", "source_index"))
    )


def _quarantine_table(source_shard: str, quarantined: list[Quarantined]) -> pa.Table:
    ordered = sorted(quarantined, key=lambda sample: sample.source_index)
    rows = [{**asdict(sample), "source_shard": source_shard} for sample in ordered]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _parse_commit(url: str, text: bytes) -> Commit:
    try:
        entry = Commit(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise BrokenOutput(f"manifest/{_stem(url)}.json is no manifest entry: {error}") from error
    if entry.name != _stem(url):
        raise BrokenOutput(f"manifest/{_stem(url)}.json is the entry of {entry.name}: readers would get its rows twice")
    return entry


def _read_all(urls: list[str]) -> Iterable[tuple[str, bytes]]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(zip(urls, pool.map(storage.read, urls), strict=True))


def _stem(url: str) -> str:
    return url.rsplit("/", 1)[1].rsplit(".", 1)[0]


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
