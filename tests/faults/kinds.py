"""The kinds of faults. Each is a trial from the first command to the proof, and tells what it did to it."""

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

STALL_TIMEOUT_S = 10.0  # far above what a picture takes here, on a busy machine too
COMMITS, MOMENT_S = 4, 0.1  # until a kill, at most; two of them leave enough to do on an idle machine too
QUICK = tuple(kind for kind in proxy.KINDS if kind not in (proxy.STALL, proxy.STALL_BODY))
SHORT_TIMEOUT = "storage.options.s3.config_kwargs.read_timeout=3"  # s, instead of 30 for each stall
MAX_STALLS = 3
FAULTS_PER_JOB = 2  # below pool.MAX_TRIES, so that no shard may be given up for them


@dataclass
class Report:
    """What was done to a trial's jobs, and what became of its output.

    faults: kills, or broken requests; reruns: jobs after the first; seconds: from a node's death until the next commit.
    """

    faults: int
    reruns: int = 0
    seconds: float | None = None
    damage: Damage | None = None  # None where no job came to its end
    verified: bool = False  # by `tokenmill verify deep=true`

    def is_sound(self) -> bool:
        return self.verified and self.damage == Damage(0, 0, 0)


Kind = Callable[[Lab, Random], Report]


def run(lab: Lab, kind: str, seed: int) -> Report:
    """One trial. Raises AssertionError if a job does not end, or not with the exit code that it should."""
    try:
        return KINDS[kind](lab, Random(seed))
    finally:
        lab.end_jobs()


# -- kills --------------------------------------------------------------------------------------------------------


def kill_drivers(lab: Lab, rng: Random, own_ray: bool, everything: bool) -> Report:
    """The driver dies, alone or with all that it started; the same command again, until it may finish."""
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
    """Actors die; the job goes on."""
    trial = lab.trial("worker", on_s3=rng.random() < 0.5)
    job = trial.start()
    for _ in range(FAULTS_PER_JOB):
        wait_for_a_moment(trial, job, rng)
        rng.choice(trial.wait(lab.cluster.job_workers, job, "an actor")).kill()
    return finished(trial, Report(FAULTS_PER_JOB), job)


def kill_a_node(lab: Lab, rng: Random, workers: int) -> Report:
    """A raylet and all its workers die; the job goes on elsewhere. With one worker it is that worker's node."""
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
    """An actor's process stops without dying; the watchdog must end it, and give its shards to another."""
    trial = lab.trial("hang", f"workers.stall_timeout_s={STALL_TIMEOUT_S:g}", on_s3=rng.random() < 0.5)
    job = trial.start()
    wait_for_a_moment(trial, job, rng, first=1)
    stopped = rng.choice(trial.wait(lab.cluster.job_workers, job, "an actor"))
    stopped.suspend()
    report = finished(trial, Report(1), job)
    wait_for(lambda: not stopped.is_running(), JOB_S, f"the end of the stopped actor {stopped.pid}")
    return report


def kill_by_poison(lab: Lab, rng: Random) -> Report:
    """A shard kills whoever reads it: given up after three tries with its reason, and all else done. Then mended."""
    copy = deadly_copy(lab)
    poison = lab.folder / f"poison-{rng.getrandbits(32):08x}.tar"
    poison.write_bytes(tar_bytes([("a.txt", b"no picture"), ("b.jpg", MARK)]))
    trial = lab.trial("poison", f"tokenizer={copy}/frozen", f"data.shards=[{lab.corpus},{poison}]")
    job = trial.start(cwd=copy)
    assert job.wait() == 3, job.told()
    assert trial.damage() == Damage(0, 0, 0)
    told = status(trial)
    assert "24 done, 1 left, 1 of them failed" in told, told
    assert f"{poison}: its worker died" in told, told

    sound = lab.folder / f"corpus/photos-{NUM_SHARDS - 1:02d}.tar"
    shutil.copy(sound, poison)
    mended = {(poison.name, index): row for (name, index), row in lab.expected.rows.items() if name == sound.name}
    trial.expected = Expected({**lab.expected.rows, **mended})
    return finished(trial, Report(3, reruns=1), trial.start(cwd=copy))


