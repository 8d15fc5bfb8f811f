"""The S3 policies of deploy/s3 allow every request that our code makes, by the operations that it really sends.

The test server does not enforce policies, so each request is compared with the policy here.
"""

import fnmatch
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiobotocore.client
import pytest

from jobs.__main__ import main
from pipeline import storage
from pipeline.tokens import TokenDataset
from tests.corpus import write_corpus
from tests.jobs.helpers import save_tiny_tokenizer, tokenize_without_ray
from tests.s3 import S3Server

POLICIES = Path(__file__).parent.parent.parent / "deploy/s3"
ACTIONS = {  # which permission an operation needs, by Amazon's list of actions
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The S3 operations of this process, with their parameters."""
    found: list[tuple[str, dict[str, Any]]] = []
    call = aiobotocore.client.AioBaseClient._make_api_call

    async def record(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        found.append((operation, parameters))
        return await call(self, operation, parameters)

    monkeypatch.setattr(aiobotocore.client.AioBaseClient, "_make_api_call", record)
    return found


@pytest.fixture
def root(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.use(monkeypatch)
    return f"{s3.url}/{uuid.uuid4().hex}"


def resources(operation: str, parameters: dict[str, Any], root: str) -> Iterator[str]:
    """The resources of an operation as in a policy: the folder of this test is its bucket."""
    folder = root.split("/", 3)[3]
    keys = [parameters.get("Key"), *(one["Key"] for one in parameters.get("Delete", {}).get("Objects", []))]
    if ACTIONS[operation] == "s3:ListBucket":
        yield "arn:aws:s3:::BUCKET"
        return
    for key in filter(None, keys):
        assert key.startswith(folder + "/"), f"{operation} {key} is outside of the test's folder"
        yield f"arn:aws:s3:::BUCKET/{key.removeprefix(folder + '/')}"


def refused(name: str, sent: list[tuple[str, dict[str, Any]]], root: str) -> list[str]:
    """The requests that a policy does not allow."""
    statements = json.loads((POLICIES / f"{name}.json").read_text())["Statement"]
    found = []
    for operation, parameters in sent:
        for resource in resources(operation, parameters, root):
            if not any(_allows(statement, ACTIONS[operation], resource) for statement in statements):
                found.append(f"{operation} {resource}")
    return found


def _allows(statement: dict[str, Any], action: str, resource: str) -> bool:
    wanted = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
    return action in statement["Action"] and any(fnmatch.fnmatchcase(resource, pattern) for pattern in wanted)


def test_each_policy_allows_what_its_commands_do(root: str, sent: list, tmp_path: Path):
    tokenizer = save_tiny_tokenizer(tmp_path / "tiny")
    storage.upload(tokenizer, f"{root}/runs/demo/tokenizers/tiny")
    assert not refused("trainer", sent, root)
    assert refused("reader", sent, root)
    sent.clear()
    for shard in write_corpus(tmp_path / "in", (3, 2)):
        storage.replace(f"{root}/photos/{Path(shard.url).name}", Path(shard.url).read_bytes())
    assert refused("writer", sent, root), "the input is for reading"
    sent.clear()
    place = [f"output={root}/tokens", f"tokenizer={root}/runs/demo/tokenizers/tiny"]
    tokenize_without_ray(f"{root}/photos/*.tar", tokenizer, f"{root}/tokens")
    assert "PutObject" in {operation for operation, _ in sent}
    assert not refused("writer", sent, root)
    sent.clear()
    assert len(list(TokenDataset(f"{root}/tokens"))) == 5
    assert main(["verify", place[0]]) == 0
    assert main(["decode", *place, f"decode.output={tmp_path}/decoded"]) == 0
    assert sent
    assert not refused("reader", sent, root)
