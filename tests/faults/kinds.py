"""The kinds of faults. Each function runs a trial, from the first command to verification, and reports the faults."""

import contextlib
import io
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from jobs.__main__ import main
from pipeline import storage
from tests.corpus import tar_bytes
from tests.faults import proxy
from tests.faults.cluster import wait_for
from tests.faults.corpus import NUM_SHARDS, Damage, Expected
from tests.faults.deadly import MARK
from tests.faults.lab import JOB_S, ROOT, Job, Lab, Trial

STALL_TIMEOUT_S = 10.0  # much longer than one image takes, even on a busy machine
COMMITS, MOMENT_S = 4, 0.1  # at most, until a kill; after two kills work must remain, even on an idle machine
QUICK = tuple(kind for kind in proxy.KINDS if kind not in (proxy.STALL, proxy.STALL_BODY))
SHORT_TIMEOUT = "storage.options.s3.config_kwargs.read_timeout=3"  # s, instead of 30 s per stall
MAX_STALLS = 3
FAULTS_PER_JOB = 2  # below pool.MAX_TRIES, so no shard may fail because of them


@dataclass
class Report:
    """The faults of a trial, and the state of its output.

    faults: kills or broken requests. reruns: jobs after the first. seconds: from a node's death to the next commit.
    """

    faults: int
    reruns: int = 0
    seconds: float | None = None
    damage: Damage | None = None  # None if no job finished
    verified: bool = False  # by `tokenmill verify --deep`

    def is_correct(self) -> bool:
        return self.verified and self.damage == Damage(0, 0, 0)


Kind = Callable[[Lab, Random], Report]


def run(lab: Lab, kind: str, seed: int) -> Report:
    """Runs one trial. Raises AssertionError if a job does not end or has an unexpected exit code."""
    try:
        return KINDS[kind](lab, Random(seed))
    finally:
        lab.end_jobs()


# -- kills --------------------------------------------------------------------------------------------------------


def kill_drivers(lab: Lab, rng: Random, own_ray: bool, everything: bool) -> Report:
    """Kills the driver, alone or with all its child processes, and reruns the same command until it finishes."""
    trial = lab.trial("driver", on_s3=rng.random() < 0.5)
    kills = rng.randint(1, FAULTS_PER_JOB)
    for _ in range(kills):
        job = trial.start(f"workers.count={rng.randint(1, 2)}", own_ray=own_ray)
        wait_for_a_moment(trial, job, rng)
        if everything:
            job.kill_everything()
        else:
            job.kill()
    return finished(trial, Report(kills, reruns=kills), trial.start())


def kill_workers(lab: Lab, rng: Random) -> Report:
    """Kills actors. The job must continue."""
    trial = lab.trial("worker", on_s3=rng.random() < 0.5)
    job = trial.start()
    for _ in range(FAULTS_PER_JOB):
        wait_for_a_moment(trial, job, rng)
        rng.choice(trial.wait(lab.cluster.job_workers, job, "an actor")).kill()
    return finished(trial, Report(FAULTS_PER_JOB), job)


def kill_a_node(lab: Lab, rng: Random, workers: int) -> Report:
    """Kills a raylet and all its workers. The job must continue on another node. With one worker, kills its node."""
    trial = lab.trial("node", on_s3=rng.random() < 0.5)
    job = trial.start(f"workers.count={workers}")
    wait_for_a_moment(trial, job, rng, first=1)
    node = rng.choice(trial.wait(lab.cluster.nodes_at_work, job, "a node at work"))
    lab.cluster.kill(node)
    done, killed_at = trial.num_committed(), time.monotonic()
    try:
        trial.wait_for_commits(done + 1, job)
        return finished(trial, Report(1, seconds=time.monotonic() - killed_at if workers == 1 else None), job)
    finally:
        lab.cluster.start_node()


def hang_a_worker(lab: Lab, rng: Random) -> Report:
    """Suspends the process of an actor. The watchdog must kill it, and another actor must get its shards."""
    trial = lab.trial("hang", f"workers.stall_timeout_s={STALL_TIMEOUT_S:g}", on_s3=rng.random() < 0.5)
    job = trial.start()
    wait_for_a_moment(trial, job, rng, first=1)
    stopped = rng.choice(trial.wait(lab.cluster.job_workers, job, "an actor"))
    stopped.suspend()
    report = finished(trial, Report(1), job)
    wait_for(lambda: not stopped.is_running(), JOB_S, f"the end of the stopped actor {stopped.pid}")
    return report


