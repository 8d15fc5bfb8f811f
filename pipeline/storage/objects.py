"""Finds, lists and reads objects in storage."""

import contextlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem

from pipeline.storage import s3
from pipeline.storage.client import is_local, locate, locate_once, request
from pipeline.storage.readahead import ReadAhead

TEMPORARY = ".tmp-"  # unfinished local files and probes; a killed writer leaves them behind


@dataclass(frozen=True)
class StoredObject:
    """An existing object. `version` changes with its content: ETag, Google's generation, or the mtime in
    ns of a local file."""

    url: str
    num_bytes: int | None  # None if the server does not report it
    version: str | None


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """The whole object, or its bytes [start, end).

    Raises FileNotFoundError, PermissionError, or StorageError if retries did not help.
    """
    fs, path = locate_once(url)
    if (start, end) != (0, None):
        return request("read", url, lambda: fs.cat_file(path, start=start, end=end))
    one_request = {"max_concurrency": 1} if s3.is_s3(url) else {}  # otherwise s3fs requests the size first
    return request("read", url, lambda: fs.cat_file(path, **one_request))


def read_if_exists(url: str) -> bytes | None:
    """The whole object, or None if it does not exist. Raises other errors like `read`."""
    try:
        return read(url)
    except FileNotFoundError:
        return None


def open_stream(url: str, version: str | None = None) -> IO[bytes]:
    """Opens the object for reading from front to back. From S3 with read-ahead, in constant memory.

    All bytes come from one version of the object: the given one, or else the current one. Raises ReplacedObject, here
    or in a later read, if the object has another version. Only S3 and local disks are checked.
    """
    fs, path = locate_once(url)
    if not s3.is_s3(url):
        stream = request("read", url, lambda: fs.open(path, "rb"))
        if version is not None and is_local(fs):
            s3.refuse_other(url, str(os.fstat(stream.fileno()).st_mtime_ns), version)
        return stream
    info = request("read", url, lambda: fs.info(path))
    if info["type"] != "file":
        raise FileNotFoundError(f"{url} is a folder, not a file")
    current = s3.version_of(info)
    if version is not None:
        s3.refuse_other(url, current, version)

    def fetch(start: int, end: int, cancelled: threading.Event) -> bytes:
        return request("read", url, lambda: s3.get_range(fs, url, start, end, current), cancelled)

    return io.BufferedReader(ReadAhead(fetch, info["size"]), buffer_size=2**18)


def find(url: str) -> StoredObject | None:
    """None if there is no such object, or if we have no permission to see it."""
    fs, path = locate_once(url)
    try:
        return _found(fs, request("look up", url, lambda: fs.info(path)), url)
    except (FileNotFoundError, PermissionError):
        return None


def is_folder(url: str) -> bool:
    """False if there is nothing, or if we may not look."""
    return _kind(url) == "directory"


def is_file(url: str) -> bool:
    """True also for a file that we may not read, as far as the storage says so."""
    return _kind(url) in ("file", "forbidden")


def _kind(url: str) -> str:
    fs, path = locate_once(url)
    try:
        return request("look up", url, lambda: fs.info(path))["type"]
    except FileNotFoundError:
        return "missing"
    except PermissionError:
        return "forbidden"


def exists(url: str) -> bool:
    return find(url) is not None


def glob(pattern: str) -> list[StoredObject]:
    """Objects that match, sorted by URL. Uses only listings, no request per object."""
    fs, path = locate(pattern)  # the client retries each page, so that one error does not restart a long listing
    found = request("list", pattern, lambda: fs.glob(path, detail=True))
    return sorted(_files(fs, found.values(), pattern), key=lambda file: file.url)


def scan(folder: str) -> list[StoredObject]:
    """The files directly in the folder, sorted by URL; [] if there is no such folder."""
    fs, infos = _listing(folder)
    names = [(file.url.rsplit("/", 1)[1], file) for file in _files(fs, infos, folder)]
    return [file for name, file in names if name and not name.startswith(TEMPORARY)]


def temporary_files(folder: str) -> list[str]:
    """URLs of unfinished files directly in the folder: those of writers that still run or were killed."""
    fs, infos = _listing(folder)
    files = [file.url for file in _files(fs, infos, folder)]
    return [url for url in files if url.rsplit("/", 1)[1].startswith(TEMPORARY)]


