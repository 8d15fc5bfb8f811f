"""Errors of this layer that the user can fix."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class CodebookMissing(ValueError):
    """The quantizer has no codebook yet, so it cannot encode or decode."""


class TokenizerMismatch(ValueError):
    """Two artifacts come from different tokenizers and must not be mixed."""


class MissingPackage(ImportError):
    """A package that this tokenizer or modality needs is not installed. The message has the pip command."""


class UnsupportedModel(ValueError):
    """A published model that cannot be imported, with the reason."""


class BadSample(ValueError):
    """A sample cannot be decoded or encoded. It is quarantined with this message."""


MAKE_AGAIN = "copy the folder again, or make it again with `tokenmill train` or `tokenmill codebook`"
PASSING = (TokenizerMismatch, CodebookMissing, MissingPackage, UnsupportedModel, FileNotFoundError, PermissionError)


@contextlib.contextmanager
def naming_damage(file: Path, remedy: str = MAKE_AGAIN) -> Iterator[None]:
    """Turns any error in the block into a TokenizerMismatch that names the file, from which the block reads.

    A damaged file can raise almost anything. Errors of other causes pass, and those that name the file themselves.
    """
    try:
        yield
    except PASSING:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise TokenizerMismatch(f"{file} is damaged ({what}); {remedy}") from error
