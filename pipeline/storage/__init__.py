"""The only folder that opens URLs: local paths, s3://, and every other protocol that fsspec supports.

Objects are always written whole. Token shards, manifest entries and tokenizers are written once and never replaced.
Only objects that can be made again from them, such as reports, may be replaced.
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
    setter,
)
from pipeline.storage.create import check_create_only, remove, replace, upload, write_chunks, write_once
from pipeline.storage.objects import (
    TEMPORARY,
    StoredObject,
    age_s,
    downloaded,
    exists,
    find,
    glob,
    is_file,
    is_folder,
    list_files,
    list_folders,
    open_stream,
    read,
    read_if_exists,
    same_file,
    scan,
    temporary_files,
)
from pipeline.storage.urls import redacted, without_secrets

__all__ = [
    "CHECKED",
    "CREATE_ONLY",
    "SERVER",
    "TEMPORARY",
    "Options",
    "StoredObject",
    "age_s",
    "check_create_only",
    "configure",
    "downloaded",
    "environment",
    "exists",
    "find",
    "glob",
    "is_file",
    "is_folder",
    "is_local",
    "join",
    "list_files",
    "list_folders",
    "locate",
    "normalise",
    "open_stream",
    "read",
    "read_if_exists",
    "redacted",
    "remove",
    "replace",
    "same_file",
    "scan",
    "setter",
    "temporary_files",
    "upload",
    "without_secrets",
    "write_chunks",
    "write_once",
]
