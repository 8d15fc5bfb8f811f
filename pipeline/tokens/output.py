"""The output folder of `tokenize`: its layout, its input shards and its commits.

OUT/dataset.json, OUT/inputs/<id>.json, OUT/tokens/<name>.parquet, OUT/quarantine/<name>.parquet,
OUT/manifest/<name>.json. A shard is done when its manifest entry exists; no other file says so. The rows that a retry
recovered are in separate files <name>+1, with their own manifest entry.
OUT/failed/<name>.json says why the last attempt at a shard failed. It is a note only, and readers ignore it.
OUT/index.json (pipeline.tokens.index) is a view of the manifest, for readers.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.corpus.batches import map_in_threads
from pipeline.corpus.shards import Shard, ShardList
from pipeline.errors import BrokenDataset, BrokenOutput, OutputMismatch, StorageError, UnsupportedSchema
from pipeline.tokens.commit import (
    REFUSE,
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

REPAIR = "`tokenmill verify output=... verify.repair=true` removes what is damaged"
REPAIR_AND_RERUN = f"{REPAIR}; then rerun the same `tokenmill tokenize`, which makes it again"
NOTE_FIELDS = ("name", "source_shard", "message")
FOLDERS = ("tokens", "quarantine", "manifest", "inputs", "failed")
READERS = 16  # threads that read small objects


class Output:
    """The folder OUT. pipeline.tokens.writer commits shards to it."""

    def __init__(self, url: str, layout: ShardLayout):
        self.url, self.layout = storage.normalise(url), layout

    @classmethod
    def create(
        cls, url: str, layout: ShardLayout, inputs: ShardList, config: dict[str, Any], *, same_names: str = REFUSE
    ) -> "Output":
        """A new output, or the existing one. Raises OutputMismatch if that has another tokenizer or other settings, and
        like `add_inputs`.

        An output of an earlier version keeps the type of its column num_samples, so that all its files have one.
        """
        about = {"layout": layout.to_dict(), "input_manifest_id": inputs.id, "config": config}
        output = cls(url, layout)
        try:
            if not storage.exists(output._at("dataset.json")):
                output._refuse_other_entries()
            storage.write_once(output._at("dataset.json"), to_json(about))
        except FileExistsError:
            existing = cls.open(url)
            layout = replace(layout, num_samples_dtype=existing.layout.num_samples_dtype)
            _refuse_other(existing.url, existing.layout.to_dict(), layout.to_dict())
        output = cls(url, layout)
        output.add_inputs(inputs, same_names)
        return output

    @classmethod
    def open(cls, url: str) -> "Output":
        """Raises FileNotFoundError if there is no output, UnsupportedSchema if a newer version wrote it, and
        BrokenDataset if dataset.json is damaged."""
        return cls(url, ShardLayout.from_dict(_read_about(url)["layout"]))

    def about(self) -> dict[str, Any]:
        """The content of dataset.json. Raises like `open`."""
        return _read_about(self.url)

    def _refuse_other_entries(self) -> None:
        """Raises OutputMismatch if dataset.json is missing and the commits are those of another tokenizer."""
        entries, _ = self.commits_and_problems()
        others = {entry.tokenizer_id for entry in entries} - {self.layout.tokenizer_id}
        if others:
            raise OutputMismatch(
                f"{self.url} lacks dataset.json, and holds shards of tokenizer {', '.join(sorted(others))}, not "
                f"{self.layout.tokenizer_id}; rerun `tokenmill tokenize` with that tokenizer, or choose another output"
            )

    # -- input shards ---------------------------------------------------------------------------------------------

    def add_inputs(self, inputs: ShardList, same_names: str = REFUSE) -> None:
        """Records that these shards belong to the output.

        Raises OutputMismatch if a committed one was replaced; and, unless same_names is "new", if one looks like a
        shard that the output was given under another path.
        """
        self.refuse_replaced(inputs.shards)
        if same_names == REFUSE:
            self._refuse_twins(inputs.shards)
        with contextlib.suppress(FileExistsError):  # the same list, by its id
            storage.write_once(self.list_url(inputs.id), inputs.to_json().encode())

    def inputs(self) -> list[Shard]:
        """Every shard that any run was given, sorted by URL. Raises BrokenOutput like `input_lists`."""
        return list({shard.url: shard for shard in self.input_versions()}.values())

    def input_versions(self) -> list[Shard]:
        """Like `inputs`, but a shard that was replaced between two runs is listed once per version."""
        return sorted_versions(self.input_lists())

    def input_lists(self) -> dict[str, list[Shard]]:
        """The lists that runs were given, by id. Raises BrokenOutput if one cannot be read."""
        lists, problems = self.input_lists_and_problems()
        if problems:
            raise BrokenOutput(f"{self.url}: {next(iter(problems.values()))}")
        return lists

    def input_lists_and_problems(self) -> tuple[dict[str, list[Shard]], dict[str, str]]:
        """The lists that can be read, by id, and a message for each other one."""
        lists, problems = {}, {}
        for url, text in _read_all(self._files("inputs")):
            try:
                lists[_stem(url)] = _parse_list(_stem(url), text).shards
            except (ValueError, RecursionError) as error:
                problems[_stem(url)] = f"inputs/{_stem(url)}.json is damaged ({error}); {REPAIR_AND_RERUN}"
        return lists, problems

    def _refuse_twins(self, shards: Sequence[Shard]) -> None:
        known = {shard.url: shard for shard in self.inputs()}
        new = [shard for shard in shards if shard.url not in known]
        by_name: dict[tuple[str, int | None], str] = {name_and_size(shard): shard.url for shard in known.values()}
        for shard in new:
            there = by_name.get(name_and_size(shard))
            if shard.num_bytes is not None and there is not None:
                raise OutputMismatch(
                    f"{shard.url} has the same name and size as {there}, which {self.url} was given before: it may be "
                    "the same shard under another path. Give the old path, or choose another output; set "
                    "tokens.same_names=new if they are different shards"
                )
        self._refuse_links(new)

    def _refuse_links(self, shards: Sequence[Shard]) -> None:
        """Raises OutputMismatch if two of the shards are one file."""
        by_name: dict[tuple[str, int | None], Shard] = {}
        for shard in shards:
            other = by_name.setdefault(name_and_size(shard), shard)
            if other is not shard and storage.same_file(shard.url, other.url):
                raise OutputMismatch(
                    f"data.shards names one file twice: {other.url} and {shard.url}; remove one of them, or set "
                    "tokens.same_names=new to tokenize both"
                )

    def refuse_replaced(self, shards: Iterable[Shard]) -> None:
        """Raises OutputMismatch if a shard is not the one that was committed under its URL."""
        committed = self.committed_names()
        suspects = [shard for shard in shards if shard.name in committed]
        urls = [self.entry_url(shard.name) for shard in suspects]
        for shard, (_, text) in zip(suspects, _read_all(urls), strict=True):
            entry = self._parse(shard.name, text)
            if changed := what_changed(entry, shard):
                raise OutputMismatch(
                    f"{shard.url} {changed} when {self.url} tokenized it, so it was replaced. "
                    f"Restore the old shard, rename the new one, or choose another output{_same_time(entry, shard)}"
                )

    # -- commits --------------------------------------------------------------------------------------------------

    def committed_names(self) -> set[str]:
        """Names of all manifest entries, retries included."""
        return {_stem(url) for url in self._files("manifest")}

    def strays(self) -> list[str]:
        """Files in the folders of JSON files that are none of ours, such as .DS_Store: "manifest/.DS_Store"."""
        listed = {folder: storage.list_entries(self._at(folder)) for folder in ("manifest", "inputs", "failed")}
        return [f"{folder}/{_name(url)}" for folder, urls in listed.items() for url in urls if not _is_ours(_name(url))]

    def read_entry(self, name: str) -> Commit | None:
        """None if there is no such entry. Raises BrokenOutput if it is invalid."""
        text = storage.read_if_exists(self.entry_url(name))
        return None if text is None else self._parse(name, text)

    def _parse(self, name: str, text: bytes) -> Commit:
        try:
            return parse_commit(name, text)
        except BrokenOutput as error:
            raise BrokenOutput(f"{self.url}: {error}; {REPAIR_AND_RERUN}") from error

    def commits(self) -> list[Commit]:
        """All manifest entries by name, retries after the first commit. Raises BrokenOutput if one is invalid."""
        entries, problems = self.commits_and_problems()
        if problems:
            raise BrokenOutput(f"{self.url}: {next(iter(problems.values()))}; {REPAIR_AND_RERUN}")
        return entries

    def commits_and_problems(self) -> tuple[list[Commit], dict[str, str]]:
        """The valid manifest entries, and a message for each invalid one, by its name."""
        entries, problems = [], {}
        for url, text in _read_all(self._files("manifest")):
            try:
                entries.append(parse_commit(_stem(url), text))
            except BrokenOutput as error:
                problems[_stem(url)] = str(error)
        return sorted(entries, key=sort_key), problems

    def entry_files(self) -> dict[str, storage.StoredObject]:
        """The files of the manifest entries, unread, by the names of the entries."""
        listed = storage.scan_entries(self._at("manifest"))
        return {_stem(file.url): file for file in listed if _is_ours(_name(file.url))}

    def read_entries(self, names: list[str]) -> list[Commit]:
        """The entries of these names, in their order. Raises BrokenOutput if one is invalid."""
        texts = _read_all([self.entry_url(name) for name in names])
        return [self._parse(name, text) for name, (_, text) in zip(names, texts, strict=True)]

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
        """The samples in the quarantine file of this entry. Raises BrokenOutput if it is missing or damaged."""
        if not entry.quarantine_sha256:
            return []
        try:
            data = self.read_quarantine(entry.name)
            if hashlib.sha256(data).hexdigest() != entry.quarantine_sha256:
                raise ValueError("the file is not the one that was committed (its checksum differs)")
            return parse_quarantine(data)
        except (StorageError, PermissionError):
            raise
        except (OSError, ValueError) as error:
            raise BrokenOutput(f"{self.quarantine_url(entry.name)}: {error}; {REPAIR_AND_RERUN}") from error

    # -- failed shards --------------------------------------------------------------------------------------------

    def record_failure(self, shard: Shard, message: str, now: float) -> None:
        """Writes a note for `status`, replacing an older one. A later commit of the shard removes it."""
        note = {"name": shard.name, "source_shard": shard.url, "message": message, "failed_at": now}
        storage.replace(self.failure_url(shard.name), to_json(note))

    def remove_failure(self, name: str) -> None:
        storage.remove(self.failure_url(name))

    def failures(self) -> list[dict[str, Any]]:
        """The notes of all failed shards. A note that disappears while we read belongs to a shard that is now done.

        Raises BrokenOutput if one is damaged.
        """
        notes, problems = self.failures_and_problems()
        if problems:
            raise BrokenOutput(f"{self.url}: {next(iter(problems.values()))}")
        return notes

    def failures_and_problems(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The notes that can be read, and a message for each other one, by its name."""
        urls = self._files("failed")
        notes, problems = [], {}
        for url, text in zip(urls, map_in_threads(_read_note, urls, READERS), strict=True):
            try:
                if text is not None:
                    notes.append(_parse_note(text))
            except (ValueError, RecursionError) as error:
                problems[_stem(url)] = f"failed/{_stem(url)}.json is damaged ({error}); {REPAIR}"
        return notes, problems

    # -- files ----------------------------------------------------------------------------------------------------

    def file_sizes(self) -> dict[str, dict[str, int]]:
        """Bytes of each file in tokens/ and quarantine/: folder -> name without the extension -> bytes."""
        sizes: dict[str, dict[str, int]] = {"tokens": {}, "quarantine": {}}
        for folder, by_name in sizes.items():
            for found in storage.scan(self._at(folder)):
                if found.num_bytes is not None:
                    by_name[_stem(found.url)] = found.num_bytes
        return sizes

    def temporary_files(self) -> list[str]:
        """URLs of unfinished files, from writers that still run or were killed."""
        folders = (self.url, *(self._at(folder) for folder in FOLDERS))
        return [url for folder in folders for url in storage.temporary_files(folder)]

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

    def index_url(self) -> str:
        return self._at("index.json")

    def list_url(self, list_id: str) -> str:
        return self._at("inputs", f"{list_id}.json")

    def failure_url(self, name: str) -> str:
        return self._at("failed", f"{name}.json")

    def _files(self, folder: str) -> list[str]:
        """URLs of the JSON files in the folder, without files of other programs."""
        return [url for url in storage.list_entries(self._at(folder)) if _is_ours(_name(url))]

    def _at(self, *parts: str) -> str:
        return storage.join(self.url, *parts)


