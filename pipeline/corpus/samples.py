"""Reads the samples of a WebDataset shard strictly: no content of the tar is silently skipped.

WebDataset's convention: the files of a sample are adjacent in the tar and share their name up to the first dot.
"""

import collections
import contextlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa

from pipeline.corpus.tars import Member, TarReader, open_plain
from pipeline.errors import ShardError, one_line

NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$")
MAX_MEMBER_BYTES = 2**30
MAX_HOLE_BYTES = 2**26  # of a sparse file: a tar of a few kB can claim any number of them
MAX_REWINDS = 100  # of a compressed shard, whose beginning must be decompressed again each time
PASSED_OVER = {  # members that belong to no sample
    "macOS metadata (._*, .DS_Store, __MACOSX)": re.compile(r"(^|/)(\._[^/]*|\.DS_Store|__MACOSX/.*)$", re.DOTALL),
    "WebDataset metadata (__meta__)": re.compile(r"^__[^/]*__$|(^|/)__meta__(\.[^/]*)?$"),
}
NOT_A_FILE = {
    "symbolic link": "is a symbolic link, not a file; write the shard with `tar --dereference`",
    "device": "is a device or another special file",
    "old sparse": "is a sparse file of an old format; write the shard without `tar --sparse`",
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


def read_samples(
    url: str, version: str | None = None, *, passed_over: collections.Counter[str] | None = None
) -> Iterator[Sample]:
    """Yields the samples in the order of the shard, numbered from 0. version: the required version of the shard.

    passed_over: counts the members that belong to no sample, by what they are. Raises ShardError, as soon as it is
    known, if the shard cannot be read to its end.
    """
    try:
        with open_plain(url, version) as stream, LinkTargets(url, version) as links:
            yield from _group(TarReader(stream), links, collections.Counter() if passed_over is None else passed_over)
    except FileNotFoundError as error:
        raise ShardError(f"{url}: there is no such shard") from error
    except PermissionError as error:
        raise ShardError(
            f"{url}: no permission to read it; check the credentials or the file mode ({error})"
        ) from error
    except ShardError as error:
        raise ShardError(f"{url}: {error}; write the shard again and rerun the command") from error
    except MemoryError as error:
        raise ShardError(
            f"{url}: not enough memory to read it; a compressed shard may claim to need any amount, so write it again "
            "without compression, or give the worker more memory"
        ) from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise ShardError(f"{url}: cannot be read to its end ({type(error).__name__}: {one_line(error)})") from error


class LinkTargets:
    """The files that hard links name. They come earlier in the shard, so a second pass over it reads them again."""

    def __init__(self, url: str, version: str | None):
        self._url, self._version = url, version
        self._files: dict[str, Member] = {}
        self._last: tuple[Member, bytes] | None = None
        self._opened = contextlib.ExitStack()
        self._stream: IO[bytes] | None = None
        self._position = self._rewinds = 0

    def __enter__(self) -> "LinkTargets":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add(self, member: Member) -> None:
        """Makes the file a target; a link becomes another name of its own target."""
        target = self._files.get(member.target) if member.kind == "hard link" else member
        if target is not None and target.kind == "file":
            self._files[member.name] = target

    def reason_against(self, link: Member) -> str | None:
        """Why the link cannot be read, or None."""
        target = self._files.get(link.target)
        if target is None:
            return f"is a hard link to {_readable(link.target)!r}, which is not an earlier file of this shard"
        if target.start < self._position and self._rewinds >= MAX_REWINDS:
            return (
                f"is one of more than {MAX_REWINDS} hard links in a compressed shard; decompress it, or write it "
                "with `tar --hard-dereference`"
            )
        return _reason_against_size(target)

    def read(self, link: Member) -> bytes:
        """The content of the link's target. Raises ShardError."""
        target = self._files[link.target]
        if self._last is None or self._last[0] is not target:
            reader = TarReader(self._stream_at(target.start))
            self._last = target, reader.read(target)
            self._position = target.start + target.stored
        return self._last[1]

    def _stream_at(self, start: int) -> IO[bytes]:
        if self._stream is None or (start < self._position and not _can_seek(self._stream)):
            self._opened.close()
            self._stream = self._opened.enter_context(open_plain(self._url, self._version))
            self._rewinds, self._position = self._rewinds + 1, 0
        if _can_seek(self._stream):
            self._stream.seek(start)
        else:
            TarReader(self._stream).skip(start - self._position)
        return self._stream


def _can_seek(stream: IO[bytes]) -> bool:
    """Whether it costs nothing: a compressed stream must decompress again what it skips."""
    return isinstance(stream, io.BufferedReader) and stream.seekable()


def _group(reader: TarReader, links: LinkTargets, passed_over: collections.Counter[str]) -> Iterator[Sample]:
    seen: set[str] = set()
    current: Sample | None = None
    for member in reader.members():
        if (what := _belongs_to_none(member)) is not None:
            passed_over.update(what)
            continue
        links.add(member)
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
        reason = reason or _reason_against(member, extension, current, links)
        if reason is None:
            current.members[extension] = links.read(member) if member.kind == "hard link" else reader.read(member)
        current.quarantine_reason = current.quarantine_reason or reason
    if current is not None:
        yield current


def _belongs_to_none(member: Member) -> list[str] | None:
    """None if the member is a part of a sample. Otherwise what to count it as; nothing for a folder."""
    found = [what for what, pattern in PASSED_OVER.items() if pattern.search(member.name)]
    return [] if member.kind == "folder" else found[:1] or None


def _readable(path: str) -> str:
    """The path may contain bytes that are not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _parse_name(path: str) -> tuple[str, str, str | None]:
    """Key, extension, and a reason for quarantine or None."""
    readable = _readable(path)
    match = NAME.match(readable)
    if match is None:
        return readable, "", f"file name {readable!r} is not KEY.EXTENSION"
    if readable != path:
        return match[1], match[2].lower(), f"file name {readable!r} is not UTF-8"
    return match[1], match[2].lower(), None


def _reason_against(member: Member, extension: str, sample: Sample, links: LinkTargets) -> str | None:
    if extension in sample.members:
        return f"{extension!r} occurs twice"
    if member.kind == "file":
        reason = _reason_against_size(member)
    elif member.kind == "hard link":
        reason = links.reason_against(member)
    else:
        reason = NOT_A_FILE[member.kind]
    return reason and f"{extension!r} {reason}"


def _reason_against_size(member: Member) -> str | None:
    size, holes = max(member.num_bytes, member.stored), member.num_bytes - member.stored
    if size > MAX_MEMBER_BYTES:
        return f"has {size} bytes, more than {MAX_MEMBER_BYTES}"
    return (
        f"is a sparse file with {holes} bytes in holes, more than {MAX_HOLE_BYTES}" if holes > MAX_HOLE_BYTES else None
    )
