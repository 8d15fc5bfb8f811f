"""kill -9 at any moment, then rerun: no sample is lost or repeated, and the rows are those of an undisturbed run."""

import signal
import threading
import time
from pathlib import Path

import pytest

from jobs.__main__ import main
from pipeline import storage
from tests.corpus import tar_bytes
from tests.faults.cluster import wait_for
from tests.jobs.helpers import (
    children_named,
    driver_in_a_session,
    jpegs,
    left_in_session,
    rows_of,
    rows_without_ray,
    tokenize_without_ray,
)

NUM_SHARDS, PER_SHARD = 8, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A glob of shards. No two shards share a key."""
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(NUM_SHARDS):
        members = [(f"{shard:02d}-{name}", data) for name, data in jpegs(PER_SHARD, 128, 160)]
        (folder / f"photos-{shard:02d}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/*.tar"


def command(corpus: str, tokenizer: str, output: Path, *more: str) -> list[str]:
    # one image at a time: slow enough to be killed half way
    slow = ["tokens.batch_budget=1e-3", "workers.cpus=1", "workers.count=2"]
    return ["tokenize", f"tokenizer={tokenizer}", f"data.shards={corpus}", f"output={output}", *slow, *more]


def num_committed(output: Path) -> int:
    return len(list((output / "manifest").glob("*.json")))


def wait_for_commits(output: Path, count: int, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while num_committed(output) < count:
        assert time.monotonic() < deadline, f"{num_committed(output)} commits after {timeout_s} s"
        time.sleep(0.002)


def assert_whole(output: Path, corpus: str, tokenizer: str) -> None:
    assert main(["verify", f"output={output}", "verify.deep=true"]) == 0
    rows = rows_of(output)
    assert len(set(rows["key"].to_pylist())) == rows.num_rows == NUM_SHARDS * PER_SHARD
    assert rows.equals(rows_without_ray(corpus, tokenizer))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_rows_survive_a_driver_that_is_killed(corpus: str, tokenizer: str, tmp_path: Path):
    output = tmp_path / "out"
    with driver_in_a_session(command(corpus, tokenizer, output)) as driver:
        wait_for_commits(output, 2)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    done_before = num_committed(output)
    assert 2 <= done_before < NUM_SHARDS
    assert main(["verify", f"output={output}"]) == 3
    assert main(command(corpus, tokenizer, output, "workers.count=1")) == 0
    assert_whole(output, corpus, tokenizer)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_signal_ends_the_command_in_words_and_leaves_no_process(corpus: str, tokenizer: str, tmp_path: Path):
    """ctrl-C, then the same command and SIGTERM, then the same command."""
    output, log = tmp_path / "out", tmp_path / "log"
    for sent, code, words in (
        (signal.SIGINT, 130, "interrupted (ctrl-C)"),
        (signal.SIGTERM, 143, "terminated (SIGTERM)"),
    ):
        done_before = num_committed(output)
        with driver_in_a_session(command(corpus, tokenizer, output), log) as driver:
            wait_for_commits(output, done_before + 1)
            driver.send_signal(sent)
            assert driver.wait(60) == code
            wait_for(lambda pid=driver.pid: not left_in_session(pid), 30, "the processes of Ray to end")
        printed = log.read_text()
        assert printed.endswith(f"tokenmill tokenize: exit {code}: {words}; rerun the same command to continue\n")
        assert "Traceback" not in printed
        assert done_before < num_committed(output) < NUM_SHARDS
    assert main(command(corpus, tokenizer, output, "workers.count=1")) == 0
    assert_whole(output, corpus, tokenizer)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced_within_the_same_command(corpus: str, tokenizer: str, tmp_path: Path):
    output = tmp_path / "out"
    killed: list[int] = []

    def kill_a_worker() -> None:
        wait_for_commits(output, 2)
        worker = children_named("TokenizeWorker")[0]
        killed.append(worker.pid)
        worker.kill()

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    assert main(command(corpus, tokenizer, output)) == 0
    killer.join()
    assert len(killed) == 1
    assert_whole(output, corpus, tokenizer)


# -- leftovers of a killed job, made by hand ---------------------------------------------------------------------------


@pytest.fixture
def finished(tokenizer: str, tmp_path: Path) -> Path:
    """A complete output of two small shards."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(jpegs(3)))
    tokenize_without_ray(f"{tmp_path}/*.tar", tokenizer, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("torn", [True, False])
def test_an_unfinished_entry_is_not_a_second_entry(finished: Path, torn: bool, capsys: pytest.CaptureFixture[str]):
    """A kill after the temporary file was linked to its final name, or while it was being written."""
    entry = sorted((finished / "manifest").iterdir())[0]
    (finished / "manifest" / f"{storage.TEMPORARY}x").write_bytes(b"" if torn else entry.read_bytes())
    assert main(["verify", f"output={finished}", "verify.deep=true"]) == 0
    assert main(["status", f"output={finished}"]) == 0
    assert "6 tokenized" in capsys.readouterr().out


def test_an_output_without_its_list_of_inputs_is_not_complete(finished: Path):
    """A kill between dataset.json and inputs/: without the list of shards, nothing can be verified."""
    for file in (finished / "inputs").iterdir():
        file.unlink()
    for file in (finished / "manifest").iterdir():
        file.unlink()
    assert main(["verify", f"output={finished}"]) == 3


def test_a_torn_token_shard_without_its_entry_is_written_again(finished: Path, tokenizer: str, tmp_path: Path):
    entry = sorted((finished / "manifest").iterdir())[0]
    tokens = finished / "tokens" / f"{entry.stem}.parquet"
    entry.unlink()
    tokens.write_bytes(tokens.read_bytes()[:100])
    tokenize_without_ray(f"{tmp_path}/*.tar", tokenizer, finished)
    assert main(["verify", f"output={finished}", "verify.deep=true"]) == 0
    assert rows_of(finished).equals(rows_without_ray(f"{tmp_path}/*.tar", tokenizer))
