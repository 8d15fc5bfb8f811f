"""What a command may print: names and errors come from files, which anybody may have made."""

import contextlib
import sys
import unicodedata
from collections.abc import Iterator
from typing import IO, Any

ERASE = "\r\033[K"  # what is in the line of the terminal
KEPT = "\n\t"
ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are no text, line and paragraph separators
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder text


def printable(text: str) -> str:
    """Text for a terminal: control characters as \\x1b, and passwords and signatures in URLs hidden."""
    if "://" in text:
        from pipeline.storage import redacted  # imports fsspec, and --help should not wait for that

        text = redacted(text)
    return text if text.isprintable() else "".join(map(_escaped, text))


def erase_line() -> None:
    """Erases the line of the terminal that the cursor is in."""
    stream: Any = sys.stdout
    (stream.stream if isinstance(stream, Printable) else stream).write(ERASE)


class Printable:
    """A text stream that writes what is `printable`."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printing_safely() -> Iterator[None]:
    """Inside, everything that is printed is `printable`: by commands, warnings, logs and libraries."""
    out: Any = Printable(sys.stdout)
    error: Any = Printable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield


def _escaped(c: str) -> str:
    if c in KEPT or (unicodedata.category(c) not in ESCAPED and c not in BIDIRECTIONAL):
        return c
    return c.encode("unicode_escape").decode()
