"""OUT/index.json: the counts of all manifest entries in one file, so that readers open large outputs in little time.

It is a view of the manifest that `tokenize` and `retry` rebuild at their end. A count is used only while its entry
still has the size and the version that the index was made from; other entries are read. So a missing, damaged or old
index costs time, but never changes what is read.
"""

import hashlib
import json
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.tokens.commit import RETRY_NAME
from pipeline.tokens.output import Output


class Counted(NamedTuple):
    """A manifest entry in short. num_bytes, version: those of the file of the entry."""

    name: str
    num_rows: int
    num_tokens: int
    num_bytes: int | None
    version: str | None


def counted(output: Output) -> list[Counted]:
    """All committed entries, in the order of Output.commits. Raises BrokenOutput if one is damaged."""
    known = {entry.name: entry for entry in _read(output)}
    files = output.entry_files()
    old = [known[name] for name, file in files.items() if name in known and _is_of(known[name], file)]
    fresh = sorted(files.keys() - {entry.name for entry in old})
    new = [
        Counted(entry.name, entry.num_rows, entry.num_tokens, files[entry.name].num_bytes, files[entry.name].version)
        for entry in output.read_entries(fresh)
    ]
    return sorted([*old, *new], key=_order)


def _is_of(entry: Counted, file: storage.StoredObject) -> bool:
    return None not in (file.num_bytes, file.version) and (entry.num_bytes, entry.version) == (
        file.num_bytes,
        file.version,
    )


def write_index(output: Output) -> None:
    """Rebuilds the index. It reads only the entries that the old index does not have."""
    content = _dumped([list(entry) for entry in counted(output)])
    text = f'{{"sha256": "{_sha256(content)}",\n"entries": {content}}}\n'.encode()
    try:
        storage.replace(output.index_url(), text)
    except IsADirectoryError:  # damage, like a link in its place; raises OSError if the folder holds files
        storage.remove(output.index_url())
        storage.replace(output.index_url(), text)


def _read(output: Output) -> list[Counted]:
    """The entries in the index; none if it is missing or damaged."""
    try:
        index = json.loads(storage.read_if_exists(output.index_url()) or b"{}")
        if _sha256(_dumped(index["entries"])) != index["sha256"]:
            return []
        return [Counted(*entry) for entry in index["entries"]]
    except StorageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _order(entry: Counted) -> tuple[str, int]:
    match = RETRY_NAME.match(entry.name)
    return (match[1], int(match[2])) if match else (entry.name, 0)


def _dumped(entries: list[list[Any]]) -> str:
    return json.dumps(entries, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
