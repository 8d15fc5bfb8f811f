"""The names of packed samples: keys and members that every reader of WebDataset splits at the same dot."""

import re
from urllib.parse import quote

# A literal % counts only where it could be taken for an escape. Control characters, and bytes that are not UTF-8.
UNSAFE = re.compile(r"%(?=[0-9A-Fa-f]{2})|[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def sample_key(name: str) -> str:
    """The key of a sample from its name: a relative path without the extension.

    Readers end the key at the first dot after the last slash, and webdataset ignores what begins with two underscores,
    so such dots and underscores are percent-encoded. `urllib.parse.unquote_to_bytes(key)` is the name again, hence
    different names have different keys. Raises ValueError for a name that no file in a folder can have.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(
            f"key {name!r} cannot name a file; it must not be empty, start or end with a slash, or contain '.' or '..' "
            "as a folder"
        )
    folder, slash, last = printable(name).rpartition("/")
    key = f"{folder}{slash}{last.replace('.', '%2E')}"
    return f"%5F{key[1:]}" if key.startswith("__") else key


def member_name(name: str) -> str:
    """The name of a member, in lower case as readers see it."""
    return printable(name.lower()).replace("/", "%2F")


def is_reserved(member: str) -> bool:
    """Names such as __key__, which webdataset uses itself."""
    return member.startswith("__") and member.endswith("__")


def printable(name: str) -> str:
    """The name with unsafe characters percent-encoded; file names may hold bytes that are not UTF-8."""
    return UNSAFE.sub(lambda found: quote(found[0], safe="", errors="surrogateescape"), name)
