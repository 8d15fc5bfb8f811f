"""Shards on real actors that die, hang, fail or are slow."""

import collections
import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from jobs.actors import pool
from jobs.actors.pool import MAX_TRIES, ShardWorker, map_shards
from jobs.config import WorkersConfig
from pipeline.corpus.shards import Shard
from tests.jobs.helpers import children_titled

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
TWO = WorkersConfig(count=2, cpus=0.25)


class Scripted(ShardWorker):
    """Does what the shard's URL says, `verb-number`. Notes each start as a file, so that tries can be counted.

    Does not import torch, since the tests start and kill some sixty workers.
    """

    in_flight = 2

    def __init__(self, notes: str, **resources):
        self.ticked: dict[str, float] = {}
        self.device_lock = threading.Lock()
        self.notes = Path(notes)

    def process(self, shard: Shard) -> tuple[str, str, int]:
        verb = shard.url.split("-")[0]
        (self.notes / f"{shard.url}.{os.getpid()}.{time.monotonic_ns()}").touch()
        tries = len([file for file in self.notes.glob(f"{shard.url}.*") if file.suffix != ".end"])
        if verb == "die" or (verb == "dieonce" and tries == 1):
            time.sleep(0.3)  # so that the other shard in flight has begun
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "hang" or (verb == "hangonce" and tries == 1):
            threading.Event().wait()
        if verb == "freeze" and tries == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if verb == "lock" and tries == 1:
            ctypes.PyDLL(None).sleep(10_000)  # a call into C that does not release Python's lock
        if verb == "raise":
            raise ValueError("broken on purpose")
        for _ in range({"slow": 30, "long": 60}.get(verb, 1)):
            time.sleep(0.2)
            self.tick(shard)
        (self.notes / f"{shard.url}.{os.getpid()}.end").touch()
        return "done", shard.url, os.getpid()

    def failed(self, shard: Shard, reason: str) -> tuple[str, str, str]:
        return "failed", shard.url, reason

    def finished(self, shard: Shard) -> tuple[str, str, str]:
        return "finished before", shard.url, ""


class NeedsMore(Scripted):
    def __init__(self, notes: str, **resources):
        raise RuntimeError("this machine has no such thing")


def run(tmp_path: Path, names: list[str], workers: WorkersConfig = TWO, worker: type[ShardWorker] = Scripted):
    shards = [Shard(name, None) for name in names]
    results = list(map_shards(shards, worker, {"notes": str(tmp_path)}, workers))
    assert sorted(name for _, name, _ in results) == sorted(names)  # each once
    return {name: (outcome, detail) for outcome, name, detail in results}


def tries(tmp_path: Path) -> collections.Counter[str]:
    return collections.Counter(file.name.split(".")[0] for file in tmp_path.iterdir() if file.suffix != ".end")


def test_many_shards_are_processed_once_each_by_all_actors(tmp_path: Path):
    results = run(tmp_path, [f"do-{i}" for i in range(60)])
    assert set(tries(tmp_path).values()) == {1}
    assert len({pid for _, pid in results.values()}) == 2


def test_a_shard_whose_worker_was_killed_once_is_retried_by_another(tmp_path: Path):
    results = run(tmp_path, ["dieonce-0", *(f"do-{i}" for i in range(6)), "dieonce-1"])
    assert {outcome for outcome, _ in results.values()} == {"done"}
    assert tries(tmp_path)["dieonce-0"] == tries(tmp_path)["dieonce-1"] == 2


def test_a_shard_that_kills_its_worker_each_time_fails_alone(tmp_path: Path):
    results = run(tmp_path, ["do-0", "die-0", *(f"do-{i}" for i in range(1, 9)), "die-1"])
    assert {name for name, (outcome, _) in results.items() if outcome == "failed"} == {"die-0", "die-1"}
    assert f"died or hung {MAX_TRIES} times" in results["die-0"][1]
    assert tries(tmp_path)["die-0"] == tries(tmp_path)["die-1"] == MAX_TRIES
    assert max(count for name, count in tries(tmp_path).items() if name.startswith("do")) <= 2  # a neighbour, once


