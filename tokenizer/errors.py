"""Errors of this layer that the user can fix."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class CodebookMissing(ValueError):
    """The quantizer has no codebook yet, so it cannot encode or decode."""


class TokenizerMismatch(ValueError):
    """Two artifacts come from different tokenizers and must not be mixed."""


class BadSample(ValueError):
    """A sample cannot be decoded or encoded. It is quarantined with this message."""


@contextlib.contextmanager
def naming_damage(file: Path) -> Iterator[None]:
    """Turns any error in the block into a TokenizerMismatch that names the file, from which the block reads.

    A damaged file can raise almost anything. FileNotFoundError and PermissionError pass: they name the file themselves.
    """
    try:
        yield
    except (TokenizerMismatch, CodebookMissing, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise TokenizerMismatch(
            f"{file} is damaged ({what}); copy the folder again, or make it again with `tokenmill train` or "
            "`tokenmill codebook`"
        ) from error
