"""One output of `tokenize`: what it is, and the commit of a shard into it.

OUT/dataset.json, OUT/inputs/<id>.json, OUT/tokens/<name>.parquet, OUT/quarantine/<name>.parquet,
OUT/manifest/<name>.json. A shard is done when its manifest entry exists; nothing else is a ledger. What a retry
recovered of it lies beside that as <name>+1, with an entry like any other.
OUT/failed/<name>.json tells why a shard could not be done the last time; it proves nothing.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.shards import Manifest, Shard
from pipeline.errors import BrokenOutput, OutputMismatch
from pipeline.tokens.commit import Commit, History, histories, in_order, parse_commit, retry_name, what_changed
from pipeline.tokens.placing import place, same_samples, some_of
from pipeline.tokens.quarantine import Quarantined, parse_quarantine, quarantine_table
from pipeline.tokens.schema import Layout, TokenRow

READERS = 16  # threads that read small objects


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
        output.take_inputs(inputs)
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

    def take_inputs(self, inputs: Manifest) -> None:
        """Notes that these shards belong here. Raises OutputMismatch if one was replaced after its commit."""
        self.refuse_replaced(inputs.shards)
        with contextlib.suppress(FileExistsError):  # the same list as before, by its id
            storage.write_once(self._at("inputs", f"{inputs.id}.json"), inputs.to_json().encode())

    def commit(
        self,
        shard: Shard,
        rows: list[TokenRow],
        quarantined: list[Quarantined],
        seconds: dict[str, float],
        now: float,
        *,
        num_samples: int | None = None,
    ) -> Commit:
        """Writes tokens, quarantine, and last the manifest entry. A second commit of a shard changes nothing.

        num_samples: as the reader of the shard counted them; None where none did. seconds: by stage, and "total"
        until now; writing is added. Returns the entry that stands, which is another worker's if that one was first.
        Raises ValueError, and writes nothing, if samples 0..num_samples - 1 are not each there once.
        """
        if (stands := self._committed(shard.name)) is not None:
            return stands
        expected = range(len(rows) + len(quarantined) if num_samples is None else num_samples)
        _refuse_lost(shard, rows, quarantined, expected)
        start, table = time.monotonic(), self._tokens_table(shard, rows)
        tokens = self._place("tokens", shard.name, table, partial(same_samples, table=table))
        entry = self._entry(shard, 0, tokens, quarantined, now)
        entry.seconds = _with_writing(seconds, time.monotonic() - start)
        stands = self._write_entry(entry)
        if stands is entry:
            storage.remove(self._at("failed", f"{shard.name}.json"))
        return stands

    def commit_retry(
        self,
        shard: Shard,
        history: History,
        rows: list[TokenRow],
        quarantined: list[Quarantined],
        seconds: dict[str, float],
        now: float,
    ) -> Commit | None:
        """Adds the rows that a retry made of quarantined samples, and the quarantine that is left, under a new name.

        history: what the retry set out from; rows and quarantined are what stood in quarantine then. None if another
        retry was first, whose result stands while this one's is dropped; or if there are no rows: then nothing is
        written. Raises ValueError like commit.
        """
        before = self.quarantined(history.last)
        taken_up = [sample.source_index for sample in before]
        _refuse_lost(shard, rows, quarantined, taken_up)
        if not rows:
            return None
        start, retry, table = time.monotonic(), history.last.retry + 1, self._tokens_table(shard, rows)
        # Another retry may have recovered other samples and died, or be at work. Removing its file could leave its
        # entry without one; so its rows are taken over, and what else this retry recovered stays for the next one.
        tokens = self._place(
            "tokens", retry_name(shard.name, retry), table, partial(some_of, table=table, indices=taken_up)
        )
        settled = set(_source_indices(tokens))
        reasons = {sample.source_index: sample for sample in [*before, *quarantined]}
        still = [sample for index, sample in reasons.items() if index not in settled]
        entry = self._entry(shard, retry, tokens, still, now)
        entry.seconds = _with_writing(seconds, time.monotonic() - start)
        return entry if self._write_entry(entry) is entry else None

    def _tokens_table(self, shard: Shard, rows: list[TokenRow]) -> pa.Table:
        table = self.layout.to_table(rows, shard.url)
        about = {
            # so that a file which another run left of a shard that was replaced since is not taken for this one's
            "source_num_bytes": str(shard.num_bytes),
            "source_version": str(shard.version),
            "num_tokens": str(sum(row.tokens.size for row in rows)),
        }
        return table.replace_schema_metadata({**table.schema.metadata, **about})

    def _place(self, folder: str, name: str, table: pa.Table, fits: Callable[[pa.Table], bool]) -> bytes:
        url = self._at(folder, f"{name}.parquet")
        return place(url, table, fits, is_committed=lambda: self._committed(name) is not None)

    def _entry(self, shard: Shard, retry: int, tokens: bytes, quarantined: list[Quarantined], now: float) -> Commit:
        """Places the quarantine; returns the entry of that and of the tokens, which lie there already."""
        name, quarantine_sha256 = retry_name(shard.name, retry), None
        if quarantined:
            table = quarantine_table(shard.url, quarantined)
            placed = self._place("quarantine", name, table, partial(same_samples, table=table))
            quarantine_sha256 = _sha256(placed)
        indices = _source_indices(tokens)
        return Commit(
            name=name,
            source_shard=shard.url,
            source_num_bytes=shard.num_bytes,
            source_version=shard.version,
            num_samples=len(indices) + len(quarantined),
            num_rows=len(indices),
            num_quarantined=len(quarantined),
            num_tokens=int(pq.read_schema(io.BytesIO(tokens)).metadata[b"num_tokens"]),
            tokens_sha256=_sha256(tokens),
            tokens_num_bytes=len(tokens),
            quarantine_sha256=quarantine_sha256,
            tokenizer_id=self.layout.tokenizer_id,
            codebook_id=self.layout.codebook_id,
            committed_at=now,
            worker={"host": socket.gethostname(), "pid": os.getpid()},
            reasons=dict(collections.Counter(f"{sample.stage} {sample.error}" for sample in quarantined)),
            retry=retry,
            settled=indices if retry else [],
        )

    def _write_entry(self, entry: Commit) -> Commit:
        """Commits: returns the entry that stands, which is another writer's if that one was first."""
        try:
            storage.write_once(self._at("manifest", f"{entry.name}.json"), _json(asdict(entry)))
        except FileExistsError:
            stands = self._committed(entry.name)
            assert stands is not None
            return stands
        return entry

    def _committed(self, name: str) -> Commit | None:
        try:
            return parse_commit(name, storage.read(self._at("manifest", f"{name}.json")))
        except FileNotFoundError:
            return None

    def note_failure(self, shard: Shard, message: str, now: float) -> None:
        """Leaves word for `status` of why a shard could not be done. A later success removes it."""
        note = {"name": shard.name, "source_shard": shard.url, "message": message, "failed_at": now}
        storage.replace(self._at("failed", f"{shard.name}.json"), _json(note))

    # -- reading --------------------------------------------------------------------------------------------------

    def committed_names(self) -> set[str]:
        return {_stem(url) for url in storage.list_files(self._at("manifest"))}

    def commits(self) -> list[Commit]:
        """All manifest entries by name, retries after their first commit. Raises BrokenOutput that names a bad one."""
        entries, problems = self.commits_and_problems()
        if problems:
            raise BrokenOutput(f"{self.url}: {problems[0]}; `tokenmill verify` tells more")
        return entries

    def commits_and_problems(self) -> tuple[list[Commit], list[str]]:
        """The sound manifest entries, and what is wrong with the others."""
        entries, problems = [], []
        for url, text in _read_all(storage.list_files(self._at("manifest"))):
            try:
                entries.append(parse_commit(_stem(url), text))
            except BrokenOutput as error:
                problems.append(str(error))
        return sorted(entries, key=in_order), problems

    def histories(self) -> list[History]:
        """The entries by shard. Raises BrokenOutput like commits."""
        return histories(self.commits())

    def history(self, name: str) -> History | None:
        """What is committed of the shard of that name now; None if nothing is."""
        first = self._committed(name)
        if first is None:
            return None
        retries = (self._committed(retry_name(name, number)) for number in itertools.count(1))
        return History([first, *itertools.takewhile(lambda entry: entry is not None, retries)])  # type: ignore[list-item]

    def failures(self) -> list[dict[str, Any]]:
        """Why shards could not be done. A note that goes while we read was of a shard that is done by now."""
        notes = map_in_threads(_read_if_there, storage.list_files(self._at("failed")), READERS)
        return [json.loads(text) for text in notes if text is not None]

    def inputs(self) -> list[Shard]:
        """Every shard that any run was given, by URL."""
        return list({shard.url: shard for shard in self.input_versions()}.values())

    def input_versions(self) -> list[Shard]:
        """As inputs; and a shard that was replaced between two runs comes once for each of them."""
        lists = [Manifest.from_json(text).shards for _, text in _read_all(storage.list_files(self._at("inputs")))]
        return sorted(
            {shard for shards in lists for shard in shards}, key=lambda s: (s.url, str(s.num_bytes), str(s.version))
        )

    def read_tokens(self, name: str) -> bytes:
        return storage.read(self.tokens_url(name))

    def read_quarantine(self, name: str) -> bytes:
        return storage.read(self.quarantine_url(name))

    def quarantined(self, entry: Commit) -> list[Quarantined]:
        """The samples of a shard that its entry left in quarantine."""
        return parse_quarantine(self.read_quarantine(entry.name)) if entry.quarantine_sha256 else []

    def tokens_url(self, name: str) -> str:
        return self._at("tokens", f"{name}.parquet")

    def quarantine_url(self, name: str) -> str:
        return self._at("quarantine", f"{name}.parquet")

    def refuse_replaced(self, shards: Iterable[Shard]) -> None:
        """Raises OutputMismatch if a shard is not the one that was committed under its URL."""
        committed = self.committed_names()
        suspects = [shard for shard in shards if shard.name in committed]
        urls = [self._at("manifest", f"{shard.name}.json") for shard in suspects]
        for shard, (_, text) in zip(suspects, _read_all(urls), strict=True):
            if changed := what_changed(parse_commit(shard.name, text), shard):
                raise OutputMismatch(
                    f"{shard.url} {changed} when {self.url} tokenized it: it was replaced. "
                    "Put the old one back, give the new one another name, or choose another output"
                )

    def _at(self, *parts: str) -> str:
        return storage.join(self.url, *parts)