def test_a_shard_that_hangs_fails_and_a_slow_one_does_not(tmp_path: Path):
    workers = WorkersConfig(count=2, cpus=0.25, stall_timeout_s=4)
    results = run(tmp_path, ["hangonce-0", "slow-0", "hang-0", "do-0", "do-1"], workers)
    assert [name for name, (outcome, _) in results.items() if outcome == "failed"] == ["hang-0"]
    assert "3 of them without progress for 4 s" in results["hang-0"][1]
    assert tries(tmp_path)["hangonce-0"] == 2
    assert tries(tmp_path)["hang-0"] == MAX_TRIES


def test_a_stopped_process_is_detected(tmp_path: Path):
    workers = WorkersConfig(count=1, cpus=0.25, stall_timeout_s=2)
    results = run(tmp_path, ["freeze-0", "do-0"], workers)
    assert {outcome for outcome, _ in results.values()} == {"done"}


def test_a_call_that_holds_pythons_lock_is_detected_and_the_other_shard_is_processed(tmp_path: Path):
    """No thread of the worker can run; only its watchdog process detects it."""
    workers = WorkersConfig(count=1, cpus=0.25, stall_timeout_s=2)
    results = run(tmp_path, ["lock-0", "do-0", "do-1"], workers)
    assert {outcome for outcome, _ in results.values()} == {"done"}
    assert tries(tmp_path)["lock-0"] == 2


def test_the_other_shard_of_a_stalled_worker_is_not_blamed(tmp_path: Path):
    """Each attempt also costs a worker."""
    workers = WorkersConfig(count=1, cpus=0.25, stall_timeout_s=2)
    results = run(tmp_path, ["hang-0", "long-0"], workers)
    assert results["hang-0"][0] == "failed"
    assert results["long-0"][0] == "done"


def test_a_result_comes_as_soon_as_its_shard_is_done(tmp_path: Path):
    workers = WorkersConfig(count=1, cpus=0.25)
    shards = [Shard("do-0", None), Shard("slow-0", None)]
    results = map_shards(shards, Scripted, {"notes": str(tmp_path)}, workers)
    assert next(results)[1] == "do-0"
    assert not list(tmp_path.glob("slow-0.*.end"))
    assert [name for _, name, _ in results] == ["slow-0"]


def test_a_finished_shard_whose_result_was_lost_is_not_processed_again(tmp_path: Path, monkeypatch):
    """If a block has several shards, the death of a worker loses the results of the shards before."""
    monkeypatch.setattr(pool, "MAX_BLOCKS", 2)
    results = run(tmp_path, ["do-0", "dieonce-0", "do-1", "do-2"], WorkersConfig(count=1, cpus=0.25))
    assert results["do-0"] == ("finished before", "")
    assert tries(tmp_path) == {"do-0": 1, "dieonce-0": 2, "do-1": 1, "do-2": 1}


@pytest.mark.parametrize("helper", ["_Ledger", "_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"])
def test_a_helper_actor_that_is_killed_does_not_end_the_job(tmp_path: Path, helper: str):
    """Our metrics, and those of Ray Data."""
    shards = [Shard(f"do-{i}", None) for i in range(30)]
    results = map_shards(shards, Scripted, {"notes": str(tmp_path)}, TWO)
    first = next(results)
    for process in children_titled(f"ray::{helper}"):
        process.kill()
    assert {url for _, url, _ in [first, *results]} == {shard.url for shard in shards}


def test_a_ledger_that_is_stopped_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(pool, "SAY_EVERY_S", 1.0)
    shards = [Shard(f"do-{i}", None) for i in range(30)]
    results = map_shards(shards, Scripted, {"notes": str(tmp_path)}, TWO)
    first = next(results)
    [ledger] = children_titled("ray::_Ledger")
    ledger.suspend()
    assert {url for _, url, _ in [first, *results]} == {shard.url for shard in shards}
    assert "restarting the ledger of shards, which did not answer for 1 s" in capsys.readouterr().out


def test_a_worker_that_cannot_be_built_ends_the_job_with_the_reason(tmp_path: Path):
    with pytest.raises(ray.exceptions.RayActorError, match="this machine has no such thing"):
        run(tmp_path, ["do-0"], worker=NeedsMore)


@pytest.mark.parametrize("verb", ["do", "raise"])
def test_no_actor_is_left_when_the_job_is_over(tmp_path: Path, verb: str):
    """They end even while the exception that ended the job is still referenced."""
    with pytest.raises(ValueError, match="broken") if verb == "raise" else contextlib.nullcontext() as _kept:
        run(tmp_path, [f"{verb}-0", f"{verb}-1"])
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
