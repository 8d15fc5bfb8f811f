"""A bounded local folder with copies of remote objects, which any number of processes may share."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.storage.objects import TEMPORARY, read

DIGEST_BYTES = hashlib.sha256().digest_size
COPY = re.compile(r"[0-9a-f]{32}\.copy")  # the names of copies; all other files in the folder are left alone
UNFINISHED = f"{TEMPORARY}cache-"
STALE_S = 3600  # age of an unfinished file whose writer must have died


class FileCache:
    """Keeps the objects that were read last, up to max_bytes together; while several processes write at the same time,
    up to one object of each more.

    A file starts with the SHA-256 of the object, so that a copy that a crash has damaged is downloaded again. Files
    of others in the folder are not counted and never removed.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes

    def read(self, url: str, version: str) -> bytes:
        """The object, from the folder if it is there. version: changes with the content of the object.

        Raises StorageError if the folder cannot be written, and like `storage.read`.
        """
        path = self.folder / f"{hashlib.sha256(f'{url} {version}'.encode()).hexdigest()[:32]}.copy"
        with self._explained():
            found = _read_copy(path)
        if found is None:
            found = read(url)
            self._keep(path, found)
        return found

    def _keep(self, path: Path, data: bytes) -> None:
        num_bytes = DIGEST_BYTES + len(data)
        if num_bytes > self.max_bytes:
            return
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(num_bytes)
            if _written(self.folder / f"{UNFINISHED}{secrets.token_hex(8)}", path, data):
                self._make_room(0)  # other processes may have made room for their own files only

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the local cache cannot be used ({error}); free some space, or choose another folder "
                "or a lower bound"
            ) from error

    def _make_room(self, num_bytes: int) -> None:
        """Removes the copies that were read longest ago. Another process may remove them at the same time."""
        copies = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if COPY.fullmatch(entry.name):
                    copies.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
                elif entry.name.startswith(UNFINISHED) and time.time() - entry.stat().st_mtime > STALE_S:
                    Path(entry.path).unlink()
        used = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if used + num_bytes <= self.max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            used -= size


def _written(unfinished: Path, path: Path, data: bytes) -> bool:
    """Writes a copy, readable for other users as the umask allows. False, with a warning, if the disk is full."""
    try:
        with open(unfinished, "xb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        warnings.warn(f"{path.parent}: the disk is full, so the local cache keeps no more files", stacklevel=2)
        return False
    return True


def _read_copy(path: Path) -> bytes | None:
    """None if there is no copy, or a damaged one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # also if another process has removed it
        return None
    with contextlib.suppress(FileNotFoundError, PermissionError):  # only its owner may
        os.utime(path)  # marks it as read last
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == digest else None
