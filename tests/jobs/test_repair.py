"""What the commands say about a damaged output, and the way back: verify --repair, then tokenize again."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.config import Config
from pipeline.corpus.shards import Shard, ShardList
from pipeline.tokens import Output
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import rows_of, tokenize_without_ray

SHARDS, PER_SHARD = 12, 4


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The last sample of each shard is broken."""
    (tmp_path / "in").mkdir()
    for shard in range(SHARDS):
        images = [(f"{shard:02d}-{i}.png", encoded(picture(seed=100 * shard + i))) for i in range(PER_SHARD - 1)]
        (tmp_path / f"in/s-{shard:02d}.tar").write_bytes(tar_bytes([*images, (f"{shard:02d}-9.png", b"no picture")]))
    return tmp_path / "in"


@pytest.fixture
def output(corpus: Path, tokenizer: str) -> Output:
    return tokenize_without_ray(f"{corpus}/*.tar", tokenizer, corpus.parent / "out")


def command(corpus: Path, tokenizer: str, *more: str) -> list[str]:
    given = [f"data.shards={corpus}/*.tar", f"tokenizer={tokenizer}", f"output={corpus.parent}/out"]
    return ["tokenize", *given, "tokens.max_bad_fraction=0.5", "workers.count=1", *more]


def file(output: Output, folder: str, index: int) -> Path:
    ending = "json" if folder == "manifest" else "parquet"
    return Path(output.url) / folder / f"{output.commits()[index].name}.{ending}"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.out + captured.err


def test_a_dry_run_changes_nothing_and_a_repair_removes_the_shard(output: Output, capsys: pytest.CaptureFixture[str]):
    name = output.commits()[0].name
    before = sorted(Path(output.url).rglob("*"))
    file(output, "tokens", 0).write_bytes(b"cut")
    assert main(["verify", f"output={output.url}", "verify.dry_run=true"]) == 3
    assert f"would remove shard {name}: tokens/{name}.parquet: " in said(capsys)
    assert sorted(Path(output.url).rglob("*")) == before
    assert main(["verify", f"output={output.url}", "repair=true"]) == 3
    assert f"removing shard {name}: tokens/{name}.parquet: " in said(capsys)
    assert len(before) - len(list(Path(output.url).rglob("*"))) == 3


