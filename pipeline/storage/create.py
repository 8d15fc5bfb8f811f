"""Writes whole objects: create-only with `write_once`, or over an existing object with `replace`."""

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UnsafeStorage
from pipeline.storage import s3
from pipeline.storage.client import CHECKED, CREATE_ONLY, SERVER, is_local, join, locate_once, request
from pipeline.storage.objects import TEMPORARY, exists, read
from pipeline.storage.retries import http_status

STREAM_BYTES = 2**26  # bytes per part of an object that is written in parts
WRITE_S, WRITE_BYTES_PER_S = 60, 250_000  # slower writes time out; nothing else detects a server that is gone


def write_once(url: str, data: bytes) -> None:
    """Creates the object atomically. Raises FileExistsError, and leaves the object unchanged, if it already exists.

    Except on local disks, an existing object with exactly these bytes counts as success. It may be our own write with
    a lost response: the HTTP client itself silently sends some requests again.
    For servers without create-only writes (see `check_create_only`), `configure(..., create_only="checked")` checks
    for the object, writes it and reads it back. This is safe with one driver at a time. With two, both may believe
    that they were first, and the bytes of the later one stay.
    """
    fs, path = locate_once(url)
    if is_local(fs):
        return _create_local(Path(path), data)
    if os.environ.get(CREATE_ONLY, SERVER) == CHECKED:
        if not exists(url):
            replace(url, data)
    else:
        try:
            return _put(url, data, mode="create")
        except OSError as error:
            # servers report a failed condition in different ways, and s3fs recognises only some
            if not isinstance(error, FileExistsError) and http_status(error) != 412:
                raise
    with contextlib.suppress(FileNotFoundError):  # removed since then, but it did exist
        if read(url) == data:
            return
    raise FileExistsError(f"{url} already exists")


def check_create_only(folder: str) -> None:
    """Checks that the server refuses to create an object twice, with a small object that is removed afterwards.

    Raises UnsafeStorage if the server overwrites the object, and PermissionError if these keys may not write there.
    """
    url = join(folder, f"{TEMPORARY}probe-{uuid.uuid4().hex}")
    advice = (
        "two drivers on one output could destroy each other's work. Update the server or use another one. "
        f"Or set storage.create_only={CHECKED}, if only one driver at a time writes there"
    )
    try:
        write_once(url, b"first")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise UnsafeStorage(
            f"{folder}: the server does not support create-only writes ({error}), so {advice}"
        ) from error
    try:
        with contextlib.suppress(FileExistsError):
            write_once(url, b"second")
        if read(url) != b"first":
            raise UnsafeStorage(f"{folder}: the server overwrites objects on create-only writes, so {advice}")
    finally:
        remove(url)


def replace(url: str, data: bytes) -> None:
    """Writes the object, replacing an existing one. For reports, notes, and files that nothing committed."""
    fs, path = locate_once(url)
    if is_local(fs):
        with _temporary_beside(Path(path), data) as temporary:
            os.replace(temporary, path)
        return
    _put(url, data)


def write_chunks(url: str, chunks: Callable[[], Iterable[bytes]]) -> tuple[str, int]:
    """Like `replace`, for objects that are too large for memory. Returns the SHA-256 and the number of bytes.

    chunks: called again when the write is retried.
    """
    fs, path = locate_once(url)
    if not is_local(fs):
        return request("write", url, lambda: _stream(fs.open(path, "wb", block_size=STREAM_BYTES), chunks()))
    with _temporary_beside(Path(path), b"") as temporary:
        with temporary.open("wb") as file:
            written = _copy(file, chunks())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return written


def _stream(file: Any, chunks: Iterable[bytes]) -> tuple[str, int]:
    """Writes all chunks, or leaves no object: closing the file is what creates it."""
    try:
        written = _copy(file, chunks)
    except BaseException:
        file.discard()
        file.closed = True  # else its destructor would upload what is there
        raise
    file.close()
    return written


def _copy(file: Any, chunks: Iterable[bytes]) -> tuple[str, int]:
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        file.write(chunk)
        digest.update(chunk)
        num_bytes += len(chunk)
    return digest.hexdigest(), num_bytes


def remove(url: str) -> None:
    """Removes the object; does nothing if there is none. A local folder in its place is removed if it is empty.

    Raises OSError for a folder that holds files.
    """
    fs, path = locate_once(url)
    if is_local(fs) and os.path.isdir(path) and not os.path.islink(path):
        return os.rmdir(path)
    with contextlib.suppress(FileNotFoundError):
        request("remove", url, lambda: fs.rm_file(path))


def upload(folder: str | Path, url: str) -> None:
    """Writes each file of a local folder, in the order of their names. Raises FileExistsError if the last one exists.

    The last file is written create-only and commits the folder. Files without it were left by a run that died, and
    are replaced.
    """
    *others, last = sorted(Path(folder).iterdir())
    if exists(join(url, last.name)):
        raise FileExistsError(f"{url} already exists")
    for file in others:
        replace(join(url, file.name), file.read_bytes())
    write_once(join(url, last.name), last.read_bytes())


def _put(url: str, data: bytes, **options: Any) -> None:
    fs, path = locate_once(url)
    if s3.is_s3(url):
        options["chunksize"] = s3.PART_BYTES
    if fs.async_impl:
        options["timeout"] = WRITE_S + len(data) / WRITE_BYTES_PER_S
    request("write", url, lambda: fs.pipe_file(path, data, **options))


def _create_local(path: Path, data: bytes) -> None:
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    with _temporary_beside(path, data) as temporary:
        os.link(temporary, path)  # atomic; fails if another writer was first


@contextlib.contextmanager
def _temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file with the data in the same folder, flushed to disk. It is removed afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:  # unlike tempfile's, it gets the permissions that the umask allows
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
