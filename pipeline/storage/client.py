"""The file system of a URL, and requests to it, with retries.

Endpoint, region and keys of S3 come from the usual places (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws,
the machine's role), or from `configure`.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError, UnknownStorage
from pipeline.storage import s3
from pipeline.storage.retries import http_status, with_retries
from pipeline.storage.urls import HIDDEN, redacted, with_secrets

R = TypeVar("R")
Options = dict[str, dict[str, Any]]  # protocol -> arguments of its fsspec file system
CREATE_ONLY = "TOKENMILL_CREATE_ONLY"  # environment variable: SERVER (the default) or CHECKED
SERVER, CHECKED = "server", "checked"
URL_SECRETS = "tokenmill-urls"  # in fsspec's settings, so that they travel to workers with the other options
SECRET_OPTION = re.compile(r"key|secret|token|password|credential|connection_string|://", re.IGNORECASE)
SHORTEST_SECRET = 6  # shorter values, such as "anon", are also common words
EXTRAS = {  # protocol: the extra in pyproject.toml that installs its client
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
}
TRIES = 3  # requests per call, where the client itself retries


def environment(options: Options, create_only: str = SERVER) -> dict[str, str]:
    """Environment variables that pass these options to other processes. They may hold secrets.

    options: for example {"s3": {"endpoint_url": "http://127.0.0.1:8333", "profile": "lab"}}. Settings in the usual
    AWS_* variables need not be repeated. create_only: see `write_once`. Raises ValueError if JSON cannot hold them.
    """
    if create_only not in (SERVER, CHECKED):
        raise ValueError(f"create_only is {create_only!r}; choose {SERVER!r} or {CHECKED!r}")
    given = {}
    for protocol, kwargs in options.items():
        try:
            given[f"FSSPEC_{protocol.upper()}"] = json.dumps(kwargs)
        except TypeError as error:  # without the values, which may be secrets
            raise ValueError(
                f"storage options of {protocol}: {error}; use only text, numbers, lists and mappings"
            ) from error
    return {**given, CREATE_ONLY: create_only}


def configure(options: Options, create_only: str = SERVER, url_secrets: dict[str, str] | None = None) -> None:
    """Sets the options in this process and in processes that it starts later. Raises ValueError like `environment`.

    url_secrets: see `without_secrets`. Processes that start later do not have them; see `set_url_secrets`.
    """
    os.environ.update(environment(options, create_only))
    fsspec.config.set_conf_env(fsspec.config.conf)
    set_url_secrets(url_secrets or {})


def url_secrets() -> dict[str, str]:
    """The secrets of URLs in this process, for `set_url_secrets` in another one."""
    return dict(options_of(URL_SECRETS))


def set_url_secrets(secrets: dict[str, str]) -> None:
    fsspec.config.conf.pop(URL_SECRETS, None)
    if secrets:
        fsspec.config.conf[URL_SECRETS] = secrets


def without_values(text: str) -> str:
    """Text, such as a traceback, without secrets: those of URLs, and the values of options that this process has."""
    for options in fsspec.config.conf.values():
        for name, value in _strings(options):
            if len(value) >= SHORTEST_SECRET and SECRET_OPTION.search(name):
                text = text.replace(value, HIDDEN)
    return redacted(text)


def _strings(options: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The strings in nested options, each with the last name on its way."""
    if isinstance(options, str):
        yield name, options
    elif isinstance(options, dict):
        for inner, value in options.items():
            yield from _strings(value, str(inner))


def setter() -> Callable[[], None] | None:
    """A function that sets the options of this process in another one; None if there are none.

    Pickled by value, it needs fsspec, but not this package, which Ray's workers find only later. It may hold secrets.
    """
    settings, create_only, name = dict(fsspec.config.conf), os.environ.get(CREATE_ONLY, SERVER), CREATE_ONLY
    if not settings and create_only == SERVER:
        return None

    def set_storage_options() -> None:
        import os

        import fsspec

        os.environ[name] = create_only
        fsspec.config.conf.update(settings)

    return set_storage_options