def age_s(url: str) -> float:
    """Seconds since the object was last written. Raises FileNotFoundError."""
    fs, path = locate_once(url)
    return time.time() - request("look up", url, lambda: fs.modified(path)).timestamp()


def same_file(url: str, other: str) -> bool:
    """Whether two local paths lead to one file, for example through a link or a mount. False for other storage."""
    if not all(is_local(locate_once(one)[0]) for one in (url, other)):
        return False
    try:
        return os.path.samefile(url, other)
    except FileNotFoundError:
        return False


def list_files(folder: str) -> list[str]:
    """URLs of the files directly in the folder, sorted; [] if there is no such folder."""
    return [file.url for file in scan(folder)]


def list_entries(folder: str) -> list[str]:
    """URLs of the files and folders directly in the folder, sorted; [] if there is no such folder."""
    fs, infos = _listing(folder)
    urls = [_as_url(fs, info["name"].rstrip("/"), folder) for info in infos]
    names = [(url.rsplit("/", 1)[1], url) for url in urls if url != folder.rstrip("/")]
    return [url for name, url in names if not name.startswith(TEMPORARY)]


def scan_entries(folder: str) -> list[StoredObject]:
    """Like `list_entries`, with sizes and versions; those of a folder are None."""
    fs, infos = _listing(folder)
    found = [_entry(fs, info, folder) for info in infos]
    names = [(entry.url.rsplit("/", 1)[1], entry) for entry in found if entry.url != folder.rstrip("/")]
    return [entry for name, entry in names if not name.startswith(TEMPORARY)]


def list_folders(folder: str) -> list[str]:
    """URLs of the folders directly in the folder, sorted."""
    fs, infos = _listing(folder)
    return [_as_url(fs, info["name"].rstrip("/"), folder) for info in infos if info["type"] == "directory"]


@contextlib.contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """A local folder with the files of the folder, for the duration of the context."""
    fs, path = locate_once(url)
    if is_local(fs):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{url} is not a folder")
        yield Path(path)
        return
    files = list_files(url)
    if not files:
        raise FileNotFoundError(f"{url} contains no files")
    with tempfile.TemporaryDirectory() as local:
        for file in files:
            (Path(local) / file.rsplit("/", 1)[1]).write_bytes(read(file))
        yield Path(local)


def _listing(folder: str) -> tuple[AbstractFileSystem, list[dict[str, Any]]]:
    """The file system, and its entries directly in the folder, sorted; none if there is no such folder."""
    fs, path = locate(folder)
    try:
        return fs, sorted(request("list", folder, lambda: fs.ls(path, detail=True)), key=lambda info: info["name"])
    except FileNotFoundError:
        return fs, []


def _files(fs: AbstractFileSystem, infos: Iterable[dict[str, Any]], like: str) -> Iterator[StoredObject]:
    return (_entry(fs, info, like) for info in infos if _is_file(info))


def _is_file(info: dict[str, Any]) -> bool:
    return info["type"] == "file" or bool(info.get("islink"))


def _entry(fs: AbstractFileSystem, info: dict[str, Any], like: str) -> StoredObject:
    if _is_file(info):
        with contextlib.suppress(FileNotFoundError):  # a broken link, or removed since: reading it will raise the error
            return _found(fs, info, like)
    return StoredObject(_as_url(fs, info["name"].rstrip("/"), like), None, None)


def _found(fs: AbstractFileSystem, info: dict[str, Any], like: str) -> StoredObject:
    size = info["size"]
    return StoredObject(_as_url(fs, info["name"], like), None if size is None else int(size), _version(fs, info))


def _version(fs: AbstractFileSystem, info: dict[str, Any]) -> str | None:
    if is_local(fs):
        return str(os.stat(info["name"]).st_mtime_ns)  # fsspec returns a float, which rounds
    # Google's generation before its etag, which also changes with the metadata; Azure has only the etag
    return s3.version_of(info) or info.get("generation") or (info.get("etag") or "").strip('"') or None


def _as_url(fs: AbstractFileSystem, path: str, like: str) -> str:
    if is_local(fs) or "://" in path:  # http file systems keep whole URLs
        return path
    return f"{like.split('://')[0]}://{path.lstrip('/')}"