def to_json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()


def _refuse_other(url: str, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    if existing == wanted:
        return
    absent = "not set"  # a member that is not chosen
    existing, wanted = _flat(existing), _flat(wanted)
    there_and_here = {
        name: (existing.get(name, absent), wanted.get(name, absent)) for name in dict.fromkeys([*wanted, *existing])
    }
    what = "; ".join(
        f"{name} is {there} there and {here} here" for name, (there, here) in there_and_here.items() if there != here
    )
    raise OutputMismatch(f"{url} holds another dataset: {what}. Choose another output")


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """With the fields of views one by one: views.count and so on."""
    views = {f"views.{name}": value for name, value in fields.get("views", {}).items()}
    return {name: value for name, value in fields.items() if name != "views"} | views


def _read_all(urls: list[str]) -> Iterator[tuple[str, bytes]]:
    return zip(urls, map_in_threads(_read_listed, urls, READERS), strict=True)


def _read_listed(url: str) -> bytes:
    """The content of a listed file; of a folder or a link that leads nowhere b"", which no parser accepts."""
    try:
        return storage.read(url)
    except (FileNotFoundError, IsADirectoryError):
        return b""


def _parse_list(name: str, text: bytes) -> ShardList:
    listed = ShardList.from_json(text)
    if listed.id != name:
        raise ValueError(f"its shards are those of the id {listed.id}")
    return listed


def _read_about(url: str) -> dict[str, Any]:
    """dataset.json with a valid layout. Raises like `Output.open`."""
    try:
        about = json.loads(storage.read(storage.join(storage.normalise(url), "dataset.json")))
        ShardLayout.from_dict(about["layout"])
    except IsADirectoryError as error:
        raise BrokenDataset(f"{url}/dataset.json is damaged (it is a folder); {REPAIR_AND_RERUN}") from error
    except FileNotFoundError as error:
        if "dataset.json" in map(_name, storage.list_entries(url)):
            what = "a link that leads nowhere"
            raise BrokenDataset(f"{url}/dataset.json is damaged ({what}); {REPAIR_AND_RERUN}") from error
        raise FileNotFoundError(f"{url} is not an output of `tokenmill tokenize`: dataset.json is missing") from error
    except UnsupportedSchema as error:
        raise UnsupportedSchema(f"{url}/dataset.json: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BrokenDataset(f"{url}/dataset.json is damaged ({what}); {REPAIR_AND_RERUN}") from error
    return about


def _read_note(url: str) -> bytes | None:
    """None for a note that was removed since it was listed. A folder reads as b"", which is no note."""
    try:
        return storage.read_if_exists(url)
    except IsADirectoryError:
        return b""


def _parse_note(text: bytes) -> dict[str, Any]:
    note = json.loads(text)
    if not isinstance(note, dict) or not all(isinstance(note.get(name), str) for name in NOTE_FIELDS):
        raise ValueError(f"it must hold {', '.join(NOTE_FIELDS)}")
    return note


def sorted_versions(lists: dict[str, list[Shard]]) -> list[Shard]:
    """Every shard of the lists, once per version, sorted by URL."""
    shards = {shard for listed in lists.values() for shard in listed}
    return sorted(shards, key=lambda shard: (shard.url, str(shard.num_bytes), str(shard.version)))


def name_and_size(shard: Shard) -> tuple[str, int | None]:
    """What the same shard keeps under another path."""
    return _name(shard.url), shard.num_bytes


def _is_ours(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _stem(url: str) -> str:
    return _name(url).rsplit(".", 1)[0]


def _same_time(entry: Commit, shard: Shard) -> str:
    """How to say that a local file of the same size is the old one: its version is the time of its last change."""
    version = entry.source_version or ""
    if "://" in shard.url or entry.source_num_bytes != shard.num_bytes or not version.isdigit():
        return ""
    seconds, nanoseconds = divmod(int(version), 10**9)
    return (
        f". If its content is still the same and only its time has changed, run "
        f"`touch -d @{seconds}.{nanoseconds:09d} '{shard.url}'` and rerun the same command"
    )
