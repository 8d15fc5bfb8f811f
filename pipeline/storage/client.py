"""The file system of a URL, and requests to it that are retried.

Endpoint, region and keys of S3 come from where S3 clients have them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_PROFILE, ~/.aws, the machine's role), or from `configure`.
"""

import json
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage import s3
from pipeline.storage.retries import patiently

R = TypeVar("R")
Options = dict[str, dict[str, Any]]  # protocol to what fsspec's file system of it takes
CREATE_ONLY = "TOKENMILL_CREATE_ONLY"  # environment variable: SERVER, which is the default, or CHECKED
SERVER, CHECKED = "server", "checked"
TRIES = 3  # of requests by a client that retries by itself


def environment(options: Options, create_only: str = SERVER) -> dict[str, str]:
    """The variables that give these options to every process that has them, so to Ray's workers by `runtime_env`.

    options: such as {"s3": {"endpoint_url": "http://127.0.0.1:8333", "profile": "lab"}}; what the usual AWS_*
    variables say need not stand here. create_only: see `write_once`. Raises ValueError if JSON cannot hold them.
    """
    if create_only not in (SERVER, CHECKED):
        raise ValueError(f"create-only writes by {create_only!r}: choose {SERVER!r} or {CHECKED!r}")
    try:
        given = {f"FSSPEC_{protocol.upper()}": json.dumps(kwargs) for protocol, kwargs in options.items()}
    except TypeError as error:
        raise ValueError(f"storage options {options}: {error}; give text, numbers, lists and mappings") from error
    return {**given, CREATE_ONLY: create_only}


def configure(options: Options, create_only: str = SERVER) -> None:
    """Gives the options to this process and to those that it starts from now on. For what raises see `environment`."""
    os.environ.update(environment(options, create_only))
    fsspec.config.set_conf_env(fsspec.config.conf)


def normalise(url: str) -> str:
    """One spelling per place: local paths absolute, without file://; no slash at the end."""
    url = str(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path on it, for other libraries to use: it tries again by itself, a few times.

    Our own code uses the functions below, which are more patient.
    """
    return locate_once(url, TRIES)


def locate_once(url: str, tries: int = 1) -> tuple[Any, str]:
    """As `locate`; with one try, since `ask` retries."""
    # a cached listing would hide what other workers have written since
    options: dict[str, Any] = {"use_listings_cache": False}
    if s3.is_s3(url):
        options["config_kwargs"] = s3.client_settings(options_of("s3"), tries)
    fs, path = fsspec.core.url_to_fs(normalise(url), **options)
    if s3.is_s3(url):
        fs.retries = tries
    return fs, path


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def options_of(protocol: str) -> dict[str, Any]:
    """Options from `configure`, FSSPEC_* variables and ~/.config/fsspec."""
    return fsspec.config.conf.get(protocol, {})


def ask(what: str, url: str, call: Callable[[], R], given_up: threading.Event | None = None) -> R:
    """What the call returns, patiently. Raises PermissionError that says who may not do what, and as `patiently`."""
    try:
        return patiently(call, url, given_up)
    except Exception as error:
        if s3.is_s3(url) and (refusal := s3.refusal(error, what, url, options_of("s3"))) is not None:
            raise refusal from error
        raise
