"""Errors of this layer that the user can fix."""


class CodebookMissing(ValueError):
    """The quantizer has no codebook yet, so it cannot encode or decode."""


class TokenizerMismatch(ValueError):
    """Two artifacts come from different tokenizers and must not be mixed."""


class BadSample(ValueError):
    """A sample cannot be decoded or encoded. It is quarantined with this message."""
