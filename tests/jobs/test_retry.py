"""Retries recover samples whose cause was fixed. Each sample is still there once, and no committed file changes."""

from pathlib import Path

import pytest
from PIL import Image, ImageFile

from jobs.__main__ import main
from jobs.retry import Recovered, RetryWorker
from pipeline.corpus.shards import Shard, find_shards
from pipeline.tokens import Output, TokenDataset
from pipeline.tokens.verify import verify
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import here, jpegs, rows_of, rows_without_ray, save_tiny_tokenizer, tokenize_without_ray

PIXELS = 40 * 48  # of a small picture
LARGE = ("large.webp", encoded(picture(120, 120), "webp"))  # more than Pillow decodes while its limit is low
CUT = ("cut.jpg", encoded(picture(40, 48, seed=9), "jpeg")[:-200])  # Pillow opens it only with LOAD_TRUNCATED_IMAGES


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Keeps the decoder from opening large images, until undo()."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)
    return monkeypatch


@pytest.fixture
def output(low_limit: pytest.MonkeyPatch, tokenizer: str, tmp_path: Path) -> Output:
    """Two shards of 6 samples. Samples 1 and 4 of the first are quarantined, for two reasons."""
    good = jpegs(5)
    (tmp_path / "a.tar").write_bytes(tar_bytes([good[0], LARGE, good[1], good[2], CUT, good[3]]))
    (tmp_path / "b.tar").write_bytes(tar_bytes([(f"b{name}", data) for name, data in jpegs(6)]))
    output = tokenize_without_ray(f"{tmp_path}/*.tar", tokenizer, tmp_path / "out")
    assert in_quarantine(output) == [1, 4]
    return output


def shard(output: Output) -> Shard:
    return find_shards(output.inputs()[0].url).shards[0]


def in_quarantine(output: Output) -> list[int]:
    history = output.committed_shard(output.inputs()[0].name)
    assert history is not None
    return [sample.source_index for sample in output.quarantined(history.last)]


def retry(output: Output, tokenizer: str) -> Recovered:
    """Runs the job's worker on the first shard."""
    found = here(RetryWorker, tokenizer, output_url=output.url).process(shard(output))
    assert isinstance(found, Recovered)
    return found


def files(output: Output) -> dict[str, bytes]:
    root = Path(output.url)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_recovered_samples_have_the_rows_of_a_first_success(
    output: Output, tokenizer: str, tmp_path: Path, low_limit: pytest.MonkeyPatch
):
    low_limit.undo()
    low_limit.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    before = files(output)
    assert retry(output, tokenizer) == Recovered(shard(output), num_recovered=2)
    assert files(output).items() >= before.items()
    assert rows_of(output.url).equals(rows_without_ray(f"{tmp_path}/*.tar", tokenizer))
    assert verify(output, deep=True).problems == []


def test_each_retry_processes_what_the_last_one_left(output: Output, tokenizer: str, low_limit: pytest.MonkeyPatch):
    low_limit.undo()
    assert retry(output, tokenizer) == Recovered(shard(output), num_recovered=1, num_quarantined=1)
    assert in_quarantine(output) == [4]
    low_limit.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert retry(output, tokenizer) == Recovered(shard(output), num_recovered=1)
    assert in_quarantine(output) == []
    assert {Path(name).stem for name in files(output) if name.startswith("tokens/a-")} == {
        *(f"{shard(output).name}{ending}" for ending in ("", "+1", "+2"))
    }
    assert verify(output, deep=True).problems == []


def test_readers_see_recovered_rows(output: Output, tokenizer: str, low_limit: pytest.MonkeyPatch):
    assert len(list(TokenDataset(output.url))) == 10
    low_limit.undo()
    retry(output, tokenizer)
    keys = [row["key"] for row in TokenDataset(output.url, shuffle_window=4)]
    assert (len(keys), len(set(keys)), "large" in keys) == (11, 11, True)


def test_nothing_is_written_if_no_cause_was_fixed(output: Output, tokenizer: str):
    before = files(output)
    assert retry(output, tokenizer) == Recovered(shard(output), num_quarantined=2)
    assert files(output) == before


def test_a_shard_with_other_samples_in_it_is_refused(output: Output, tokenizer: str, low_limit: pytest.MonkeyPatch):
    """Replaced between listing and reading, on storage without versions."""
    low_limit.undo()
    path, before = Path(shard(output).url), files(output)
    path.write_bytes(tar_bytes([*jpegs(5), CUT]))
    failure = here(RetryWorker, tokenizer, output_url=output.url).process(Shard(str(path), None)).failure
    assert failure is not None
    assert "does not hold the samples" in failure
    assert files(output) == before


def test_a_replaced_shard_is_refused_before_ray_starts(
    output: Output, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    Path(shard(output).url).write_bytes(tar_bytes(jpegs(6)))
    assert main(["retry", f"output={output.url}", f"tokenizer={tokenizer}"]) == 2
    assert "it was replaced" in capsys.readouterr().err


def test_another_tokenizer_is_refused(output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    assert main(["retry", f"output={output.url}", f"tokenizer={other}"]) == 2
    assert "was written by tokenizer" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_recovers_samples_and_failed_shards_until_only_the_bad_are_left(
    output: Output, tokenizer: str, tmp_path: Path, low_limit: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The workers' Pillow has its usual limit. A third shard could not be read when the output was made."""
    late = tmp_path / "late.tar"
    late.write_bytes(tar_bytes([(f"late{name}", data) for name, data in jpegs(3)]))
    output.add_inputs(find_shards(str(late)))
    output.record_failure(find_shards(str(late)).shards[0], f"{late}: there was no such shard", now=1.0)
    low_limit.undo()
    command = ["retry", f"output={output.url}", f"tokenizer={tokenizer}", "workers.count=1"]
    command += ["tokens.encoding=packed"]  # ignored
    assert main(command) == 4  # 1 of 15 is still bad
    printed = capsys.readouterr().out
    assert "2 quarantined samples in 1 shards, and 1 failed shards" in printed
    assert "recovered 1 samples" in printed
    assert main([*command, "tokens.max_bad_fraction=0.1"]) == 0
    assert main(["verify", f"output={output.url}", "--deep"]) == 0
    assert rows_of(output.url).equals(rows_without_ray(f"{tmp_path}/*.tar", tokenizer))


def test_ray_is_not_started_if_there_is_nothing_to_retry(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.tar").write_bytes(tar_bytes(jpegs(2)))
    output = tokenize_without_ray(f"{tmp_path}/a.tar", tokenizer, tmp_path / "out")
    assert main(["retry", f"output={output.url}", f"tokenizer={tokenizer}"]) == 0
    assert "0 quarantined samples in 0 shards, and 0 failed shards" in capsys.readouterr().out
