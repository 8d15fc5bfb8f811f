"""Passwords and signatures in URLs: taken out, added again, and hidden in text."""

import base64
import contextlib
import http.server
import threading
from collections.abc import Iterator

import fsspec
import pytest

from pipeline import storage
from pipeline.corpus.shards import find_shards
from pipeline.storage.urls import redacted, with_secrets, without_secrets

AWS = "X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA&X-Amz-Date=2026&X-Amz-Expires=60&X-Amz-Signature=f00d"
AZURE = "sv=2024-11-04&sr=b&sp=r&se=2026-12-01&sig=f00d"


@pytest.mark.parametrize(
    ("url", "clean", "secrets"),
    [
        (
            "https://me:s3cret@host:80/{000..099}.tar",
            "https://host:80/{000..099}.tar",
            {"https://host:80": "me:s3cret"},
        ),
        ("s3://AKIA:a/b+c@bucket/x.tar", "s3://bucket/x.tar", {"s3://bucket": "AKIA:a/b+c"}),
        ("sftp://me:s3cret@host/x.tar", "sftp://host/x.tar", {"sftp://host": "me:s3cret"}),
        ("zip://x.tar::https://me:s3cret@h/a.zip", "zip://x.tar::https://h/a.zip", {"https://h": "me:s3cret"}),
        (f"https://h/x.tar?versionId=3&{AWS}", "https://h/x.tar?versionId=3", {"https://h/x.tar?versionId=3": AWS}),
        (f"https://h/x.tar?{AZURE}", "https://h/x.tar", {"https://h/x.tar": AZURE}),
        ("https://h/x.tar?token=f00d&part=1", "https://h/x.tar?part=1", {"https://h/x.tar?part=1": "token=f00d"}),
    ],
)
def test_secrets_are_taken_out_of_a_url(url: str, clean: str, secrets: dict[str, str]):
    assert without_secrets(url) == (clean, secrets)


@pytest.mark.parametrize(
    "url",
    [
        "/photos/a:b@c.tar",
        "s3://bucket/a@b:c.tar",
        "s3://bucket/photo?token=1.tar",
        "https://host:8080/a@b:c",
        "https://host/get?key=a.tar&sort=1&se=2",
        "https://me@host/x",
        "a note about https",
    ],
)
def test_a_url_without_secrets_stays_as_it_is(url: str):
    assert without_secrets(url) == (url, {})
    assert redacted(f"{url} failed") == f"{url} failed" or "token=***" in redacted(url)


def test_the_signature_is_added_again_for_opening():
    clean, secrets = without_secrets(f"https://h/x.tar?versionId=3&{AWS}")
    assert with_secrets(clean, secrets) == (f"https://h/x.tar?versionId=3&{AWS}", {})


def test_a_login_becomes_an_option_of_the_file_system():
    assert with_secrets("s3://b/x", {"s3://b": "AKIA:a/b"}) == ("s3://b/x", {"key": "AKIA", "secret": "a/b"})
    login = {"username": "me", "password": "p@w"}
    assert with_secrets("sftp://h/x", {"sftp://h": "me:p%40w"}) == ("sftp://h/x", login)
    assert with_secrets("zip://x::sftp://h/a", {"sftp://h": "me:p%40w"}) == ("zip://x::sftp://h/a", {"sftp": login})


def test_secrets_in_text_are_hidden():
    text = f"cannot open 'https://me:s3cret@h/x' or s3://AKIA:a/b@bucket/x or https://h/y?{AWS}&a=1: 403"
    shown = redacted(text)
    assert not any(secret in shown for secret in ("s3cret", "AKIA", "a/b", "f00d"))
    assert "'https://***@h/x' or s3://***@bucket/x or https://h/y?X-Amz-Algorithm=AWS4" in shown
    assert shown.endswith("X-Amz-Signature=***&a=1: 403")


class Guarded(http.server.BaseHTTPRequestHandler):
    """Serves 8 bytes to those who know the password or the signature."""

    def do_GET(self) -> None:
        login = "Basic " + base64.b64encode(b"me:p@w").decode()
        allowed = self.headers.get("Authorization") == login or "sig=f00d" in self.path
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Length", "8")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"12345678")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """Host and port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@contextlib.contextmanager
def configured(secrets: dict[str, str]) -> Iterator[None]:
    before = dict(fsspec.config.conf)
    storage.configure({}, url_secrets=secrets)
    try:
        yield
    finally:
        fsspec.config.conf.clear()
        fsspec.config.conf.update(before)


@pytest.mark.parametrize("secret", ["http://me:p%40w@{}/x.tar", "http://{}/x.tar?sv=1&sig=f00d"])
def test_a_shard_is_read_with_its_secret_and_listed_without(server: str, secret: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(storage.CREATE_ONLY, raising=False)
    clean, secrets = without_secrets(secret.format(server))
    with configured(secrets):
        inputs = find_shards(clean)
        assert storage.open_stream(inputs.shards[0].url).read() == b"12345678"
    assert [shard.url for shard in inputs.shards] == [f"http://{server}/x.tar"]
    assert inputs.shards[0].num_bytes == 8
    assert "p%40w" not in inputs.to_json()
    assert "f00d" not in inputs.to_json()
