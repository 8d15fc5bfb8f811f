"""Shards dealt out to real actors that die, hang, fail and take their time."""

import collections
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from jobs.config import WorkersConfig
from jobs.shard_pool import MAX_TRIES, ShardWorker, map_shards
from pipeline.manifest import Shard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
TWO = WorkersConfig(count=2, cpus=0.25)


class Scripted(ShardWorker):
    """Does what the shard's URL says, `verb-number`. Notes each start as a file, so that tries can be counted."""

    in_flight = 2

    def __init__(self, notes: str, **resources):
        super().__init__(**resources)
        self.notes = Path(notes)

    def process(self, shard: Shard) -> tuple[str, str, int]:
        verb = shard.url.split("-")[0]
        (self.notes / f"{shard.url}.{os.getpid()}.{time.monotonic_ns()}").touch()
        tries = len(list(self.notes.glob(f"{shard.url}.*")))
        if verb == "die" or (verb == "dieonce" and tries == 1):
            time.sleep(0.3)  # so that the other shard in flight has begun
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "hang" or (verb == "hangonce" and tries == 1):
            threading.Event().wait()
        if verb == "freeze" and tries == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if verb == "raise":
            raise ValueError("broken on purpose")
        for _ in range(30 if verb == "slow" else 1):
            time.sleep(0.2)
            self.tick(shard)
        return "done", shard.url, os.getpid()

    @staticmethod
    def failed(shard: Shard, reason: str) -> tuple[str, str, str]:
        return "failed", shard.url, reason


class NeedsMore(Scripted):
    def __init__(self, notes: str, **resources):
        raise RuntimeError("this machine has no such thing")


def run(tmp_path: Path, names: list[str], workers: WorkersConfig = TWO, worker: type[ShardWorker] = Scripted):
    shards = [Shard(name, None) for name in names]
    results = list(map_shards(shards, worker, {"notes": str(tmp_path)}, workers))
    assert sorted(name for _, name, _ in results) == sorted(names)  # each once
    return {name: (outcome, detail) for outcome, name, detail in results}


def tries(tmp_path: Path) -> collections.Counter[str]:
    return collections.Counter(file.name.split(".")[0] for file in tmp_path.iterdir())


def test_many_shards_are_each_done_once_by_all_actors(tmp_path: Path):
    results = run(tmp_path, [f"do-{i}" for i in range(60)])
    assert set(tries(tmp_path).values()) == {1}
    assert len({pid for _, pid in results.values()}) == 2


def test_a_shard_whose_worker_was_killed_once_is_done_by_another(tmp_path: Path):
    results = run(tmp_path, ["dieonce-0", *(f"do-{i}" for i in range(6)), "dieonce-1"])
    assert {outcome for outcome, _ in results.values()} == {"done"}
    assert tries(tmp_path)["dieonce-0"] == tries(tmp_path)["dieonce-1"] == 2


def test_a_shard_that_kills_its_worker_each_time_fails_and_takes_no_other_with_it(tmp_path: Path):
    results = run(tmp_path, ["do-0", "die-0", *(f"do-{i}" for i in range(1, 9)), "die-1"])
    assert {name for name, (outcome, _) in results.items() if outcome == "failed"} == {"die-0", "die-1"}
    assert f"died or hung {MAX_TRIES} times" in results["die-0"][1]
    assert tries(tmp_path)["die-0"] == tries(tmp_path)["die-1"] == MAX_TRIES
    assert max(count for name, count in tries(tmp_path).items() if name.startswith("do")) <= 2  # a neighbour, once


def test_a_shard_that_hangs_is_taken_away_and_one_that_is_slow_is_not(tmp_path: Path):
    workers = WorkersConfig(count=2, cpus=0.25, stall_timeout_s=4)
    results = run(tmp_path, ["hangonce-0", "slow-0", "hang-0", "do-0", "do-1"], workers)
    assert [name for name, (outcome, _) in results.items() if outcome == "failed"] == ["hang-0"]
    assert "no progress for 4 s" in results["hang-0"][1]
    assert tries(tmp_path)["hangonce-0"] == 2
    assert tries(tmp_path)["hang-0"] == MAX_TRIES


def test_a_process_that_is_stopped_is_noticed(tmp_path: Path):
    workers = WorkersConfig(count=1, cpus=0.25, stall_timeout_s=2)
    results = run(tmp_path, ["freeze-0", "do-0"], workers)
    assert {outcome for outcome, _ in results.values()} == {"done"}


def test_an_exception_that_a_worker_does_not_handle_ends_the_job(tmp_path: Path):
    with pytest.raises(ValueError, match="broken on purpose"):
        run(tmp_path, ["raise-0"])


def test_a_worker_that_cannot_be_made_ends_the_job_with_its_reason(tmp_path: Path):
    with pytest.raises(ray.exceptions.RayActorError, match="this machine has no such thing"):
        run(tmp_path, ["do-0"], worker=NeedsMore)


def test_no_actor_is_left_when_the_shards_are_done(tmp_path: Path):
    run(tmp_path, ["do-0", "do-1"])
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
