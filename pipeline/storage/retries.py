"""Which errors of storage pass by themselves, and how long we wait for that. The only retries there are:
those of botocore and s3fs are switched off, since layers of them multiply.
"""

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

R = TypeVar("R")
PATIENCE_S = 300.0  # for a server that restarts, a network that is down, a throttled bucket
FIRST_PAUSE_S = 0.2  # doubled after each try
LONGEST_PAUSE_S = 20.0
TOLD_FROM_S = 1.0  # shorter pauses are not worth a line in the log

PASSING = (ConnectionError, TimeoutError, socket.gaierror)
# By name, for to import them costs as much as all of our own, and who reads local files needs none of them.
PASSING_NAMES = {
    "aiohttp.client_exceptions.ClientError",  # a body cut short, among others
    "botocore.exceptions.ConnectionError",  # refused, reset, name not found
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.HTTPClientError",  # closed, timed out
    "botocore.parsers.ResponseParserError",  # busy proxies answer with HTML
    "http.client.HTTPException",
    "urllib3.exceptions.HTTPError",
}
PASSING_ERRNOS = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ESTALE}
PASSING_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: two conditional writes at the same moment
PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}  # with 400


def patiently(call: Callable[[], R], url: str, given_up: threading.Event | None = None) -> R:
    """What the call returns, after as many tries as PATIENCE_S allows. No try begins once `given_up` is set.

    Errors that do not pass come out at once. Raises StorageError, an OSError, if those that do have not.
    """
    start = time.monotonic()
    given_up = given_up or threading.Event()
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            # random, lest all workers come back to a busy server in the same moment
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            waited = time.monotonic() - start
            if not passes(error):
                raise
            if waited + pause > PATIENCE_S or given_up.is_set():
                tries = f"{attempt + 1} tries in {waited:.0f} s"
                raise StorageError(
                    f"{url}: {_told(error)}, after {tries}; check the endpoint and the network"
                ) from error
            if pause >= TOLD_FROM_S:
                logging.getLogger(__name__).warning("%s: %s; next try in %.0f s", url, _told(error), pause)
            given_up.wait(pause)
    raise AssertionError("unreachable")


def passes(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later."""
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return False
    if (status := http_status(error)) is not None:
        return status in PASSING_STATUSES or bool(PASSING_CODES & {_code(cause) for cause in causes})
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return isinstance(error, PASSING) or bool(names & PASSING_NAMES) or getattr(error, "errno", None) in PASSING_ERRNOS


def http_status(error: BaseException) -> int | None:
    """What the server answered, if it did."""
    for cause in _causes(error):
        if isinstance(response := getattr(cause, "response", None), dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _told(error: BaseException) -> str:
    """The root cause beside the error: the outer layers say little, FSTimeoutError nothing at all."""
    told = [" ".join(f"{type(cause).__name__}: {cause}".rstrip(": ").split()) for cause in _causes(error)]
    return told[0] if len(told) == 1 else f"{told[0]} ({told[-1]})"
