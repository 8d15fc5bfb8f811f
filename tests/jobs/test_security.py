"""Attacks: strangers who want to use our Ray, and secrets that might be left in files, messages and process lists."""

import base64
import contextlib
import functools
import http.server
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

import psutil  # isort: skip
from jobs.actors.cluster import private_folder
from pipeline import storage
from tests.faults.cluster import start_cluster, without_ray
from tests.jobs.helpers import SAMPLES, TINY_NET, save_tiny_tokenizer
from tests.s3 import S3Server

STRANGER = """
import sys, ray
address, mark = sys.argv[1:]
ray.init(address=address, logging_level=50, log_to_driver=False)
@ray.remote
def run(mark):
    open(mark, "w").close()
ray.get(run.remote(mark))
"""
REFUSED_S = 30  # Ray's client asks again for minutes
WAIT_S = 400
SETTINGS = {
    "model": {"net": {**TINY_NET, "patch_size": 4}},
    "quantizer": {"name": "vp_vae", "codebook_size": 16, "dim": 2},
    "train": {"steps": 3, "batch_size": 4, "crop_size": 32, "log_every": 1, "checkpoint_every": 2},
}


# -- strangers ----------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_only_who_knows_the_token_runs_code_in_our_ray(tmp_path: Path):
    port = ray.get_runtime_context().gcs_address.rsplit(":", 1)[1]
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    guess = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * len(token["RAY_AUTH_TOKEN"])}
    assert ran_by([(token, f"127.0.0.1:{port}")], tmp_path) == [True]
    strangers = [({}, outer_address()), ({}, "127.0.0.1"), ({"RAY_AUTH_MODE": "disabled"}, "127.0.0.1")]
    attacks = [(known, f"{address}:{port}") for known, address in [*strangers, (guess, "127.0.0.1")]]
    assert ran_by(attacks, tmp_path) == [False] * 4


def ran_by(attacks: list[tuple[dict[str, str], str]], folder: Path) -> list[bool]:
    """Which processes could run a function in the Ray at that address, knowing only these variables."""
    marks = [folder / f"ran-{len(attacks)}-{i}" for i in range(len(attacks))]
    # a driver looks for the node at its own address; with this variable that is loopback
    alone = {**without_ray(os.environ), "HOME": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STRANGER, address, str(mark)],
            env={**alone, **known},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for (known, address), mark in zip(attacks, marks, strict=True)
    ]
    deadline = time.monotonic() + REFUSED_S
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.wait()
    return [mark.exists() for mark in marks]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_our_ray_listens_on_loopback_only():
    found = listeners(psutil.Process())
    assert len({port for _, port in found}) >= 6  # the driver, GCS, raylet, agents
    assert {address for address, _ in found} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    for _, port in found:
        with socket.socket() as probe:
            assert probe.connect_ex((outer_address(), port)) != 0 or outer_address() == "127.0.0.1"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_token_is_in_no_file_and_no_command_line():
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    logs = private_folder() / "ray" / ray.get_runtime_context().get_session_name()
    assert list(logs.rglob("*.log"))
    assert files_with(token, logs) == []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        assert token not in " ".join(process.cmdline())


def test_the_folder_of_our_ray_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="mode 0700"):
        private_folder()


def test_a_folder_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"tokenmill-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="only you can enter"):
        private_folder()


# -- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize("where", ["local", "cluster"])
def test_a_secret_of_s3_stays_out_of_files_messages_and_process_lists(
    where: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    s3.use(monkeypatch)
    place = f"{s3.url}/secrets-{where}"
    storage.upload(SAMPLES / "heldout", f"{place}/in")
    secret = s3.read_write[1]
    options = {"key": s3.read_write[0], "secret": secret, "endpoint_url": s3.endpoint}
    tokenizer = save_tiny_tokenizer(tmp_path / "tokenizer")
    settings: dict[str, Any] = {
        **SETTINGS,
        "data": {"shards": f"{place}/in/*.tar"},
        "storage": {"options": {"s3": options}},
    }
    settings |= {"run": f"{place}/run", "output": f"{place}/tokens", "tokenizer": tokenizer}
    settings |= {"workers": {"count": 2 if where == "local" else 1, "cpus": 1}}
    file = tmp_path / "secret.yaml"
    file.touch(0o600)
    file.write_text(yaml.safe_dump(settings))
    with ray_of(where) as (environment, logs):
        for command in ("tokenize", "train"):
            done = watched([command, str(file)], environment, tmp_path / "log")
            assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
            assert secret not in (tmp_path / "log").read_text()
            assert [line for line in done.command_lines if secret in line] == []
            if where == "local":
                assert done.addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}
        assert list(logs.rglob("*.log")), "no logs of Ray: this test would pass without looking at any"
        assert files_with(secret, logs) == []
    for url in storage.glob(f"{place}/**"):
        assert secret.encode() not in storage.read(url.url), url.url


