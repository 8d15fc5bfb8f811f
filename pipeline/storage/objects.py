"""Objects in storage: finding, listing and reading them."""

import contextlib
import io
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem

from pipeline.storage import s3
from pipeline.storage.client import ask, is_local, locate, locate_once
from pipeline.storage.readahead import ReadAhead

TEMPORARY = ".tmp-"  # local files in the making, and probes; a killed writer leaves its own behind


@dataclass(frozen=True)
class Found:
    """An object that is there. `version` changes with its content: the ETag, or a local file's mtime in ns."""

    url: str
    num_bytes: int | None  # None where a server does not tell
    version: str | None


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """The whole object, or its bytes [start, end).

    Raises FileNotFoundError, PermissionError, or StorageError once patience has run out.
    """
    fs, path = locate_once(url)
    if (start, end) != (0, None):
        return ask("read", url, lambda: fs.cat_file(path, start=start, end=end))
    one_request = {"max_concurrency": 1} if s3.is_s3(url) else {}  # else s3fs asks for the size first
    return ask("read", url, lambda: fs.cat_file(path, **one_request))


def open_stream(url: str, version: str | None = None) -> IO[bytes]:
    """For reading from front to back; from S3 with read-ahead, in memory that does not grow with the object.

    All of it is one version of the object: the given one, or else that of this moment. Raises ReplacedObject, here or
    in a later read, where there is another one. Elsewhere than on S3 and local disks nobody checks.
    """
    fs, path = locate_once(url)
    if not s3.is_s3(url):
        stream = ask("read", url, lambda: fs.open(path, "rb"))
        if version is not None and is_local(fs):
            s3.refuse_other(url, str(os.fstat(stream.fileno()).st_mtime_ns), version)
        return stream
    info = ask("read", url, lambda: fs.info(path))
    if info["type"] != "file":
        raise FileNotFoundError(f"{url} is a folder")
    there = s3.version_of(info)
    if version is not None:
        s3.refuse_other(url, there, version)

    def fetch(start: int, end: int, given_up: threading.Event) -> bytes:
        return ask("read", url, lambda: s3.get_range(fs, url, start, end, there), given_up)

    return io.BufferedReader(ReadAhead(fetch, info["size"]), buffer_size=2**18)


def find(url: str) -> Found | None:
    """None if there is no such object, or none that we may see."""
    fs, path = locate_once(url)
    try:
        return _found(fs, ask("look at", url, lambda: fs.info(path)), url)
    except (FileNotFoundError, PermissionError):
        return None


def exists(url: str) -> bool:
    return find(url) is not None


def glob(pattern: str) -> list[Found]:
    """Objects that match, sorted by URL; from listings alone, however many they are."""
    fs, path = locate(pattern)  # with tries of its own: lest one page's error begin a long listing anew
    found = ask("list", pattern, lambda: fs.glob(path, detail=True))
    return sorted(_files(fs, found.values(), pattern), key=lambda file: file.url)


def scan(folder: str) -> list[Found]:
    """The files right in the folder, sorted by URL; [] if there is no such folder."""
    fs, infos = _listing(folder)
    names = [(file.url.rsplit("/", 1)[1], file) for file in _files(fs, infos, folder)]
    return [file for name, file in names if name and not name.startswith(TEMPORARY)]


def list_files(folder: str) -> list[str]:
    """URLs of the files right in the folder, sorted; [] if there is no such folder."""
    return [file.url for file in scan(folder)]


def list_folders(folder: str) -> list[str]:
    """URLs of the folders right in the folder, sorted."""
    fs, infos = _listing(folder)
    return [_as_url(fs, info["name"].rstrip("/"), folder) for info in infos if info["type"] == "directory"]


@contextlib.contextmanager
def downloaded(url: str):
    """The files of a folder as a local folder, which lives as long as the context."""
    fs, path = locate_once(url)
    if is_local(fs):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{url} is no folder")
        yield Path(path)
        return
    files = list_files(url)
    if not files:
        raise FileNotFoundError(f"{url} holds no files")
    with tempfile.TemporaryDirectory() as local:
        for file in files:
            (Path(local) / file.rsplit("/", 1)[1]).write_bytes(read(file))
        yield Path(local)


def _listing(folder: str) -> tuple[AbstractFileSystem, list[dict[str, Any]]]:
    """What is right in the folder, sorted; nothing if there is no such folder."""
    fs, path = locate(folder)
    try:
        return fs, sorted(ask("list", folder, lambda: fs.ls(path, detail=True)), key=lambda info: info["name"])
    except FileNotFoundError:
        return fs, []


def _files(fs: AbstractFileSystem, infos: Iterable[dict[str, Any]], like: str) -> Iterator[Found]:
    for info in infos:
        if info["type"] == "file" or info.get("islink"):
            try:
                yield _found(fs, info, like)
            except FileNotFoundError:  # a link to nothing, or removed since: who reads it is told so
                yield Found(_as_url(fs, info["name"], like), None, None)


def _found(fs: AbstractFileSystem, info: dict[str, Any], like: str) -> Found:
    size = info["size"]
    return Found(_as_url(fs, info["name"], like), None if size is None else int(size), _version(fs, info))


def _version(fs: AbstractFileSystem, info: dict[str, Any]) -> str | None:
    if is_local(fs):
        return str(os.stat(info["name"]).st_mtime_ns)  # fsspec's own is a float, which rounds
    return s3.version_of(info)


def _as_url(fs: AbstractFileSystem, path: str, like: str) -> str:
    return path if is_local(fs) else f"{like.split('://')[0]}://{path.lstrip('/')}"
