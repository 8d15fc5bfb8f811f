"""The output folder of `tokenize`: its layout, its input shards and its commits.

OUT/dataset.json, OUT/inputs/<id>.json, OUT/tokens/<name>.parquet, OUT/quarantine/<name>.parquet,
OUT/manifest/<name>.json. A shard is done when its manifest entry exists; no other file says so. The rows that a retry
recovered are in separate files <name>+1, with their own manifest entry.
OUT/failed/<name>.json says why the last attempt at a shard failed. It is a note only, and readers ignore it.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.shards import Shard, ShardList
from pipeline.errors import BrokenOutput, OutputMismatch, UnsupportedSchema
from pipeline.tokens.commit import (
    Commit,
    CommittedShard,
    group_by_shard,
    parse_commit,
    retry_name,
    sort_key,
    what_changed,
)
from pipeline.tokens.quarantine import Quarantined, parse_quarantine
from pipeline.tokens.schema import ShardLayout

READERS = 16  # threads that read small objects


class Output:
    """The folder OUT. pipeline.tokens.writer commits shards to it."""

    def __init__(self, url: str, layout: ShardLayout):
        self.url, self.layout = storage.normalise(url), layout

    @classmethod
    def create(cls, url: str, layout: ShardLayout, inputs: ShardList, config: dict[str, Any]) -> "Output":
        """A new output, or the existing one. Raises OutputMismatch if that has another tokenizer or other settings.

        An output of an earlier version keeps the type of its column num_samples, so that all its files have one.
        """
        about = {"layout": layout.to_dict(), "input_manifest_id": inputs.id, "config": config}
        try:
            storage.write_once(storage.join(url, "dataset.json"), to_json(about))
        except FileExistsError:
            existing = cls.open(url)
            layout = replace(layout, num_samples_dtype=existing.layout.num_samples_dtype)
            _refuse_other(existing.url, existing.layout.to_dict(), layout.to_dict())
        output = cls(url, layout)
        output.add_inputs(inputs)
        return output

    @classmethod
    def open(cls, url: str) -> "Output":
        """Raises FileNotFoundError if there is no output, and UnsupportedSchema if a newer version wrote it."""
        try:
            about = json.loads(storage.read(storage.join(storage.normalise(url), "dataset.json")))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{url} is not an output of `tokenmill tokenize`: dataset.json is missing"
            ) from error
        try:
            return cls(url, ShardLayout.from_dict(about["layout"]))
        except UnsupportedSchema as error:
            raise UnsupportedSchema(f"{url}/dataset.json: {error}") from error

    def about(self) -> dict[str, Any]:
        """The content of dataset.json."""
        return json.loads(storage.read(self._at("dataset.json")))

    # -- input shards ---------------------------------------------------------------------------------------------

    def add_inputs(self, inputs: ShardList) -> None:
        """Records that these shards belong to the output. Raises OutputMismatch if a committed one was replaced."""
        self.refuse_replaced(inputs.shards)
        with contextlib.suppress(FileExistsError):  # the same list, by its id
            storage.write_once(self._at("inputs", f"{inputs.id}.json"), inputs.to_json().encode())

    def inputs(self) -> list[Shard]:
        """Every shard that any run was given, sorted by URL."""
        return list({shard.url: shard for shard in self.input_versions()}.values())

    def input_versions(self) -> list[Shard]:
        """Like `inputs`, but a shard that was replaced between two runs is listed once per version."""
        lists = [ShardList.from_json(text).shards for _, text in _read_all(storage.list_files(self._at("inputs")))]
        return sorted(
            {shard for shards in lists for shard in shards}, key=lambda s: (s.url, str(s.num_bytes), str(s.version))
        )

    def refuse_replaced(self, shards: Iterable[Shard]) -> None:
        """Raises OutputMismatch if a shard is not the one that was committed under its URL."""
        committed = self.committed_names()
        suspects = [shard for shard in shards if shard.name in committed]
        urls = [self.entry_url(shard.name) for shard in suspects]
        for shard, (_, text) in zip(suspects, _read_all(urls), strict=True):
            if changed := what_changed(parse_commit(shard.name, text), shard):
                raise OutputMismatch(
                    f"{shard.url} {changed} when {self.url} tokenized it, so it was replaced. "
                    "Restore the old shard, rename the new one, or choose another output"
                )

    # -- commits --------------------------------------------------------------------------------------------------

    def committed_names(self) -> set[str]:
        """Names of all manifest entries, retries included."""
        return {_stem(url) for url in storage.list_files(self._at("manifest"))}

    def read_entry(self, name: str) -> Commit | None:
        """None if there is no such entry. Raises BrokenOutput if it is invalid."""
        text = storage.read_if_exists(self.entry_url(name))
        return None if text is None else parse_commit(name, text)

    def commits(self) -> list[Commit]:
        """All manifest entries by name, retries after the first commit. Raises BrokenOutput if one is invalid."""
        entries, problems = self.commits_and_problems()
        if problems:
            raise BrokenOutput(f"{self.url}: {problems[0]}; run `tokenmill verify` for details")
        return entries

    def commits_and_problems(self) -> tuple[list[Commit], list[str]]:
        """The valid manifest entries, and a message for each invalid one."""
        entries, problems = [], []
        for url, text in _read_all(storage.list_files(self._at("manifest"))):
            try:
                entries.append(parse_commit(_stem(url), text))
            except BrokenOutput as error:
                problems.append(str(error))
        return sorted(entries, key=sort_key), problems

    def committed_shards(self) -> list[CommittedShard]:
        """All entries, grouped by shard. Raises BrokenOutput like `commits`."""
        return group_by_shard(self.commits())

    def committed_shard(self, name: str) -> CommittedShard | None:
        """All entries of one shard; None if it has none."""
        first = self.read_entry(name)
        if first is None:
            return None
        entries = [first]
        for number in itertools.count(1):
            entry = self.read_entry(retry_name(name, number))
            if entry is None:
                break
            entries.append(entry)
        return CommittedShard(entries)

    def quarantined(self, entry: Commit) -> list[Quarantined]:
        """The samples in the quarantine file of this entry."""
        return parse_quarantine(self.read_quarantine(entry.name)) if entry.quarantine_sha256 else []

    # -- failed shards --------------------------------------------------------------------------------------------

    def record_failure(self, shard: Shard, message: str, now: float) -> None:
        """Writes a note for `status`, replacing an older one. A later commit of the shard removes it."""
        note = {"name": shard.name, "source_shard": shard.url, "message": message, "failed_at": now}
        storage.replace(self._failure_url(shard.name), to_json(note))

    def remove_failure(self, name: str) -> None:
        storage.remove(self._failure_url(name))

    def failures(self) -> list[dict[str, Any]]:
        """The notes of all failed shards. A note that disappears while we read belongs to a shard that is now done."""
        notes = map_in_threads(storage.read_if_exists, storage.list_files(self._at("failed")), READERS)
        return [json.loads(text) for text in notes if text is not None]

    # -- files ----------------------------------------------------------------------------------------------------

    def read_tokens(self, name: str) -> bytes:
        return storage.read(self.tokens_url(name))

    def read_quarantine(self, name: str) -> bytes:
        return storage.read(self.quarantine_url(name))

    def tokens_url(self, name: str) -> str:
        return self._at("tokens", f"{name}.parquet")

    def quarantine_url(self, name: str) -> str:
        return self._at("quarantine", f"{name}.parquet")

    def entry_url(self, name: str) -> str:
        return self._at("manifest", f"{name}.json")

    def _failure_url(self, name: str) -> str:
        return self._at("failed", f"{name}.json")

    def _at(self, *parts: str) -> str:
        return storage.join(self.url, *parts)


def to_json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()


def _refuse_other(url: str, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    if existing == wanted:
        return
    differing = [name for name in wanted if existing.get(name) != wanted[name]]
    what = "; ".join(f"{name} is {existing.get(name)} there and {wanted[name]} here" for name in differing)
    raise OutputMismatch(f"{url} holds another dataset: {what}. Choose another output")


def _read_all(urls: list[str]) -> Iterator[tuple[str, bytes]]:
    return zip(urls, map_in_threads(storage.read, urls, READERS), strict=True)


def _stem(url: str) -> str:
    return url.rsplit("/", 1)[1].rsplit(".", 1)[0]