def deadly_copy(lab: Lab) -> Path:
    """A copy of the program with one more modality, and the lab's tokenizer changed to that: same codes and weights."""
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
    """S3 fails in these ways at a rate of 10 to 30 %. A job out of patience may say so; it then ends without faults."""
    trial, rate = lab.trial("storage", SHORT_TIMEOUT, on_s3=True), rng.choice((0.1, 0.2, 0.3))
    with faults(lab, proxy.seeded(rng.getrandbits(32), dict.fromkeys(kinds, rate / len(kinds)), limit)) as injected:
        code = trial.start().wait()
    assert injected, f"no fault of {kinds} came to pass"
    return ended(trial, Report(injected.total()), code)


def break_everything(lab: Lab, rng: Random) -> Report:
    """S3 fails in every quick way while first an actor, then the driver dies; and again while the rerun is at work."""
    trial = lab.trial("everything", on_s3=True)
    with faults(lab, proxy.seeded(rng.getrandbits(32), dict.fromkeys(QUICK, 0.02))) as injected:
        job = trial.start()
        wait_for_a_moment(trial, job, rng, first=1)
        rng.choice(trial.wait(lab.cluster.job_workers, job, "an actor")).kill()
        wait_for_a_moment(trial, job, rng)
        job.kill()
        code = trial.start().wait()
    assert injected, "no fault of S3 came to pass"
    return ended(trial, Report(injected.total() + 2, reruns=1), code)


@contextlib.contextmanager
def faults(lab: Lab, plan: proxy.Plan) -> Iterator[Counter[str]]:
    """Requests fail by the plan; gives a count of the faults, which is filled in the end."""
    injected: Counter[str] = Counter()
    before, lab.proxy.plan = lab.proxy.injected.copy(), plan
    try:
        yield injected
    finally:
        lab.proxy.plan = proxy.no_faults
        injected.update(lab.proxy.injected - before)


# -- other drivers, and what they leave ---------------------------------------------------------------------------


def race(lab: Lab, rng: Random, on_s3: bool) -> Report:
    """The same command twice at a time: both must end well, with one set of rows."""
    trial = lab.trial("race", "workers.count=1", on_s3=on_s3)
    jobs = [trial.start(), trial.start()]
    codes = [job.wait() for job in jobs]
    assert codes == [0, 0], f"{codes}; {jobs[0].told()}\n{jobs[1].told()}"
    return proven(trial, Report(1))


def leave_torn_files(lab: Lab, rng: Random) -> Report:
    """What older runs and kills can leave: files without an entry that are cut, empty, whole, or another's."""
    trial = lab.trial("torn")
    output = Path(shutil.copytree(lab.folder / "undisturbed", trial.output))
    entries = rng.sample(sorted((output / "manifest").iterdir()), 8)
    for entry, spoil in zip(entries, [cut, empty, keep, change_tokenizer] * 2, strict=True):
        entry.unlink()
        for folder in ("tokens", "quarantine"):
            for file in (output / folder).glob(f"{entry.stem}.parquet"):
                spoil(file)
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
    """Until the output is begun and some more shards are done, and anywhere in the next one."""
    trial.wait(lambda: storage.exists(storage.join(trial.output, "dataset.json")), job, "its output")
    trial.wait_for_commits(trial.num_committed() + rng.randint(first, COMMITS), job)
    time.sleep(rng.uniform(0, MOMENT_S))  # the moment itself is random, there is nothing to wait for


def finished(trial: Trial, report: Report, job: Job) -> Report:
    """The report, once the job has ended with exit code 0."""
    code = job.wait()
    assert code == 0, f"exit code {code}; {job.told()}"
    return proven(trial, report)


def ended(trial: Trial, report: Report, code: int) -> Report:
    """The same, where the job that ended with this code may also have told that it is incomplete."""
    assert code in (0, 3), f"exit code {code}; {trial.jobs[-1].told()}"
    if code == 0:
        return proven(trial, report)
    return finished(trial, replace(report, reruns=report.reruns + 1), trial.start())


def proven(trial: Trial, report: Report) -> Report:
    """The report with what an own reading of the output and `verify` say."""
    return replace(report, damage=trial.damage(), verified=main(["verify", f"output={trial.output}", "deep=true"]) == 0)


def status(trial: Trial) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["status", f"output={trial.output}"]) == 0
    return told.getvalue()


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
