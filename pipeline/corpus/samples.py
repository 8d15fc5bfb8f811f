"""Reads the samples of a WebDataset shard strictly: no content of the tar is silently skipped.

WebDataset's convention: the files of a sample are adjacent in the tar and share their name up to the first dot.
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
    """One group of files: extension -> bytes.

    quarantine_reason: why the sample cannot be used, or None if it can. With a reason, `members` may be incomplete.
    """

    index: int
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    quarantine_reason: str | None = None


class _StrictTarInfo(tarfile.TarInfo):
    """Raises ShardError at a broken header or a missing end-of-archive mark, where tarfile stops silently."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the normal end of an archive
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            what = "it has no end-of-archive mark" if archive.offset else "it is empty"
            raise ShardError(f"{what}; it is probably truncated") from error
        except tarfile.HeaderError as error:
            raise ShardError(f"broken header at byte {archive.offset} ({error})") from error


def read_samples(url: str, version: str | None = None) -> Iterator[Sample]:
    """Yields the samples in the order of the shard, numbered from 0. version: the required version of the shard.

    Raises ShardError, as soon as it is known, if the shard cannot be read to its end.
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
            f"{url}: no permission to read it; check the credentials or the file mode ({error})"
        ) from error
    except ShardError as error:
        raise ShardError(f"{url}: {error}; write the shard again and rerun the command") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{url}: cannot be read to its end ({type(error).__name__}: {error})") from error


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    """The tar inside a gzip, bzip2 or xz file. These readers verify checksums; those of tarfile do not."""
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]  # peek, because not every HTTP stream can seek
    for magic, reader in COMPRESSIONS.items():
        if buffered.peek(6).startswith(magic):
            return reader(buffered)
    return buffered


def _check_rest(archive: tarfile.TarFile) -> None:
    """Allows only padding after the end-of-archive mark: tarfile would ignore a second archive there."""
    while rest := archive.fileobj.read(2**16):  # type: ignore[union-attr]
        if rest.strip(b"\0"):
            raise ShardError("more data follows the end-of-archive mark; are these two archives in one file?")


def _group(archive: tarfile.TarFile) -> Iterator[Sample]:
    seen: set[str] = set()
    current: Sample | None = None
    for member in archive:
        if member.isdir():
            continue
        key, extension, reason = _parse_name(member.name)
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Sample(0 if current is None else current.index + 1, key)
            if key in seen:
                current.quarantine_reason = (
                    f"key {key!r} occurred earlier in this shard; files of one sample must be adjacent"
                )
            seen.add(key)
        reason = reason or _reason_against(member, extension, current)
        if reason is None:
            file = archive.extractfile(member)
            assert file is not None
            current.members[extension] = file.read()
        current.quarantine_reason = current.quarantine_reason or reason
    if current is not None:
        yield current


def _parse_name(path: str) -> tuple[str, str, str | None]:
    """Key, extension, and a reason for quarantine or None. The path may contain bytes that are not UTF-8."""
    readable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    match = NAME.match(readable)
    if match is None:
        return readable, "", f"file name {readable!r} is not KEY.EXTENSION"
    if readable != path:
        return match[1], match[2].lower(), f"file name {readable!r} is not UTF-8"
    return match[1], match[2].lower(), None


def _reason_against(member: tarfile.TarInfo, extension: str, sample: Sample) -> str | None:
    if not member.isfile():
        return f"{extension!r} is a link or a device, not a file"
    if member.size > MAX_MEMBER_BYTES:
        return f"{extension!r} has {member.size} bytes, more than {MAX_MEMBER_BYTES}"
    if extension in sample.members:
        return f"{extension!r} occurs twice"
    return None
