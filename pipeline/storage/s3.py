"""What storage needs to know about S3 in particular. fsspec's S3 client comes in as an argument."""

import asyncio
import os
from typing import Any

from pipeline.errors import ReplacedObject
from pipeline.storage.retries import http_status

CLIENT = {
    "connect_timeout": 10,  # s
    "read_timeout": 30,  # s without a byte; also what a server may take to think over a request
    "max_pool_connections": 64,
}
# An object smaller than two parts is one PUT (S3 allows 5 GiB): a create-only PUT is what the probe tries out, and
# more servers honour it than a create-only end of a multipart upload.
PART_BYTES = 2**31
NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
ADVICE = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE, and what this key may do"


def is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def client_settings(given: dict[str, Any], tries: int) -> dict[str, Any]:
    """botocore's, where the user's configuration says nothing else. tries: requests sent before an error comes out."""
    retries = {"mode": "standard", "total_max_attempts": tries}
    return {**CLIENT, **given.get("config_kwargs", {}), "retries": retries}


def version_of(info: dict[str, Any]) -> str | None:
    """The ETag in an answer or a listing."""
    tag = info.get("ETag")
    return tag.strip('"') if tag else None


def refuse_other(url: str, found: str | None, expected: str | None) -> None:
    if found != expected:
        raise ReplacedObject(f"{url} was replaced: version {found} is there instead of {expected}")


def get_range(fs: Any, url: str, start: int, end: int, version: str | None) -> bytes:
    """Bytes [start, end) of the object. Raises ReplacedObject if it is not, or no longer, of that version."""
    return asyncio.run_coroutine_threadsafe(_get_range(fs, url, start, end, version), fs.loop).result()


async def _get_range(fs: Any, url: str, start: int, end: int, version: str | None) -> bytes:
    bucket, key, _ = fs.split_path(url)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    except OSError as error:
        if http_status(error) == 416:  # the object ends before this range by now
            raise ReplacedObject(f"{url} was replaced by a shorter object while it was read") from error
        raise
    async with answer["Body"] as body:
        refuse_other(url, version_of(answer), version)  # not by If-Match, which some servers do not know
        data = await body.read()
    if len(data) != end - start:
        raise ConnectionError(f"{len(data)} bytes came instead of {end - start}")
    return data


def refusal(error: Exception, what: str, url: str, given: dict[str, Any]) -> PermissionError | None:
    """What to say of an error that means: not with these keys. None for any other error."""
    if not isinstance(error, PermissionError) and type(error).__name__ not in NO_KEYS:
        return None
    key = given.get("key") or os.environ.get("AWS_ACCESS_KEY_ID")
    who = f"access key {key}" if key else "whoever the AWS settings name"
    return PermissionError(f"{who} may not {what} {url} ({error}); {ADVICE}")
