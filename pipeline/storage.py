"""The only file that opens URLs: local paths, s3://, and anything else that fsspec knows.

Objects are written whole. What proves something (token shards, manifests, tokenizers) is written once and never
again; only views that are made anew from it (reports) may be replaced.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

R = TypeVar("R")
TRIES = 4
FIRST_PAUSE_S = 0.2  # doubled after each try
TEMPORARY = ".tmp-"  # local files in the making; a killed writer leaves its own behind
FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def normalise(url: str) -> str:
    """One spelling per place: local paths absolute, without file://; no slash at the end."""
    url = str(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path on it."""
    # a cached listing would hide what other workers have written since
    return fsspec.core.url_to_fs(normalise(url), use_listings_cache=False)


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def read(url: str) -> bytes:
    """The whole object. Raises FileNotFoundError, PermissionError, or OSError once retries are used up."""
    fs, path = locate(url)
    return _retry(lambda: fs.cat_file(path))


def open_stream(url: str) -> IO[bytes]:
    """For reading from front to back, with read-ahead on object stores."""
    fs, path = locate(url)
    return _retry(lambda: fs.open(path, "rb"))


def num_bytes(url: str) -> int | None:
    """Size of the object; None if there is none, or none that we may see."""
    fs, path = locate(url)
    try:
        size = _retry(lambda: fs.info(path))["size"]  # None where a server does not tell
        return None if size is None else int(size)
    except (FileNotFoundError, PermissionError):
        return None


def exists(url: str) -> bool:
    return num_bytes(url) is not None


def glob(pattern: str) -> list[str]:
    """URLs that match, sorted."""
    fs, path = locate(pattern)
    return sorted(_as_url(fs, found, pattern) for found in _retry(lambda: fs.glob(path)))


def list_files(folder: str) -> list[str]:
    """URLs of the files right in the folder, sorted; [] if there is no such folder."""
    fs, path = locate(folder)
    try:
        found = _retry(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return []
    urls = sorted(_as_url(fs, entry["name"], folder) for entry in found if entry["type"] == "file")
    return [url for url in urls if not url.rsplit("/", 1)[1].startswith(TEMPORARY)]


def list_folders(folder: str) -> list[str]:
    """URLs of the folders right in the folder, sorted."""
    fs, path = locate(folder)
    try:
        found = _retry(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return []
    return sorted(_as_url(fs, entry["name"].rstrip("/"), folder) for entry in found if entry["type"] == "directory")


def write_once(url: str, data: bytes) -> None:
    """Creates the object, whole and atomically. Raises FileExistsError if it is there: then it is left as it is."""
    fs, path = locate(url)
    if is_local(fs):
        return _create_local(Path(path), data)
    try:
        fs.pipe_file(path, data, mode="create")  # If-None-Match: * through s3fs
    except OSError as error:
        # servers name a failed condition in their own words, and s3fs knows only some of them
        if isinstance(error, FileExistsError) or exists(url):
            raise FileExistsError(f"{url} is already there") from error
        raise


def replace(url: str, data: bytes) -> None:
    """Writes the object whole, over what was there. For reports and notes, never for what proves something."""
    fs, path = locate(url)
    if is_local(fs):
        with _temporary_beside(Path(path), data) as temporary:
            os.replace(temporary, path)
        return
    _retry(lambda: fs.pipe_file(path, data))


def remove(url: str) -> None:
    fs, path = locate(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def upload(folder: str | Path, url: str) -> None:
    """Writes each file of a local folder, in the order of their names. The last one, written once, is the commit:
    what lies there without it was left by a run that died, and is written anew.
    """
    *others, last = sorted(Path(folder).iterdir())
    if exists(join(url, last.name)):
        raise FileExistsError(f"{url} is already there")
    for file in others:
        replace(join(url, file.name), file.read_bytes())
    write_once(join(url, last.name), last.read_bytes())


@contextlib.contextmanager
def downloaded(url: str):
    """The files of a folder as a local folder, which lives as long as the context."""
    fs, path = locate(url)
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


def _as_url(fs: AbstractFileSystem, path: str, like: str) -> str:
    return path if is_local(fs) else f"{like.split('://')[0]}://{path.lstrip('/')}"


def _create_local(path: Path, data: bytes) -> None:
    if path.exists():
        raise FileExistsError(f"{path} is already there")
    with _temporary_beside(path, data) as temporary:
        os.link(temporary, path)  # atomic, and fails if another writer was first


@contextlib.contextmanager
def _temporary_beside(path: Path, data: bytes):
    """The data in a file of the same folder, durable, gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _retry(call: Callable[[], R]) -> R:
    """Again, with growing pauses, on errors that may pass; at once out on those that will not."""
    for attempt in range(TRIES):
        try:
            return call()
        except FINAL:
            raise
        except OSError:
            if attempt == TRIES - 1:
                raise
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")
