"""Reads a tar from front to back: plain, or compressed with gzip, bzip2, xz or Zstandard.

Strict: a broken header, a missing end, or data after the end raises ShardError. Bounded: a header may claim any size,
but memory and time depend only on the bytes that are there and on MAX_HEADER_BYTES. Python's tarfile parses single
headers; it does not walk the archive, because it stops silently at some damage and loops or recurses on other.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 2**24  # of a long name, or of the pax records of one member
CHUNK_BYTES = 2**20  # what a skip reads at a time
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
PAX_RECORDS = {  # those that we need, and our names for them
    "path": "name",
    "linkpath": "linkname",
    "size": "size",
    "GNU.sparse.major": "sparse",
    "GNU.sparse.name": "sparse name",
    "GNU.sparse.realsize": "sparse size",
    "GNU.sparse.map": "old sparse",
    "GNU.sparse.size": "old sparse",
}
KINDS = {tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link", tarfile.DIRTYPE: "folder"}


def _zstd(stream: IO[bytes]) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


@contextlib.contextmanager
def open_plain(url: str, version: str | None = None) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a shard. These readers verify checksums; those of tarfile do not."""
    # BufferedReader: for peek, because not every HTTP stream can seek
    with storage.open_stream(url, version) as stream, io.BufferedReader(stream) as buffered:  # type: ignore[type-var]
        start = buffered.peek(6)
        opener = next((opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic)), None)
        if opener is None:
            yield buffered
            return
        with opener(buffered) as plain:
            yield plain


@dataclass
class Member:
    """A member of a tar. kind: file, folder, hard link, symbolic link, device, or old sparse (file).

    num_bytes: of the file. start, stored: the place and the number of its bytes in the plain tar; a sparse file stores
    less than num_bytes. pieces: (offset, length) of the parts that a sparse file stores, if its header lists them.
    """

    name: str
    kind: str
    num_bytes: int
    start: int
    stored: int
    target: str = ""
    pieces: list[tuple[int, int]] | None = None
    pieces_in_data: bool = False


class TarReader:
    """The members of a plain tar, in order. `read` gives the content of the current one."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._position = stream, 0
        self._shared: dict[str, str] = {}  # pax records for all members that follow

    def members(self) -> Iterator[Member]:
        """Raises ShardError as soon as the tar is known to be broken."""
        own: dict[str, str] = {}  # names and pax records for the next member only
        while (header := self._header()) is not None:
            if header.type in (*EXTENSIONS, *PAX):
                (self._shared if header.type == tarfile.XGLTYPE else own).update(self._extension(header))
                continue
            member = self._member(header, {**self._shared, **own})
            own = {}
            yield member
            self.skip(member.start + -(-member.stored // BLOCK) * BLOCK - self._position)
        if own:
            raise ShardError("it ends after the header that extends a member; it is probably truncated")
        self._check_rest()

    def read(self, member: Member) -> bytes:
        """The content of the current member. Raises ShardError if it is not there."""
        stored = self._exactly(member.stored)
        if member.pieces is None and not member.pieces_in_data:
            return stored
        try:
            return _expanded(member, stored)
        except ValueError as error:
            raise ShardError(f"the list of pieces of the sparse file {member.name!r} is broken ({error})") from error

    def _header(self) -> tarfile.TarInfo | None:
        """The next header block; None at the end-of-archive mark."""
        at, block = self._position, self._stream.read(BLOCK)
        self._position += len(block)
        if not block:
            raise ShardError(f"{'it has no end-of-archive mark' if at else 'it is empty'}; it is probably truncated")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except tarfile.HeaderError as error:
            raise ShardError(f"broken header at byte {at} ({error})") from error
        if header.size < 0:
            raise ShardError(f"broken header at byte {at} (it claims {header.size} bytes)")
        return header

    def _extension(self, header: tarfile.TarInfo) -> dict[str, str]:
        """What a GNU or pax header says about the member that follows."""
        at = self._position
        if header.size > MAX_HEADER_BYTES:
            raise ShardError(f"the header before byte {at} claims {header.size} bytes of names; allowed: 2^24")
        data = self._exactly(header.size)
        self.skip(-header.size % BLOCK)
        if header.type in PAX:
            return _pax_records(data, at)
        name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return {"name" if header.type == tarfile.GNUTYPE_LONGNAME else "linkname": name}

    def _member(self, header: tarfile.TarInfo, given: dict[str, str]) -> Member:
        stored = _number(given["size"]) if "size" in given else header.size
        has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        member = Member(
            name=given.get("sparse name") or given.get("name", header.name),
            kind="file" if header.isreg() else KINDS.get(header.type, "device"),
            num_bytes=stored,
            start=self._position,
            stored=stored if has_data else 0,
            target=given.get("linkname", header.linkname),
        )
        if header.type == tarfile.GNUTYPE_SPARSE:
            member.pieces, member.num_bytes = self._gnu_pieces(header)
            member.start = self._position
        elif given.get("sparse") == "1":
            member.pieces_in_data, member.num_bytes = True, _number(given.get("sparse size", ""))
        elif "sparse" in given or "old sparse" in given:
            member.kind = "old sparse"
        return member

    def _gnu_pieces(self, header: tarfile.TarInfo) -> tuple[list[tuple[int, int]], int]:
        """The pieces of a sparse file in GNU's own format, and its size."""
        pieces, more, num_bytes = header._sparse_structs  # type: ignore[attr-defined]
        while more:
            block = self._exactly(BLOCK)
            numbers = [tarfile.nti(block[at : at + 12]) for at in range(0, 504, 12)]  # type: ignore[attr-defined]
            pieces += zip(numbers[::2], numbers[1::2], strict=True)
            more = bool(block[504])
        return [(offset, length) for offset, length in pieces if length], num_bytes

    def _exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._position += len(data)
        if len(data) != count:
            raise ShardError(f"unexpected end of data at byte {self._position}; it is probably truncated")
        return data

    def skip(self, count: int) -> None:
        """Raises ShardError if there are fewer bytes."""
        end = self._position + count
        while self._position < end:
            self._exactly(min(CHUNK_BYTES, end - self._position))

    def _check_rest(self) -> None:
        """Allows only padding after the end-of-archive mark, not a second archive."""
        while rest := self._stream.read(CHUNK_BYTES):
            if rest.strip(b"\0"):
                raise ShardError("more data follows the end-of-archive mark; are these two archives in one file?")