class _WithPassword(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to a user and a password."""

    def send_head(self) -> Any:
        expected = "Basic " + base64.b64encode(b"me:passw0rd-of-a-url").decode()
        if self.headers.get("Authorization") == expected:
            return super().send_head()
        self.send_error(401)
        return None

    def log_message(self, *_: object) -> None:
        """Keeps the output of the tests clean."""


@pytest.mark.ray
def test_a_password_in_a_url_reaches_the_workers_and_no_file_or_message(tmp_path: Path):
    handler = functools.partial(_WithPassword, directory=str(SAMPLES / "heldout"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_address[1]}"
    settings: dict[str, Any] = {
        "data": {"shards": f"http://me:passw0rd-of-a-url@{host}/photos-00{{0..1}}.tar"},
        "output": f"{tmp_path}/tokens",
        "tokenizer": save_tiny_tokenizer(tmp_path / "tokenizer"),
    }
    file = tmp_path / "config/secret.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(settings))
    with contextlib.closing(server.socket), ray_of("local") as (environment, logs):
        done = watched(["tokenize", str(file)], environment, tmp_path / "log")
        assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
        assert list(logs.rglob("*.log")), "no logs of Ray: this test would pass without looking at any"
        assert files_with("passw0rd-of-a-url", logs) == []
        server.shutdown()
    assert [line for line in done.command_lines if "passw0rd" in line] == []
    assert "tokenize: done" in (tmp_path / "log").read_text()
    assert files_with(f"http://{host}/photos-000.tar", tmp_path / "tokens/inputs")
    assert files_with("passw0rd-of-a-url", tmp_path) == [str(file)]


@contextlib.contextmanager
def ray_of(where: str) -> Iterator[tuple[dict[str, str], Path]]:
    """Environment variables of a command without any secret, and the folder of the logs of the Ray that it uses."""
    alone = {name: value for name, value in without_ray(os.environ).items() if not name.startswith(("AWS_", "FSSPEC_"))}
    if where == "local":
        with tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            yield {**alone, "TMPDIR": folder}, Path(folder)
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - alone.keys():
            patch.delenv(name)
        with start_cluster({}, num_nodes=2) as cluster:
            yield cluster.client_environment(), cluster.folder


class Watched:
    """A command, and what was seen of its processes."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.command_lines: set[str] = set()
        self.addresses: set[str] = set()


def watched(arguments: list[str], environment: dict[str, str], log: Path) -> Watched:
    """Runs `tokenmill ...`, and looks at all processes of the machine and at the ports of its own."""
    seen = Watched()
    with log.open("wb") as out:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + WAIT_S
    try:
        while driver.poll() is None and time.monotonic() < deadline:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    seen.command_lines.add(" ".join(process.cmdline()))
            with contextlib.suppress(psutil.Error):
                seen.addresses |= {address for address, _ in listeners(psutil.Process(driver.pid))}
            time.sleep(0.3)
    finally:
        driver.kill()
        seen.returncode = driver.wait()
    return seen


# -- what the tests look at ---------------------------------------------------------------------------------------


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses and ports on which the process and those below it listen."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {(c.laddr.ip, c.laddr.port) for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def outer_address() -> str:
    """An address of this machine that others can reach; loopback if there is none."""
    for found in psutil.net_if_addrs().values():
        for one in found:
            if one.family == socket.AF_INET and not re.match(r"127\.|169\.254\.", one.address):
                return one.address
    return "127.0.0.1"


def files_with(text: str, *folders: Path) -> list[str]:
    found = []
    for folder in folders:
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file() and text.encode() in file.read_bytes():
                    found.append(str(file))
    return found