def kill_by_poison(lab: Lab, rng: Random) -> Report:
    """A shard kills every worker that reads it. It must fail after three attempts, with a reason, and the other shards
    must be done. Then the shard is repaired.
    """
    copy = deadly_copy(lab)
    poison = lab.folder / f"poison-{rng.getrandbits(32):08x}.tar"
    poison.write_bytes(tar_bytes([("a.txt", b"not an image"), ("b.jpg", MARK)]))
    trial = lab.trial("poison", f"tokenizer={copy}/frozen", f"data.shards=[{lab.corpus},{poison}]")
    job = trial.start(cwd=copy)
    assert job.wait() == 3, job.log_tail()
    assert trial.damage() == Damage(0, 0, 0)
    printed = status(trial)
    assert "24 done, 1 left (1 failed last time)" in printed, printed
    assert f"{poison}: its worker died" in printed, printed

    intact = lab.folder / f"corpus/photos-{NUM_SHARDS - 1:02d}.tar"
    shutil.copy(intact, poison)
    repaired = {(poison.name, index): row for (name, index), row in lab.expected.rows.items() if name == intact.name}
    trial.expected = Expected({**lab.expected.rows, **repaired})
    return finished(trial, Report(3, reruns=1), trial.start(cwd=copy))


def deadly_copy(lab: Lab) -> Path:
    """A copy of the program with an additional modality, and the lab's tokenizer changed to that modality."""
    copy = lab.folder / "program"
    if not copy.exists():
        for layer in ("jobs", "pipeline", "tokenizer"):
            shutil.copytree(ROOT / layer, copy / layer, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("deadly.py"), copy / "tokenizer/modalities")
        subprocess.run([sys.executable, "-c", CHANGE_MODALITY, lab.tokenizer, "frozen"], cwd=copy, check=True)
    return copy


CHANGE_MODALITY = """
import sys
from tokenizer.autoencoder import Autoencoder
from tokenizer.tokenizer import Tokenizer
old = Tokenizer.from_pretrained(sys.argv[1]).autoencoder
new = Autoencoder({**old.settings, "modality": "deadly"}).eval()
new.load_state_dict(old.state_dict())
Tokenizer(new, {}).save_pretrained(sys.argv[2])
"""


# -- storage ------------------------------------------------------------------------------------------------------


def break_requests(lab: Lab, rng: Random, kinds: tuple[str, ...], limit: int = 10**9) -> Report:
    """10 to 30 % of S3 requests fail in these ways. A job may fail if retries do not help; a rerun has no faults."""
    trial, rate = lab.trial("storage", SHORT_TIMEOUT, on_s3=True), rng.choice((0.1, 0.2, 0.3))
    with faults(lab, proxy.seeded(rng.getrandbits(32), dict.fromkeys(kinds, rate / len(kinds)), limit)) as injected:
        code = trial.start().wait()
    assert injected, f"no fault of {kinds} was injected"
    return ended(trial, Report(injected.total()), code)


def break_everything(lab: Lab, rng: Random) -> Report:
    """S3 fails in every quick way while an actor and then the driver are killed, and also during the rerun."""
    trial = lab.trial("everything", on_s3=True)
    with faults(lab, proxy.seeded(rng.getrandbits(32), dict.fromkeys(QUICK, 0.02))) as injected:
        job = trial.start()
        wait_for_a_moment(trial, job, rng, first=1)
        rng.choice(trial.wait(lab.cluster.job_workers, job, "an actor")).kill()
        wait_for_a_moment(trial, job, rng)
        job.kill()
        code = trial.start().wait()
    assert injected, "no fault of S3 was injected"
    return ended(trial, Report(injected.total() + 2, reruns=1), code)


@contextlib.contextmanager
def faults(lab: Lab, plan: proxy.Plan) -> Iterator[Counter[str]]:
    """Makes requests fail by the plan. Yields the number of faults by kind, which is filled at the end."""
    injected: Counter[str] = Counter()
    before, lab.proxy.plan = lab.proxy.injected.copy(), plan
    try:
        yield injected
    finally:
        lab.proxy.plan = proxy.no_faults
        injected.update(lab.proxy.injected - before)


# -- other drivers and leftover files ---------------------------------------------------------------------------


