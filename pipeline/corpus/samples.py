"""A WebDataset shard to samples, strictly: nothing that is in the tar gets lost without a word.

WebDataset's convention: the files of a sample lie next to each other and share their name up to the first dot.
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from pipeline import storage
from pipeline.errors import ShardError

NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$")
MAX_MEMBER_BYTES = 2**30
COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


@dataclass
class Sample:
    """One group of files. `problem` says why it cannot be used, if it cannot; then `members` may lack files."""

    index: int
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile ends in silence at a broken header; this one says so, and at a missing end-of-archive mark."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark that ends an archive: all is well
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            what = "it ends without an end-of-archive mark" if archive.offset else "it is empty"
            raise ShardError(f"{what}: probably cut short") from error
        except tarfile.HeaderError as error:
            raise ShardError(f"broken header at byte {archive.offset} ({error})") from error


def read_samples(url: str, version: str | None = None) -> Iterator[Sample]:
    """Samples in the order of the shard, numbered from 0; of that version of it, if one is given.

    Raises ShardError (at the first moment that it can be known) if the shard cannot be read to its very end.
    """
    try:
        with (
            storage.open_stream(url, version) as stream,
            _decompressed(stream) as plain,
            tarfile.open(fileobj=plain, mode="r|", tarinfo=_StrictTarInfo, errors="surrogateescape") as archive,
        ):
            yield from _group(archive)
            _check_rest(archive)
    except FileNotFoundError as error:
        raise ShardError(f"{url}: there is no such shard") from error
    except PermissionError as error:
        raise ShardError(
            f"{url}: no permission to read it; check the credentials or the file's mode ({error})"
        ) from error
    except ShardError as error:
        raise ShardError(f"{url}: {error}; write the shard again and rerun") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{url}: cannot be read to its end ({type(error).__name__}: {error})") from error


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    """The tar inside of a gzip, bzip2 or xz file, whose checksums these readers check and tarfile's do not."""
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]  # peeks, since not every HTTP stream can seek
    for magic, reader in COMPRESSIONS.items():
        if buffered.peek(6).startswith(magic):
            return reader(buffered)
    return buffered


def _check_rest(archive: tarfile.TarFile) -> None:
    """After the end mark nothing may follow but padding: tarfile would leave a second archive unread."""
    while rest := archive.fileobj.read(2**16):  # type: ignore[union-attr]
        if rest.strip(b"\0"):
            raise ShardError("more data follows the end-of-archive mark: are these two archives in one file?")


def _group(archive: tarfile.TarFile) -> Iterator[Sample]:
    seen: set[str] = set()
    current: Sample | None = None
    for member in archive:
        if member.isdir():
            continue
        key, extension, problem = _name(member.name)
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Sample(0 if current is None else current.index + 1, key)
            if key in seen:
                current.problem = f"key {key!r} came before in this shard; files of one sample must lie together"
            seen.add(key)
        problem = problem or _member_problem(member, extension, current)
        if problem is None:
            file = archive.extractfile(member)
            assert file is not None
            current.members[extension] = file.read()
        current.problem = current.problem or problem
    if current is not None:
        yield current


def _name(path: str) -> tuple[str, str, str | None]:
    """Key, extension and what is wrong with the name, which may hold bytes that are not UTF-8."""
    readable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    match = NAME.match(readable)
    if match is None:
        return readable, "", f"file name {readable!r} is not KEY.EXTENSION"
    if readable != path:
        return match[1], match[2].lower(), f"file name {readable!r} is not UTF-8"
    return match[1], match[2].lower(), None


def _member_problem(member: tarfile.TarInfo, extension: str, sample: Sample) -> str | None:
    if not member.isfile():
        return f"{extension!r} is a link or a device, not a file"
    if member.size > MAX_MEMBER_BYTES:
        return f"{extension!r} has {member.size} bytes, more than {MAX_MEMBER_BYTES}"
    if extension in sample.members:
        return f"{extension!r} is there twice"
    return None