def _pax_records(data: bytes, start: int) -> dict[str, str]:
    """The records that we need, by our names. A record is "LENGTH KEY=VALUE\\n". start: of the data, for messages."""
    records, at = {}, 0
    while at < len(data) and data[at]:  # NUL: padding
        digits, space, _ = data[at : at + 20].partition(b" ")
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : end].partition(b"=")
        if not (space and equals and at < end <= len(data) and value.endswith(b"\n")):
            raise ShardError(f"broken pax record at byte {start + at}")
        if name := PAX_RECORDS.get(key.decode("utf-8", "replace")):
            records[name] = value[:-1].decode("utf-8", "surrogateescape")
        at = end
    if "name" in records:
        records["name"] = records["name"].rstrip("/")
    return records


def _number(text: str) -> int:
    """Raises ShardError if the text is not a number of bytes."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ShardError(f"a pax header says that a member has {text[:40]!r} bytes")
    return int(text)


def _expanded(member: Member, stored: bytes) -> bytes:
    """The content of a sparse file. Raises ValueError if its pieces overlap or are not there."""
    pieces, at = (member.pieces, 0) if member.pieces is not None else _pieces_in(stored)
    content, end = bytearray(member.num_bytes), 0
    for offset, length in pieces:
        if not (end <= offset <= offset + length <= member.num_bytes and at + length <= len(stored)):
            raise ValueError(f"{length} bytes at byte {offset} of {member.num_bytes}")
        content[offset : offset + length] = stored[at : at + length]
        at, end = at + length, offset + length
    return bytes(content)


def _pieces_in(stored: bytes) -> tuple[list[tuple[int, int]], int]:
    """The pieces that GNU's sparse format 1.0 lists before the data, in decimal lines; and the start of the data."""
    at = 0

    def number() -> int:
        nonlocal at
        end = stored.index(b"\n", at)
        value, at = int(stored[at:end]), end + 1
        return value

    pieces = [(number(), number()) for _ in range(number())]
    return pieces, -(-at // BLOCK) * BLOCK
