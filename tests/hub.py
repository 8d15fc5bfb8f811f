"""A server of the part of the Hugging Face Hub's protocol that a download needs, over models in a folder."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class _Handler(BaseHTTPRequestHandler):
    models: Path  # ORG/NAME/files
    token = ""  # if set, requests need it
    asked: list[str]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            return self._describe("/".join(parts[2:4]), parts[5], with_body)
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            return self._list(self.models.joinpath(*parts[2:4]))
        if parts[2:3] == ["resolve"] and parts[3] in REVISIONS:
            return self._file(self.models.joinpath(*parts[:2], *parts[4:]), with_body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _describe(self, name: str, revision: str, with_body: bool) -> None:
        folder = self.models / name
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in REVISIONS:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "tags": []}
        return self._send(200, json.dumps(about).encode() if with_body else b"", {"Content-Type": "application/json"})

    def _list(self, folder: Path) -> None:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        about = [
            {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": "0"} for f in files
        ]
        return self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _file(self, file: Path, with_body: bool) -> None:
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, data, about, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def start_hub(models: Path, token: str = "") -> Iterator[tuple[str, list[str]]]:
    """The address of a running server on this machine, and the list of paths that were asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"models": models, "token": token, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
