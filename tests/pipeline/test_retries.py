"""Transient errors are retried for a limited time; other errors are raised at once."""

import errno
import threading

import aiohttp
import botocore.exceptions
import pytest

from pipeline.errors import StorageError
from pipeline.storage import retries


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retries, "RETRY_FOR_S", 0.2)


class Failing:
    """Raises the errors one after the other, then returns. `calls` counts the calls."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "result"


def server_error(status: int, code: str) -> OSError:
    """As s3fs raises it: its own OSError, caused by an error of the client."""
    error = OSError("refused")
    about = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = botocore.exceptions.ClientError(about, "GetObject")
    return error


def with_attributes(**attributes: object) -> Exception:
    """As gcsfs (code), adlfs (status_code) and aiohttp (status) raise the server's answer."""
    error = Exception("refused")
    error.__dict__.update(attributes)
    return error


def not_found_because_of(cause: Exception) -> FileNotFoundError:
    """As fsspec's HTTP client raises every error."""
    error = FileNotFoundError("http://x/y.tar")
    error.__cause__ = cause
    return error


TRANSIENT = [
    ConnectionResetError("reset"),
    TimeoutError("slow"),
    aiohttp.ClientPayloadError("cut short"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    server_error(503, "SlowDown"),
    server_error(500, "InternalError"),
    server_error(409, "ConditionalRequestConflict"),
    server_error(400, "RequestTimeout"),
    with_attributes(code=503),
    with_attributes(code="429"),
    with_attributes(status_code=500),
    with_attributes(status=502),
    not_found_because_of(aiohttp.ClientConnectionError("refused")),
    not_found_because_of(with_attributes(status=503)),
]
PERMANENT = [
    FileNotFoundError("gone"),
    OSError(errno.ENOSPC, "disk full"),
    server_error(403, "AccessDenied"),
    server_error(412, "PreconditionFailed"),
    server_error(400, "InvalidArgument"),
    server_error(501, "NotImplemented"),
    with_attributes(code=404),
    with_attributes(status_code=403),
    with_attributes(code="KeyTooLong"),
    not_found_because_of(with_attributes(status=404)),
    not_found_because_of(ValueError("not a URL")),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_a_transient_error_is_retried(error: Exception, short_pauses: None):
    call = Failing(error, error)
    assert (retries.with_retries(call, "s3://x/y"), call.calls) == ("result", 3)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_a_permanent_error_is_raised_at_once(error: Exception, short_pauses: None):
    call = Failing(error)
    with pytest.raises(type(error)):
        retries.with_retries(call, "s3://x/y")
    assert call.calls == 1


def test_the_error_after_the_last_retry_names_the_cause(short_pauses: None):
    call = Failing(*[aiohttp.ClientPayloadError("cut short")] * 1000)
    with pytest.raises(StorageError, match=r"s3://x/y: ClientPayloadError: cut short, after \d+ tries in 0 s"):
        retries.with_retries(call, "s3://x/y")
    assert 3 < call.calls < 1000


def test_a_cancelled_call_is_not_retried():
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(StorageError, match="after 1 tries"):
        retries.with_retries(Failing(TimeoutError("slow")), "s3://x/y", cancelled)
