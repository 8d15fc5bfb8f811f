"""The only folder that opens URLs: local paths, s3://, and anything else that fsspec knows.

Objects are written whole. What proves something (token shards, manifests, tokenizers) is written once and never
again; only views that are made anew from it (reports) may be replaced.
"""

from pipeline.storage.client import (
    CHECKED,
    CREATE_ONLY,
    SERVER,
    Options,
    configure,
    environment,
    is_local,
    join,
    locate,
    normalise,
)
from pipeline.storage.create import check_create_only, remove, replace, upload, write_once
from pipeline.storage.objects import (
    TEMPORARY,
    Found,
    downloaded,
    exists,
    find,
    glob,
    list_files,
    list_folders,
    open_stream,
    read,
    scan,
)

__all__ = [
    "CHECKED",
    "CREATE_ONLY",
    "SERVER",
    "TEMPORARY",
    "Found",
    "Options",
    "check_create_only",
    "configure",
    "downloaded",
    "environment",
    "exists",
    "find",
    "glob",
    "is_local",
    "join",
    "list_files",
    "list_folders",
    "locate",
    "normalise",
    "open_stream",
    "read",
    "remove",
    "replace",
    "scan",
    "upload",
    "write_once",
]