def test_nothing_is_repaired_in_a_correct_output(output: Output, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", f"output={output.url}", "--repair", "--deep"]) == 0
    assert main(["verify", f"output={output.url}", "--repair"]) == 0
    assert "nothing to repair: every file is the one that was committed" in said(capsys)


def test_the_plain_check_says_that_a_repair_helps(output: Output, capsys: pytest.CaptureFixture[str]):
    file(output, "tokens", 0).unlink()
    assert main(["verify", f"output={output.url}"]) == 3
    assert "verify: add --repair to remove what is damaged (1 shards and files)" in said(capsys)


@pytest.mark.parametrize("damage", ["tokens", "quarantine", "one file"])
def test_tokenize_and_status_notice_missing_files(
    output: Output, corpus: Path, tokenizer: str, damage: str, capsys: pytest.CaptureFixture[str]
):
    """All shards are committed, so tokenize has nothing to do."""
    if damage == "one file":
        file(output, "tokens", 3).unlink()
    else:
        shutil.rmtree(f"{output.url}/{damage}")
    assert main(command(corpus, tokenizer)) == 3
    count = 1 if damage == "one file" else SHARDS
    told = said(capsys)
    assert f"tokenize: incomplete: {count} files of committed shards are missing or damaged" in told
    assert "tokenize: done" not in told
    assert main(["status", f"output={output.url}"]) == 0
    assert f"damaged      {count} files" in said(capsys)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{corpus}", "is a folder, not a shard; did you mean {corpus}/*.tar?"),
        ("{corpus}/..", "is a folder, not a shard; did you mean {corpus}/*.tar?"),
        ("{corpus}/s-0.tar", "s-0.tar does not exist; did you mean {corpus}/s-"),
        ("[{corpus}/*.tar,{corpus}/gone.tar]", "gone.tar does not exist"),
    ],
)
def test_wrong_shards_are_refused_before_anything_is_written(
    corpus: Path, tokenizer: str, shards: str, message: str, capsys: pytest.CaptureFixture[str]
):
    given = shards.format(corpus=corpus)
    assert main(["tokenize", f"data.shards={given}", f"tokenizer={tokenizer}", f"output={corpus}/../out"]) == 2
    assert message.format(corpus=corpus) in said(capsys)
    assert not (corpus.parent / "out").exists()


def test_the_corpus_under_another_path_is_refused(
    output: Output, corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    before = sorted(Path(output.url).rglob("*"))
    shutil.copytree(corpus, corpus.parent / "moved")
    assert main(command(corpus, tokenizer, f"data.shards={corpus.parent}/moved/*.tar")) == 2
    assert "has the same name and size as" in said(capsys)
    assert sorted(Path(output.url).rglob("*")) == before


def test_a_wrong_list_is_withdrawn(output: Output, corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]):
    """As another version wrote it: one shard of it does not exist."""
    lists = Path(output.url) / "inputs"
    wrong = ShardList([Shard("/gone/x.tar", None)])
    (lists / f"{wrong.id}.json").write_text(wrong.to_json())
    assert main(command(corpus, tokenizer)) == 0
    assert "tokenize: 1 shards of other runs are not tokenized, such as /gone/x.tar" in said(capsys)
    assert main(["status", f"output={output.url}"]) == 0
    assert f"{SHARDS} done, 1 left" in said(capsys)
    assert main(["verify", f"output={output.url}"]) == 3
    assert "/gone/x.tar: not tokenized; " in (told := said(capsys))
    assert f"verify.withdraw={wrong.id}" in told
    assert main(["verify", f"output={output.url}", f"verify.withdraw=[{wrong.id}]", "--dry-run"]) == 0
    assert len(list(lists.iterdir())) == 2
    assert main(["verify", f"output={output.url}", f"verify.withdraw=[{wrong.id}]"]) == 0
    assert main(["verify", f"output={output.url}", "--deep"]) == 0
    assert main(["verify", f"output={output.url}", f"verify.withdraw=[{wrong.id}]"]) == 2
    assert "is no list and no tokenized shard" in said(capsys)


BROKEN = {
    "dataset.json": b"{",
    "inputs/0123456789abcdef.json": b"[null]",
    "failed/x.json": b"{",
    "manifest/x.json": b"{",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("which", ["status", "tokenize", "retry", "verify", "decode", "audit"])
def test_a_broken_file_gives_a_line_that_names_it_and_the_remedy(
    output: Output, corpus: Path, tokenizer: str, name: str, which: str, capsys: pytest.CaptureFixture[str]
):
    path = Path(output.url) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(BROKEN[name])
    given = {
        "tokenize": command(corpus, tokenizer)[1:],
        "decode": [f"tokenizer={tokenizer}", f"decode.output={corpus}", "decode.limit=1", f"output={output.url}"],
    }.get(which, [f"output={output.url}", *([f"tokenizer={tokenizer}"] if which in ("retry", "audit") else [])])
    not_read = {"failed": ("tokenize", "decode", "audit"), "inputs": ("decode", "audit")}.get(name.split("/")[0], ())
    if which in not_read:
        return
    assert main([which, *given]) in (2, 3)
    told = said(capsys)
    assert name in told
    assert "repair" in told


def test_files_of_other_programs_stop_no_command(
    output: Output, corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    (Path(output.url) / "manifest/.DS_Store").write_bytes(b"\0\1")
    (Path(output.url) / "tokens/.tmp-x").write_bytes(b"half")
    assert main(command(corpus, tokenizer)) == 0
    assert main(["verify", f"output={output.url}", "--deep"]) == 0
    assert "verify: 1 files belong to other programs and were passed over: manifest/.DS_Store" in (told := said(capsys))
    assert "verify: 1 files are unfinished" in told
    assert main(["status", f"output={output.url}"]) == 0
    assert "1 files of other programs" in (told := said(capsys))
    assert "1 files of writers that run or were killed" in told


def damage_everything(output: Output) -> None:
    """A different damage to each of the first ten shards, and to the folders of JSON files."""
    flipped = bytearray(file(output, "tokens", 0).read_bytes())
    flipped[40] ^= 1
    other = file(output, "tokens", 9).read_bytes()
    table = pq.read_table(file(output, "tokens", 8))
    entry = json.loads(file(output, "manifest", 7).read_text())
    paths = {(folder, i): file(output, folder, i) for folder in ("tokens", "quarantine", "manifest") for i in range(10)}
    paths["tokens", 0].write_bytes(flipped)
    paths["tokens", 1].unlink()
    paths["tokens", 2].write_bytes(paths["tokens", 2].read_bytes()[:-50])
    paths["quarantine", 3].unlink()
    paths["quarantine", 4].write_bytes(b"")
    paths["manifest", 5].write_text("")
    paths["manifest", 6].unlink()
    paths["manifest", 7].write_text(json.dumps({**entry, "source_shard": None}))
    pq.write_table(table.slice(1), paths["tokens", 8])
    paths["tokens", 9].unlink()
    paths["tokens", 9].mkdir()
    (Path(output.url) / "tokens/zz-000000000000.parquet").write_bytes(other)
    (Path(output.url) / "manifest/.DS_Store").write_bytes(b"\0")
    (Path(output.url) / "manifest/zz-000000000000.json").write_text(json.dumps(entry))
    (Path(output.url) / "tokens/.tmp-old").write_bytes(b"half")
    os.utime(Path(output.url) / "tokens/.tmp-old", (0, 0))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_damage_of_many_kinds_is_repaired_by_the_documented_commands(
    corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    assert main(command(corpus, tokenizer)) == 0
    output = Output.open(f"{corpus.parent}/out")
    good = rows_of(output.url)
    damage_everything(output)
    said(capsys)
    assert main(["verify", f"output={output.url}", "--deep"]) == 3
    assert main(["verify", f"output={output.url}", "--repair", "--deep"]) == 3
    told = said(capsys)
    rerun = shlex.split(told.splitlines()[-2])  # the last line says what exit code 3 means
    assert rerun[:2] == ["tokenmill", "tokenize"]
    assert main([*rerun[1:], "tokens.max_bad_fraction=0.5"]) == 0
    assert main(["verify", f"output={output.url}", "--deep"]) == 0
    assert rows_of(output.url).equals(good)
    assert main(["verify", f"output={output.url}", "--repair"]) == 0


def test_the_command_to_rerun_has_the_keys_that_differ_from_their_defaults(
    output: Output, capsys: pytest.CaptureFixture[str]
):
    config = Config(tokenizer="/t")
    config.data.shards = ["/a b/*.tar", "/c.tar"]
    config.tokens.passthrough = ["txt"]
    path = Path(output.url) / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": config.to_dict()}))
    file(output, "tokens", 0).unlink()
    assert main(["verify", f"output={output.url}", "--repair"]) == 3
    line = next(line for line in said(capsys).splitlines() if line.startswith("tokenmill tokenize"))
    assert set(shlex.split(line)[2:]) == {
        *("tokenizer=/t", "data.shards=[/a b/*.tar,/c.tar]", "tokens.passthrough=[txt]", f"output={output.url}")
    }