def _refuse_other(url: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there == here:
        return
    differing = [name for name in here if there.get(name) != here[name]]
    what = "; ".join(f"{name} is {there.get(name)} there and {here[name]} here" for name in differing)
    raise OutputMismatch(f"{url} holds another dataset: {what}. Choose another output")


def _refuse_lost(shard: Shard, rows: list[TokenRow], quarantined: list[Quarantined], expected: Collection[int]) -> None:
    """Every sample must be in one place before anything is written: later it could only be found missing."""
    places: list[TokenRow | Quarantined] = [*rows, *quarantined]
    found = collections.Counter(sample.source_index for sample in places)
    lost = [index for index in expected if index not in found]
    doubled = [index for index, times in found.items() if times > 1]
    unknown = sorted(found.keys() - set(expected))
    if lost or doubled or unknown:
        raise ValueError(
            f"{shard.url}: {len(rows)} rows and {len(quarantined)} quarantined are not its {len(expected)} samples "
            f"(source_index lost: {_few(lost)}; twice: {_few(doubled)}; unknown: {_few(unknown)}). Nothing was "
            "committed; this is a mistake in tokenmill, or the shard changed while it was read"
        )


def _few(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:5])) or "none"
    return f"{shown} and {len(indices) - 5} more" if len(indices) > 5 else shown


def _with_writing(seconds: dict[str, float], writing: float) -> dict[str, float]:
    total = {"total": seconds["total"] + writing} if "total" in seconds else {}
    return {stage: round(spent, 4) for stage, spent in {**seconds, "write": writing, **total}.items()}


def _source_indices(tokens: bytes) -> list[int]:
    return pq.read_table(io.BytesIO(tokens), columns=["source_index"])["source_index"].to_pylist()


def _read_all(urls: list[str]) -> Iterator[tuple[str, bytes]]:
    return zip(urls, map_in_threads(storage.read, urls, READERS), strict=True)


def _read_if_there(url: str) -> bytes | None:
    try:
        return storage.read(url)
    except FileNotFoundError:
        return None


def _stem(url: str) -> str:
    return url.rsplit("/", 1)[1].rsplit(".", 1)[0]


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
