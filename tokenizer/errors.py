"""Errors of the mathematics layer that a user can fix."""


class CodebookMissing(ValueError):
    """Indices were asked of a quantizer whose codebook has not been made yet."""


class TokenizerMismatch(ValueError):
    """Two artifacts were made by different tokenizers and must not be mixed."""


class BadSample(ValueError):
    """The bytes of one sample cannot become an array; the sample goes to quarantine with this message."""
