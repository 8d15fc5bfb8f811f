"""A real S3 server for tests: SeaweedFS (`weed mini`) on its own loopback ports, with two keys and a bucket."""

import contextlib
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import s3fs

READ_WRITE = ("test-read-write", "secret-of-read-write")
READ_ONLY = ("test-read-only", "secret-of-read-only")
BUCKET = "test-bucket"
# Ray uses the ports below for its workers. SeaweedFS uses the ports 10000 above for gRPC, which must stay below 32768,
# where the system's range for outgoing connections starts.
FIRST_PORT, LAST_PORT, PORTS_EACH = 20_000, 22_700, 10
GRPC_OFFSET = 10_000
START_S = 60
WEED = Path(sysconfig.get_path("scripts")) / "weed"
KEYS = """{"identities": [
 {"name": "rw", "credentials": [{"accessKey": "%s", "secretKey": "%s"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
 {"name": "ro", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Read", "List"]}
]}"""


@dataclass
class S3Server:
    """`weed mini` with its data in `folder`. `kill` and `start` imitate a crash and a restart; the data remain."""

    folder: Path
    port: int  # the first port of the server's range; S3 listens on it
    read_write: tuple[str, str] = READ_WRITE  # access key, secret key
    read_only: tuple[str, str] = READ_ONLY
    bucket: str = BUCKET
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """URL of the bucket. Each test uses its own folder in it."""
        return f"s3://{self.bucket}"

    def environment(self, read_only: bool = False, endpoint: str | None = None) -> dict[str, str]:
        """Environment variables for S3 clients and child processes. endpoint: of a proxy in front of the server."""
        access, secret = self.read_only if read_only else self.read_write
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def use(self, patch: pytest.MonkeyPatch, read_only: bool = False, endpoint: str | None = None) -> None:
        """Makes this process and its child processes use the server until `patch` is undone."""
        for name, value in self.environment(read_only, endpoint).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # existing clients hold the old keys

    def start(self) -> None:
        """Returns when the server responds. Raises RuntimeError with its log if it exits or START_S have passed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "keys.json").write_text(KEYS % (*self.read_write, *self.read_only))
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.process = process
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = (self.folder / "log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"no S3 server at {self.endpoint} within {START_S} s; its log ends:\n{tail}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL: like a crash. It is also faster than SIGTERM (3 s), and nobody needs the data after a test."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _command(self) -> list[str]:
        ports = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        return [
            *(str(WEED), "mini", f"-dir={data}", f"-s3.config={self.folder / 'keys.json'}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{name}={self.port + i}" for i, name in enumerate(ports)),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            *("-s3.iam=false", "-master.telemetry=false"),
        ]

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def start_s3(folder: Path) -> Iterator[S3Server]:
    """A running server with an empty bucket. It is killed at the end."""
    with _claimed_ports() as port:
        server = S3Server(folder, port)
        try:
            server.start()
            access, secret = server.read_write
            s3fs.S3FileSystem(key=access, secret=secret, endpoint_url=server.endpoint, skip_instance_cache=True).mkdir(
                server.bucket
            )
            yield server
        finally:
            server.kill()
            for own in _all_ports(port):
                for left in Path("/tmp").glob(f"seaweedfs-*-{own}.sock"):
                    left.unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed_ports() -> Iterator[int]:
    """The first of PORTS_EACH - 1 free ports. Holds the port before it, so that no other test process takes them."""
    for claim in range(FIRST_PORT, LAST_PORT, PORTS_EACH):
        with socket.socket() as held:
            if _bind(held, claim) and all(_is_free(port) for port in _all_ports(claim + 1)):
                yield claim + 1
                return
    raise RuntimeError(f"no {PORTS_EACH} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def _all_ports(first: int) -> list[int]:
    own = range(first, first + PORTS_EACH - 1)
    return [*own, *(port + GRPC_OFFSET for port in own)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore closed connections in TIME_WAIT
        return _bind(probe, port)


def _bind(to_bind: socket.socket, port: int) -> bool:
    try:
        to_bind.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True