def normalise(url: str) -> str:
    """One spelling per location: lower-case protocols; local paths become absolute, without file://; trailing slashes
    are removed."""
    protocol, separator, rest = str(url).partition("://")
    if separator and protocol.lower() != "file":
        return f"{protocol.lower()}://{rest}".rstrip("/")
    return os.path.abspath(os.path.expanduser(rest if separator else str(url)))


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path on it, for use by other libraries. The client retries a few times itself.

    Our own code uses the functions of this package, which retry for longer.
    """
    return locate_once(url, TRIES)


def locate_once(url: str, tries: int = 1) -> tuple[Any, str]:
    """Like `locate`, but the client does not retry, because `request` does."""
    # a cached listing would hide objects that other workers have written since
    options: dict[str, Any] = {"use_listings_cache": False}
    if s3.is_s3(url):
        options["config_kwargs"] = s3.client_settings(options_of("s3"), tries)
    plain = normalise(url)
    url, login = with_secrets(plain, options_of(URL_SECRETS))
    if "client_kwargs" in login:  # else these would replace those of the user
        given = options_of(url.partition("://")[0]).get("client_kwargs", {})
        login["client_kwargs"]["headers"] = {**given.get("headers", {}), **login["client_kwargs"]["headers"]}
        login["client_kwargs"] = {**given, **login["client_kwargs"]}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options, **login)
    except OSError:
        raise
    except Exception as error:  # each file system raises its own
        raise _unknown_storage(plain, error) from error
    if s3.is_s3(url):
        fs.retries = tries
    return fs, path


def _unknown_storage(url: str, error: Exception) -> UnknownStorage:
    protocol = url.partition("://")[0].lower()
    if isinstance(error, ImportError):
        extra = EXTRAS.get(protocol)
        install = f"pip install 'tokenmill[{extra}]'" if extra else str(error)
        return UnknownStorage(f"{url}: {protocol}:// needs another package. {install}")
    if protocol not in fsspec.available_protocols():
        return UnknownStorage(
            f"{url}: unknown protocol {protocol!r}; use a local path, s3://, gs://, az:// or http(s)://"
        )
    given = ", ".join(options_of(protocol)) or "none"
    return UnknownStorage(f"{url}: {error}; check the URL and storage.options.{protocol} (keys given: {given})")


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def options_of(protocol: str) -> dict[str, Any]:
    """Options from `configure`, from FSSPEC_* variables and from ~/.config/fsspec."""
    return fsspec.config.conf.get(protocol, {})


def request(what: str, url: str, call: Callable[[], R], cancelled: threading.Event | None = None) -> R:
    """Makes a call to storage with retries, and returns its result.

    what: the verb for the error message, such as "read". Raises PermissionError that says which key was refused, and
    StorageError like `with_retries`.
    """
    try:
        return with_retries(call, url, cancelled)
    except Exception as error:
        if isinstance(error, TypeError) and options_of(
            url.partition("://")[0]
        ):  # clients pass options on when first used
            raise _unknown_storage(url, error) from error
        if s3.is_s3(url) and (refused := s3.permission_error(error, what, url, options_of("s3"))) is not None:
            raise refused from error
        if s3.is_s3(url):
            raise
        status, reason = http_status(error), " ".join(redacted(str(error)).split())
        if status in (401, 403):
            raise PermissionError(f"the server refused to {what} {url} (status {status}); check the URL") from error
        if type(error) is OSError and reason.startswith("Forbidden"):  # gcsfs, without a status
            raise PermissionError(f"the server refused to {what} {url}: {reason}; check the login") from error
        if not isinstance(error, OSError) and (status is not None or reason.startswith("Bad Request")):
            # the clients of other protocols raise their own; gcsfs a ValueError
            raise StorageError(f"{url}: cannot {what} it: {type(error).__name__}: {reason}") from error
        raise