def race(lab: Lab, rng: Random, on_s3: bool) -> Report:
    """Runs the same command twice in parallel. Both must succeed, with one set of rows."""
    trial = lab.trial("race", "workers.count=1", on_s3=on_s3)
    jobs = [trial.start(), trial.start()]
    codes = [job.wait() for job in jobs]
    assert codes == [0, 0], f"{codes}; {jobs[0].log_tail()}\n{jobs[1].log_tail()}"
    return proven(trial, Report(1))


def leave_torn_files(lab: Lab, rng: Random) -> Report:
    """Files that killed runs may leave: without an entry, and truncated, empty, intact, or of another tokenizer."""
    trial = lab.trial("torn")
    output = Path(shutil.copytree(lab.folder / "undisturbed", trial.output))
    entries = rng.sample(sorted((output / "manifest").iterdir()), 8)
    for entry, modify in zip(entries, [cut, empty, keep, change_tokenizer] * 2, strict=True):
        entry.unlink()
        for folder in ("tokens", "quarantine"):
            for file in (output / folder).glob(f"{entry.stem}.parquet"):
                modify(file)
    for folder in ("tokens", "manifest"):
        shutil.copy(output / "dataset.json", output / folder / f"{storage.TEMPORARY}left")
    return finished(trial, Report(len(entries), reruns=1), trial.start())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def keep(file: Path) -> None:
    assert pq.read_metadata(file).num_columns


def change_tokenizer(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), b"tokenizer_id": b"other"}), file)


# -- parts of the trials ------------------------------------------------------------------------------------------


def wait_for_a_moment(trial: Trial, job: Job, rng: Random, first: int = 0) -> None:
    """Waits until the output exists and some more shards are done, and then for a random time."""
    trial.wait(lambda: storage.exists(storage.join(trial.output, "dataset.json")), job, "its output")
    trial.wait_for_commits(trial.num_committed() + rng.randint(first, COMMITS), job)
    time.sleep(rng.uniform(0, MOMENT_S))  # the moment is random, so there is no condition to wait for


def finished(trial: Trial, report: Report, job: Job) -> Report:
    """Waits for exit code 0, and returns the report with the state of the output."""
    code = job.wait()
    assert code == 0, f"exit code {code}; {job.log_tail()}"
    return proven(trial, report)


def ended(trial: Trial, report: Report, code: int) -> Report:
    """Like `finished`, but the job may also have ended as incomplete; then it is run again."""
    assert code in (0, 3), f"exit code {code}; {trial.jobs[-1].log_tail()}"
    if code == 0:
        return proven(trial, report)
    return finished(trial, replace(report, reruns=report.reruns + 1), trial.start())


def proven(trial: Trial, report: Report) -> Report:
    """The report with the damage that we find in the output and the result of `verify`."""
    verified = main(["verify", f"output={trial.output}", "verify.deep=true"]) == 0
    return replace(report, damage=trial.damage(), verified=verified)


def status(trial: Trial) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["status", f"output={trial.output}"]) == 0
    return printed.getvalue()


KINDS: dict[str, Kind] = {
    "driver killed": partial(kill_drivers, own_ray=False, everything=False),
    "driver killed, its Ray left to die": partial(kill_drivers, own_ray=True, everything=False),
    "driver and its Ray killed": partial(kill_drivers, own_ray=True, everything=True),
    "workers killed": kill_workers,
    "node killed, another at work": partial(kill_a_node, workers=2),
    "node killed, with all workers": partial(kill_a_node, workers=1),
    "worker hung": hang_a_worker,
    "poison shard": kill_by_poison,
    "two drivers, on disk": partial(race, on_s3=False),
    "two drivers, on S3": partial(race, on_s3=True),
    "torn and orphaned files": leave_torn_files,
    "S3: 500": partial(break_requests, kinds=(proxy.ERROR_500,)),
    "S3: 503 SlowDown": partial(break_requests, kinds=(proxy.SLOW_DOWN,)),
    "S3: reset before the request": partial(break_requests, kinds=(proxy.RESET_BEFORE,)),
    "S3: answer lost": partial(break_requests, kinds=(proxy.RESET_AFTER,)),
    "S3: body truncated": partial(break_requests, kinds=(proxy.TRUNCATE,)),
    "S3: stalled": partial(break_requests, kinds=(proxy.STALL, proxy.STALL_BODY), limit=MAX_STALLS),
    "S3: every quick fault": partial(break_requests, kinds=QUICK),
    "S3 faults, worker and driver killed": break_everything,
}
