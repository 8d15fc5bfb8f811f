"""What each column of a table holds: the key, a medium, or another member of the samples."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import ConfigError
from jobs.packing.media import Media
from jobs.packing.names import is_reserved, member_name, printable
from jobs.packing.rows import Row
from jobs.packing.sample import Content
from jobs.packing.tally import Tally
from pipeline import storage

KEYS = ("__key__", "key")  # the first of them that is there names the samples


@dataclass(frozen=True)
class MediumColumn:
    """member: of a column that is named like its format. Else the extension of each value ends the member's name,
    after the prefix. extension: for values whose format cannot be recognised."""

    member: str
    prefix: str
    extension: str

    def name(self, extension: str) -> str:
        return self.member or f"{self.prefix}{extension or self.extension}"


@dataclass(frozen=True)
class Columns:
    """media_columns and others: by column. folder: paths in cells start there."""

    key: str | None
    media_columns: dict[str, MediumColumn]
    others: dict[str, str]
    media: Media
    folder: str

    def members(self, row: Row) -> dict[str, Content]:
        """The members of a sample; none if it has no medium. Raises ValueError for a cell that cannot become one."""
        found: dict[str, Content] = {}
        for column, medium in self.media_columns.items():
            content = medium_in(row[column], self.media, self.folder)
            if content is not None:
                _add(found, medium.name(content[0]), content[1], column)
        for column, member in self.others.items() if found else ():
            if row[column] is not None:
                _add(found, member, _member(row[column], column), column)
        return found


def columns_of(names: list[str], head: list[Row], media: Media, url: str, tally: Tally) -> Columns:
    """head: the first rows; their cells tell which columns hold media. Raises ConfigError if none does."""
    key = next((name for name in KEYS if name in names), None)
    folder = url.rpartition("/")[0]
    extensions = {name: _extension_in(name, head, media, folder) for name in names if name != key}
    found = [name for name, extension in extensions.items() if extension]
    if not found:
        raise ConfigError(_no_medium(url, names, head, media))
    unnamed = [name for name in found if name.lower() not in media.extensions]
    media_columns = {name: _medium_column(name, extensions[name], name in unnamed, len(found) > 1) for name in found}
    return Columns(key, media_columns, _others(names, {*found, key}, head, tally, url), media, folder)


def medium_in(cell: Any, media: Media, folder: str) -> tuple[str, Content] | None:
    """The extension, or an empty string if it is not known, and the content of a medium. None for an empty cell.

    cell: bytes, base64, a path, or {bytes, path} as Hugging Face datasets has them. Raises ValueError for others.
    """
    if cell is None or cell == "" or cell == b"":
        return None
    if isinstance(cell, bytes):
        return media.recognise(cell), cell
    if isinstance(cell, dict) and cell.get("bytes") and isinstance(cell["bytes"], bytes):
        return media.recognise(cell["bytes"]) or media.extension(cell.get("path") or ""), cell["bytes"]
    if isinstance(cell, dict) and set(cell) == {"bytes", "path"}:
        return medium_in(cell["path"], media, folder)
    if not isinstance(cell, str):
        raise ValueError(f"{media.kind} data must be bytes, base64, a path or {{bytes, path}}, not {str(cell)[:60]!r}")
    if extension := media.extension(cell):
        return extension, _file(cell, folder)
    try:
        data = base64.b64decode(cell.partition(";base64,")[2] or cell, validate=True)
    except ValueError as error:
        raise ValueError(f"{cell[:60]!r} is neither base64 nor the path of {media.kind} data ({error})") from error
    return media.recognise(data), data


def exists(content: Content) -> bool:
    if isinstance(content, bytes):
        return True
    return content.is_file() if isinstance(content, Path) else storage.exists(content)


def _file(path: str, folder: str) -> Content:
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{path} is a web address; download the files first and give their paths")
    url = path if "://" in path or path.startswith("/") else f"{folder}/{path}"
    return url if "://" in url else Path(url)


def _extension_in(name: str, head: list[Row], media: Media, folder: str) -> str:
    """The extension of the first medium in a column; empty if the column holds none."""
    if name.lower() in media.extensions:
        return name.lower()
    for row in head:
        try:
            found = medium_in(row[name], media, folder)
        except ValueError:  # a number or text
            return ""
        if found is not None and found[0] and exists(found[1]):
            return found[0]
    return ""


def _medium_column(name: str, extension: str, is_unnamed: bool, has_others: bool) -> MediumColumn:
    if not is_unnamed:
        return MediumColumn(name.lower(), "", extension)
    return MediumColumn("", f"{member_name(name)}." if has_others else "", extension)


def _others(names: list[str], taken: set[str | None], head: list[Row], tally: Tally, url: str) -> dict[str, str]:
    """Column to member. Lists and structs are stored as JSON."""
    others: dict[str, str] = {}
    for name in (name for name in names if name not in taken):
        if not name or is_reserved(name):
            tally.skip("columns without a name, or with one that webdataset reserves", repr(name))
            continue
        member = member_name(name)
        if any(isinstance(row[name], dict | list) for row in head) and not f".{member}".endswith(".json"):
            member += ".json"
        if member in others.values():
            raise ConfigError(f"{url}: two columns would become the member {member!r}; rename one of them")
        others[name] = member
    return others


def _member(cell: Any, column: str) -> bytes:
    if isinstance(cell, dict | list):
        return json.dumps(cell, ensure_ascii=False, default=lambda value: _plain(value, column)).encode()
    return cell if isinstance(cell, bytes) else str(cell).encode()


def _plain(value: Any, column: str) -> str:
    if isinstance(value, bytes):
        raise ValueError(f"column {column!r} has bytes inside a list or struct; flatten or drop the column")
    return str(value)


def _add(members: dict[str, Content], name: str, content: Content, column: str) -> None:
    if name in members:
        raise ValueError(f"column {column!r} and another one would become the member {name!r}; rename one of them")
    members[name] = content


def _no_medium(url: str, names: list[str], head: list[Row], media: Media) -> str:
    columns = ", ".join(printable(repr(name)) for name in names) or "none"
    paths = [cell for row in head for cell in row.values() if isinstance(cell, str) and media.extension(cell)]
    hint = f" No file {printable(paths[0])!r} was found; paths start at the table's folder." if paths else ""
    return (
        f"{url}: no column holds {media.kind} data; its columns: {columns}.{hint} Name the column by its format, such "
        f"as {media.extensions[0]}, or set model.modality"
    )
