"""Writing objects, whole: once and never again what proves something; anew what is a view of it."""

import contextlib
import errno
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from pipeline.errors import UnsafeStorage
from pipeline.storage import s3
from pipeline.storage.client import CHECKED, CREATE_ONLY, SERVER, ask, is_local, join, locate_once
from pipeline.storage.objects import TEMPORARY, exists, read
from pipeline.storage.retries import http_status

WRITE_S, WRITE_BYTES_PER_S = 60, 250_000  # a slower write counts as stalled: nothing else notices a peer that is gone


def write_once(url: str, data: bytes) -> None:
    """Creates the object, whole and atomically. Raises FileExistsError if it is there: then it is left as it is.

    Not on local disks: an object of the very same bytes counts as this call's own, for it cannot be told from one
    whose answer got lost on the way (the HTTP client itself sends a request again, without a word).
    Where the server does not honour create-only writes (`check_create_only`), `configure(..., create_only="checked")`
    looks, writes and reads back. That is safe with one driver at a time; with two, each may believe that it was
    first, and the later one's bytes stand.
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
            # servers name a failed condition in their own words, and s3fs knows only some of them
            if not isinstance(error, FileExistsError) and http_status(error) != 412:
                raise
    with contextlib.suppress(FileNotFoundError):  # removed since: it was there all the same
        if read(url) == data:
            return
    raise FileExistsError(f"{url} is already there")


def check_create_only(folder: str) -> None:
    """Writes a small object into the folder twice, to see whether the second write is refused; then removes it.

    Raises UnsafeStorage if it is not, PermissionError if these keys may not write there.
    """
    url = join(folder, f"{TEMPORARY}probe-{uuid.uuid4().hex}")
    advice = (
        "two drivers on one output could undo each other's work. Have the server updated or take another; "
        f"or set create_only to {CHECKED!r} if never more than one driver at a time writes there"
    )
    try:
        write_once(url, b"first")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise UnsafeStorage(f"{folder}: the server has no create-only writes ({error}), so {advice}") from error
    try:
        with contextlib.suppress(FileExistsError):
            write_once(url, b"second")
        if read(url) != b"first":
            raise UnsafeStorage(f"{folder}: the server overwrites what it is told only to create, so {advice}")
    finally:
        remove(url)


def replace(url: str, data: bytes) -> None:
    """Writes the object whole, over what was there. For reports and notes, never for what proves something."""
    fs, path = locate_once(url)
    if is_local(fs):
        with _temporary_beside(Path(path), data) as temporary:
            os.replace(temporary, path)
        return
    _put(url, data)


def remove(url: str) -> None:
    fs, path = locate_once(url)
    with contextlib.suppress(FileNotFoundError):
        ask("remove", url, lambda: fs.rm_file(path))


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


def _put(url: str, data: bytes, **options: Any) -> None:
    fs, path = locate_once(url)
    if s3.is_s3(url):
        options["chunksize"] = s3.PART_BYTES
    if fs.async_impl:
        options["timeout"] = WRITE_S + len(data) / WRITE_BYTES_PER_S
    ask("write", url, lambda: fs.pipe_file(path, data, **options))


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
