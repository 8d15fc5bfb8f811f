"""Everything specific to S3. Functions take fsspec's S3 client as an argument."""

import asyncio
import os
from typing import Any

from pipeline.errors import ReplacedObject
from pipeline.storage.retries import http_status

CLIENT = {
    "connect_timeout": 10,  # s
    "read_timeout": 30,  # s without a byte; also the time a server may take to process a request
    "max_pool_connections": 64,
}
# An object smaller than two parts is one PUT (S3 allows 5 GiB). The probe checks a create-only PUT, and more servers
# support that than a create-only multipart upload.
PART_BYTES = 2**31
NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
ADVICE = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE, and the permissions of this key"


def is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def client_settings(given: dict[str, Any], tries: int) -> dict[str, Any]:
    """Settings for botocore; those of the user take precedence. tries: requests per call before an error is raised."""
    retries = {"mode": "standard", "total_max_attempts": tries}
    return {**CLIENT, **given.get("config_kwargs", {}), "retries": retries}


def version_of(info: dict[str, Any]) -> str | None:
    """The ETag in a response or a listing."""
    tag = info.get("ETag")
    return tag.strip('"') if tag else None


def refuse_other(url: str, found: str | None, expected: str | None) -> None:
    if found != expected:
        raise ReplacedObject(f"{url} was replaced: its version is {found} instead of {expected}")


def get_range(fs: Any, url: str, start: int, end: int, version: str | None) -> bytes:
    """Bytes [start, end) of the object. Raises ReplacedObject if it is not that version."""
    return asyncio.run_coroutine_threadsafe(_get_range(fs, url, start, end, version), fs.loop).result()


async def _get_range(fs: Any, url: str, start: int, end: int, version: str | None) -> bytes:
    bucket, key, _ = fs.split_path(url)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    except OSError as error:
        if http_status(error) == 416:  # the object now ends before this range
            raise ReplacedObject(f"{url} was replaced by a shorter object while it was read") from error
        raise
    async with answer["Body"] as body:
        refuse_other(url, version_of(answer), version)  # not with If-Match, which some servers ignore
        data = await body.read()
    if len(data) != end - start:
        raise ConnectionError(f"received {len(data)} bytes instead of {end - start}")
    return data


def permission_error(error: Exception, what: str, url: str, given: dict[str, Any]) -> PermissionError | None:
    """A PermissionError with advice, if the error means that these keys are not allowed; None for any other error."""
    if not isinstance(error, PermissionError) and type(error).__name__ not in NO_KEYS:
        return None
    key = given.get("key") or os.environ.get("AWS_ACCESS_KEY_ID")
    who = f"access key {key}" if key else "the identity in the AWS settings"
    return PermissionError(f"{who} may not {what} {url} ({error}); {ADVICE}")
