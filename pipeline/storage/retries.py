"""Retries of transient storage errors. Retries in botocore and s3fs are off, because layers of retries multiply."""

import errno
import itertools
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.errors import StorageError
from pipeline.storage.urls import redacted

R = TypeVar("R")
RETRY_FOR_S = 300.0  # long enough for a server restart, a network outage or a throttled bucket
FIRST_PAUSE_S = 0.2  # doubled after each attempt
LONGEST_PAUSE_S = 20.0
LOG_FROM_S = 1.0  # shorter pauses are not logged

TRANSIENT = (ConnectionError, TimeoutError, socket.gaierror)
# By name: importing these classes would double the import time, and local files do not need them.
TRANSIENT_NAMES = {
    "aiohttp.client_exceptions.ClientError",  # for example a truncated body
    "botocore.exceptions.ConnectionError",  # refused, reset, name not found
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.HTTPClientError",  # closed, timed out
    "botocore.parsers.ResponseParserError",  # overloaded proxies respond with HTML
    "azure.core.exceptions.ServiceRequestError",  # no connection
    "azure.core.exceptions.ServiceResponseError",  # a connection that broke
    "google.auth.exceptions.TransportError",
    "http.client.HTTPException",
    "httpx.TransportError",  # of the Hugging Face hub
    "httpx2.TransportError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
}
TRANSIENT_ERRNOS = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ESTALE}
TRANSIENT_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: two conditional writes at the same time
# error codes that come with status 400
TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}


def with_retries(call: Callable[[], R], url: str, cancelled: threading.Event | None = None) -> R:
    """Makes the call and returns its result. Transient errors are retried for up to RETRY_FOR_S (five minutes).

    Raises other errors at once, and StorageError if transient errors do not stop or if `cancelled` is set.
    """
    start = time.monotonic()
    cancelled = cancelled or threading.Event()
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            # random, so that workers do not all return to a busy server at the same time
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            waited = time.monotonic() - start
            if not is_transient(error):
                raise
            if waited + pause > RETRY_FOR_S or cancelled.is_set():
                tries = f"{attempt + 1} tries in {waited:.0f} s"
                raise StorageError(
                    f"{url}: {_describe(error)}, after {tries}; check the endpoint and the network"
                ) from error
            if pause >= LOG_FROM_S:
                left = RETRY_FOR_S - waited
                logging.getLogger(__name__).warning(
                    "%s: %s; retrying in %.0f s, for at most %.0f s more", url, _describe(error), pause, left
                )
            cancelled.wait(pause)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return False
    if (status := http_status(error)) is not None:
        return status in TRANSIENT_STATUSES or bool(TRANSIENT_CODES & {_code(cause) for cause in causes})
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's HTTP client, for any error
        return is_transient(error.__cause__)
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return (
        isinstance(error, TRANSIENT)
        or bool(names & TRANSIENT_NAMES)
        or getattr(error, "errno", None) in TRANSIENT_ERRNOS
    )


def http_status(error: BaseException) -> int | None:
    """The status of the server's response, if there was one. Each client keeps it in another place."""
    for cause in _causes(error):
        if type(cause).__module__ == "aiohttp.http_exceptions":
            continue  # a body that broke off: its code 400 is aiohttp's own
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # azure and requests: status_code; aiohttp: status; gcsfs: code, sometimes as text
        for holder, name in ((response, "status_code"), (cause, "status_code"), (cause, "status"), (cause, "code")):
            value = getattr(holder, name, None)
            if isinstance(value, int | str) and str(value).isdecimal() and 100 <= int(value) < 600:
                return int(value)
    return None


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and the chain of errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _describe(error: BaseException) -> str:
    """The error and its root cause: outer layers say little, and FSTimeoutError nothing at all."""
    lines = [" ".join(f"{type(cause).__name__}: {cause}".rstrip(": ").split()) for cause in _causes(error)]
    return redacted(lines[0] if len(lines) == 1 else f"{lines[0]} ({lines[-1]})")
