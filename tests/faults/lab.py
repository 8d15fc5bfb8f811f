"""The lab for trials: a cluster, an S3 server behind a proxy that injects faults, a corpus on disk and on S3."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import ray  # noqa: F401  puts the psutil that it carries on the path

import psutil  # isort: skip
from pipeline import storage
from tests.faults.cluster import Cluster, start_cluster, wait_for, without_ray
from tests.faults.corpus import Damage, Expected, undisturbed, write_corpus
from tests.faults.proxy import Proxy, start_proxy
from tests.jobs.helpers import save_tiny_tokenizer
from tests.s3 import S3Server

R = TypeVar("R")
ROOT = Path(__file__).parents[2]
JOB_S = 300  # a job that takes longer counts as hung


class Job:
    """`tokenmill tokenize` in a separate process."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path, cwd: Path = ROOT):
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", "tokenize", *arguments],
                cwd=cwd,
                env=environment,
                start_new_session=True,
                stdout=file,
                stderr=file,
            )

    def wait(self) -> int:
        """Waits for the exit code. Raises AssertionError with the log if the job runs longer than JOB_S."""
        try:
            return self.process.wait(JOB_S)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"no end after {JOB_S} s; {self.log_tail()}") from None

    def kill(self) -> None:
        """Sends SIGKILL only to the driver. A Ray that it started has to notice."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_everything(self) -> None:
        """Kills the whole session: the driver and all that it started, also Ray."""
        if self.process.returncode is not None and psutil.pid_exists(self.process.pid):
            return  # the session is gone, and Linux has reused its number
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid:
                    process.kill()
        self.process.wait()

    def log_tail(self) -> str:
        return f"its log ends:\n{self.log.read_text(errors='replace')[-3000:]}"


@dataclass
class Lab:
    """Shared by all trials. The cluster accesses S3 through the proxy, and this process directly."""

    folder: Path
    server: S3Server
    proxy: Proxy
    cluster: Cluster
    tokenizer: str
    corpus: str
    expected: Expected
    jobs: list[Job] = field(default_factory=list)
    _count: Iterator[int] = field(default_factory=itertools.count)

    def trial(self, name: str, *changes: str, on_s3: bool = False) -> "Trial":
        """changes: KEY=VALUE, in addition to the settings of all trials."""
        number = f"{name}-{next(self._count):03d}"
        place = f"{self.server.url}/{self.folder.name}" if on_s3 else str(self.folder)
        arguments = [
            f"tokenizer={place}/tokenizer",
            f"data.shards={place}/corpus/photos-*.tar",
            f"output={place}/{number}",
            "tokens.batch_budget=0.001",  # one image per batch: slow enough to kill in the middle of a shard
            "tokens.max_bad_fraction=1",
            "workers.cpus=1",
            *changes,
        ]
        return Trial(self, f"{place}/{number}", arguments, self.folder / number, self.expected)

    def end_jobs(self) -> None:
        """Kills remaining processes, such as the Ray of a driver that was killed."""
        while self.jobs:
            self.jobs.pop().kill_everything()


@dataclass
class Trial:
    """One output that is written under faults, by one job or several jobs in sequence."""

    lab: Lab
    output: str
    arguments: list[str]  # of the command line
    logs: Path  # prefix; a number and .log are added
    expected: Expected
    jobs: list[Job] = field(default_factory=list)

    def start(self, *changes: str, own_ray: bool = False, cwd: Path = ROOT) -> Job:
        """Starts the command, on the cluster of the lab or with its own local Ray."""
        environment = self.lab.cluster.client_environment()
        if own_ray:
            environment = without_ray(environment)
        log = self.logs.with_suffix(f".{len(self.jobs)}.log")
        job = Job([*self.arguments, *changes], environment, log, cwd)
        self.jobs.append(job)
        self.lab.jobs.append(job)
        return job

    def num_committed(self) -> int:
        return len(storage.list_files(storage.join(self.output, "manifest")))

    def wait_for_commits(self, count: int, job: Job) -> None:
        """Waits until the output has that many commits. Raises AssertionError with the log if the job ends first."""
        self.wait(lambda: self.num_committed() >= count, job, f"commit {count} of {self.output}")

    def wait(self, condition: Callable[[], R], job: Job, what: str) -> R:
        """Waits for a true result and returns it. Raises AssertionError with the log if the job ends first."""
        ended, given = False, condition()

        def is_over() -> bool:
            nonlocal ended, given
            ended, given = job.process.poll() is not None, condition()
            return bool(given) or ended

        wait_for(is_over, JOB_S, what)
        assert given, f"the job ended before {what}; {job.log_tail()}"
        return given

    def damage(self) -> Damage:
        return self.expected.damage(self.output)


@contextlib.contextmanager
def open_lab(folder: Path, server: S3Server) -> Iterator[Lab]:
    """This process must already use `server`, through S3Server.use or its environment."""
    tokenizer = save_tiny_tokenizer(folder / "tokenizer")
    corpus = write_corpus(folder / "corpus")
    for place in (folder / "tokenizer", folder / "corpus"):
        storage.upload(place, f"{server.url}/{folder.name}/{place.name}")  # a name of this lab's own
    expected = undisturbed(corpus, tokenizer, folder / "undisturbed")
    with start_proxy(server.port) as proxy, start_cluster(server.environment(endpoint=proxy.endpoint)) as cluster:
        yield Lab(folder, server, proxy, cluster, tokenizer, corpus, expected)
