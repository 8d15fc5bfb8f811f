"""Damage of every kind is found, and a repair followed by the same commits gives the same rows again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.errors import BrokenDataset, BrokenOutput, OutputMismatch
from pipeline.tokens import Output, TokenDataset, commit_retry, commit_shard
from pipeline.tokens.repair import dataset_removal, plan_repair, plan_withdrawal
from pipeline.tokens.schema import to_parquet
from pipeline.tokens.verify import DEEP, FILES, FOOTERS, verify
from tests.corpus import layout, quarantined, samples_of, token_rows, write_corpus, write_tar
from tests.pipeline.test_verify import with_column
from tests.s3 import S3Server

SIZES = (5, 4, 3)


def shards_in(folder: Path) -> list[Shard]:
    return find_shards(f"{folder}/in/photos-*.tar").shards


def tokenize(folder: Path, **changes: Any) -> Output:
    """Commits what the output lacks. The last sample of each shard is in quarantine."""
    shards = shards_in(folder)
    output = Output.create(str(folder / "out"), layout(**changes), ShardList(shards), config={})
    for shard, count in zip(shards, SIZES, strict=True):
        commit_shard(output, shard, token_rows(shard, count)[:-1], [quarantined(shard, count - 1)], {}, now=1.0)
    return output


def retry_first(output: Output) -> None:
    """Recovers the quarantined sample of the first shard."""
    shard = output.inputs()[0]
    history = output.committed_shard(shard.name)
    assert history is not None
    commit_retry(output, shard, history, token_rows(shard, SIZES[0])[-1:], [], {}, now=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "in", SIZES)
    tokenize(tmp_path)
    return tmp_path


def file(folder: Path, kind: str, index: int = 0) -> Path:
    ending = "json" if kind in ("manifest", "failed") else "parquet"
    return folder / "out" / kind / f"{shards_in(folder)[index].name}.{ending}"


def rows_of(folder: Path) -> list[tuple[str, list[int]]]:
    return sorted((row["key"], row["tokens"].tolist()) for row in TokenDataset(str(folder / "out")))


def flip(path: Path, part: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_layout(folder: Path, **changes: Any) -> None:
    path = folder / "out/dataset.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "layout": {**about["layout"], **changes}}))


def the_list(folder: Path) -> Path:
    [path] = (folder / "out/inputs").iterdir()
    return path


def forge(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a token file together with its checksum and size in the entry."""
    path = file(folder, "tokens")
    path.write_bytes(to_parquet(change(pq.read_table(path))))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(file(folder, "manifest"), tokens_sha256=digest, tokens_num_bytes=path.stat().st_size)


def other_tokens(table: pa.Table) -> pa.Table:
    return with_column(table, "tokens", [[(t + 1) % 1024 for t in row] for row in table["tokens"].to_pylist()])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nonexistent/file")


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {  # what verify must read to find it, and the damage
    "token file deleted": (FOOTERS, lambda f: file(f, "tokens").unlink()),
    "token file cut": (FOOTERS, lambda f: cut(file(f, "tokens"))),
    "token file empty": (FOOTERS, lambda f: file(f, "tokens").write_bytes(b"")),
    "token file longer": (FOOTERS, lambda f: file(f, "tokens").open("ab").write(b"more")),
    "token file a folder": (FOOTERS, lambda f: make_folder(file(f, "tokens"))),
    "token file a broken link": (FOOTERS, lambda f: dangling_link(file(f, "tokens"))),
    "token files swapped": (FOOTERS, lambda f: swap(file(f, "tokens"), file(f, "tokens", 1))),
    "tokens/ deleted": (FOOTERS, lambda f: shutil.rmtree(f / "out/tokens")),
    "a byte of the tokens flipped": (FILES, lambda f: flip(file(f, "tokens"), 0.1)),
    "a byte of the footer flipped": (FILES, lambda f: flip(file(f, "tokens"), 0.97)),
    "the first byte flipped": (FILES, lambda f: flip(file(f, "tokens"), 0)),
    "rows deleted": (FILES, lambda f: forge(f, lambda t: t.slice(1))),
    "other tokens with their checksum": (FILES, lambda f: forge(f, other_tokens)),
    "a column deleted": (FOOTERS, lambda f: forge(f, lambda t: t.drop_columns(["shape"]))),
    "quarantine file deleted": (FOOTERS, lambda f: file(f, "quarantine").unlink()),
    "quarantine file cut": (FOOTERS, lambda f: cut(file(f, "quarantine"))),
    "quarantine file flipped": (FILES, lambda f: flip(file(f, "quarantine"), 0.3)),
    "quarantine files swapped": (FILES, lambda f: swap(file(f, "quarantine"), file(f, "quarantine", 1))),
    "quarantine/ deleted": (FOOTERS, lambda f: shutil.rmtree(f / "out/quarantine")),
    "entry deleted": (FOOTERS, lambda f: file(f, "manifest").unlink()),
    "entry empty": (FOOTERS, lambda f: file(f, "manifest").write_text("")),
    "entry cut": (FOOTERS, lambda f: cut(file(f, "manifest"))),
    "entry a list": (FOOTERS, lambda f: file(f, "manifest").write_text("[1]")),
    "entry nested too deep": (FOOTERS, lambda f: file(f, "manifest").write_text("[" * 200_000)),
    "entry with nulls": (FOOTERS, lambda f: edit(file(f, "manifest"), source_shard=None, reasons=None, settled=None)),
    "entry with a wrong count": (FOOTERS, lambda f: edit(file(f, "manifest"), num_rows=3)),
    "entry with a huge count": (FOOTERS, lambda f: edit(file(f, "manifest"), num_rows=10**12)),
    "entry with another checksum": (FILES, lambda f: edit(file(f, "manifest"), tokens_sha256="0" * 64)),
    "entry with other samples": (FILES, lambda f: edit(file(f, "manifest"), samples_sha256="0" * 64)),
    "entry of another tokenizer": (FOOTERS, lambda f: edit(file(f, "manifest"), tokenizer_id="tok-b")),
    "entries swapped": (FOOTERS, lambda f: swap(file(f, "manifest"), file(f, "manifest", 1))),
    "entry copied": (FOOTERS, lambda f: shutil.copy(file(f, "manifest"), f / "out/manifest/zz-000000000000.json")),
    "manifest/ deleted": (FOOTERS, lambda f: shutil.rmtree(f / "out/manifest")),
    "list of inputs empty": (FOOTERS, lambda f: the_list(f).write_text("")),
    "list of inputs with nulls": (FOOTERS, lambda f: the_list(f).write_text('[{"url": null}]')),
    "inputs/ deleted": (FOOTERS, lambda f: shutil.rmtree(f / "out/inputs")),
    "dataset.json of another tokenizer": (FOOTERS, lambda f: edit_layout(f, tokenizer_id="tok-b")),
    "dataset.json of another size": (FOOTERS, lambda f: edit_layout(f, codebook_size=1000)),
    "dataset.json of another encoding": (FOOTERS, lambda f: edit_layout(f, encoding="packed")),
    "dataset.json with other preprocessing": (FOOTERS, lambda f: edit_layout(f, preprocessing="{}")),
    "dataset.json with a column": (FOOTERS, lambda f: edit_layout(f, passthrough=["txt"])),
    "note of a failure damaged": (FOOTERS, lambda f: storage.replace(str(file(f, "failed")), b"{")),
    "everything at once": (
        FOOTERS,
        lambda f: (cut(file(f, "tokens")), file(f, "manifest", 1).write_text(""), the_list(f).write_text("")),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("with_retry", [False, True], ids=["", "with a retry"])
def test_damage_is_found_and_repaired(folder: Path, damage: str, with_retry: bool):
    output = Output.open(str(folder / "out"))
    if with_retry:
        retry_first(output)
    good = rows_of(folder)
    level, do = DAMAGE[damage]
    do(folder)
    output = Output.open(str(folder / "out"))
    assert verify(output, level=level).problems
    assert verify(output, level=DEEP).problems
    for removal in plan_repair(output, verify(output, level=FILES)):
        removal.remove()
    output = tokenize(folder)
    if with_retry and output.quarantined(output.committed_shards()[0].last):
        retry_first(output)
    assert verify(output, level=DEEP).problems == []
    assert rows_of(folder) == good
    assert plan_repair(output, verify(output, level=FILES)) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"layout": {}}', '{"layout": []}', "[" * 200_000])
def test_a_damaged_dataset_json_is_named_and_made_again(folder: Path, text: str):
    good = rows_of(folder)
    (folder / "out/dataset.json").write_text(text)
    with pytest.raises(BrokenDataset, match=r"out/dataset\.json is damaged .*; then rerun"):
        Output.open(str(folder / "out"))
    dataset_removal(str(folder / "out"), "").remove()
    assert verify(tokenize(folder), level=DEEP).problems == []
    assert rows_of(folder) == good


@pytest.mark.parametrize(
    "changes",
    [
        *({"codebook_size": value} for value in ("x", -1, None, 1.5, 70_000, 2**40)),
        *({"passthrough": value} for value in ("txt", [1], None, ["key"])),
        *({"encoding": "zip"}, {"tokenizer_id": 7}, {"token_dtype": "float16"}, {"schema_version": "1"}),
    ],
)
def test_a_layout_that_no_version_writes_is_refused(folder: Path, changes: dict[str, Any]):
    edit_layout(folder, **changes)
    with pytest.raises((BrokenOutput, OutputMismatch), match=r"dataset\.json"):
        Output.open(str(folder / "out"))


def test_without_dataset_json_another_tokenizer_is_refused(folder: Path):
    (folder / "out/dataset.json").unlink()
    with pytest.raises(OutputMismatch, match="holds shards of tokenizer tok-a, not tok-b"):
        tokenize(folder, tokenizer_id="tok-b")
    assert not (folder / "out/dataset.json").exists()


def test_a_repair_removes_no_shard_while_dataset_json_is_wrong(folder: Path):
    edit_layout(folder, tokenizer_id="tok-b")
    output = Output.open(str(folder / "out"))
    removals = plan_repair(output, verify(output, level=FILES))
    assert [removal.what for removal in removals] == ["dataset.json"]


@pytest.mark.parametrize("stop", range(6))
def test_a_repair_that_is_killed_is_continued_by_the_next(folder: Path, stop: int):
    """The shard has six files: of the retry and of the first commit, in the order in which they are removed."""
    good, output = rows_of(folder), Output.open(str(folder / "out"))
    retry_first(output)
    flip(file(folder, "tokens"), 0.1)
    [removal] = plan_repair(output, verify(output, level=FILES))
    replace(removal, urls=removal.urls[:stop]).remove()
    assert verify(output, level=DEEP).problems
    for again in plan_repair(output, verify(output, level=FILES)):
        again.remove()
    assert verify(tokenize(folder), level=DEEP).problems == []
    assert rows_of(folder) == good


def test_an_input_shard_that_is_gone_withdraws_nothing(folder: Path):
    Path(shards_in(folder)[0].url).unlink()
    output = Output.open(str(folder / "out"))
    proof = verify(output, level=DEEP)
    assert "there is no such shard" in proof.problems[0]
    assert plan_repair(output, proof) == []


def test_an_input_shard_that_was_replaced_withdraws_nothing(folder: Path):
    url = shards_in(folder)[0].url
    write_tar(Path(url), samples_of(5, start=900))
    os.utime(url, (1, 1))
    output = Output.open(str(folder / "out"))
    proof = verify(output, level=DEEP)
    assert f"withdraw its rows with verify.withdraw={url}" in proof.problems[0]
    assert plan_repair(output, proof) == []


# -- files of other programs, and of killed writers ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["manifest", "inputs", "failed"])
@pytest.mark.parametrize("name", [".DS_Store", "README.txt", "._photos-000.json", "x.json.bak"])
def test_files_of_other_programs_are_passed_over_and_counted(folder: Path, kind: str, name: str):
    stray = folder / "out" / kind / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"\0\1\2")
    output = Output.open(str(folder / "out"))
    proof = verify(output, level=DEEP)
    assert (proof.problems, proof.strays, len(rows_of(folder))) == ([], [f"{kind}/{name}"], sum(SIZES) - 3)
    assert output.failures() == []
    assert plan_repair(output, proof) == []


@pytest.mark.parametrize("kind", [".", "tokens", "quarantine", "manifest", "inputs"])
def test_unfinished_files_are_counted_and_removed_once_old(folder: Path, kind: str):
    unfinished = folder / "out" / kind / ".tmp-abc"
    unfinished.write_bytes(b"half")
    output = Output.open(str(folder / "out"))
    proof = verify(output)
    assert (proof.problems, len(proof.temporary), plan_repair(output, proof)) == ([], 1, [])
    os.utime(unfinished, (0, 0))
    [removal] = plan_repair(output, verify(output))
    removal.remove()
    assert not unfinished.exists()
    assert verify(output, level=DEEP).problems == []


def test_a_damaged_list_or_note_is_named_with_the_remedy(folder: Path):
    output = Output.open(str(folder / "out"))
    storage.replace(output.failure_url("x"), b"{")
    with pytest.raises(BrokenOutput, match=r"failed/x\.json is damaged .*verify\.repair=true. removes what is damaged"):
        output.failures()
    the_list(folder).write_text("[null]")
    with pytest.raises(BrokenOutput, match=r"inputs/\w+\.json is damaged .*verify\.repair=true"):
        output.inputs()


# -- withdrawals --------------------------------------------------------------------------------------------------


def add_list(folder: Path, name: str, *, commit: bool, same_names: str = "refuse") -> str:
    """Gives the output one more shard, in a list of its own. Returns the id of the list."""
    [shard] = find_shards(write_tar(folder / name / "photos-007.tar", samples_of(2, start=700))).shards
    listed = ShardList([shard])
    output = Output.create(str(folder / "out"), layout(), listed, config={}, same_names=same_names)
    if commit:
        commit_shard(output, shard, token_rows(shard, 2), [], {}, now=3.0, same_names=same_names)
    return listed.id


@pytest.mark.parametrize("commit", [False, True])
def test_a_list_is_withdrawn_with_the_rows_that_only_it_has(folder: Path, commit: bool):
    good, files = rows_of(folder), sorted(path for path in (folder / "out").rglob("*"))
    wrong = add_list(folder, "wrong", commit=commit)
    output = Output.open(str(folder / "out"))
    if not commit:
        assert f"withdraw its list with verify.withdraw={wrong}" in verify(output).problems[0]
    for removal in plan_withdrawal(output, wrong):
        removal.remove()
    assert verify(output, level=DEEP).problems == []
    assert (rows_of(folder), sorted((folder / "out").rglob("*"))) == (good, files)


def test_rows_of_a_shard_that_another_list_has_stay(folder: Path):
    output = Output.open(str(folder / "out"))
    some = ShardList(shards_in(folder)[:1])
    output.add_inputs(some)
    assert [removal.what for removal in plan_withdrawal(output, some.id)] == [f"inputs/{some.id}.json"]


@pytest.mark.parametrize("by", ["url", "name"])
def test_the_rows_of_one_shard_are_withdrawn(folder: Path, by: str):
    good, output = rows_of(folder), Output.open(str(folder / "out"))
    for removal in plan_withdrawal(output, getattr(shards_in(folder)[0], by)):
        removal.remove()
    assert [problem.split(": ")[1][:13] for problem in verify(output).problems] == ["not tokenized"]
    assert verify(tokenize(folder), level=DEEP).problems == []
    assert rows_of(folder) == good


def test_an_unknown_withdrawal_is_refused_with_the_lists(folder: Path):
    output = Output.open(str(folder / "out"))
    [known] = output.input_lists()
    with pytest.raises(ValueError, match=rf"nothing is no list and no tokenized shard of .*; the lists are {known}"):
        plan_withdrawal(output, "nothing")


# -- one shard under two paths ------------------------------------------------------------------------------------


def moved(folder: Path, how: str) -> ShardList:
    """The same shards under another path."""
    elsewhere = folder / "elsewhere"
    if how == "copy":
        shutil.copytree(folder / "in", elsewhere)
    elif how == "folder link":
        elsewhere.symlink_to(folder / "in")
    else:
        elsewhere.mkdir()
        for tar in (folder / "in").iterdir():
            os.link(tar, elsewhere / tar.name) if how == "hard link" else (elsewhere / tar.name).symlink_to(tar)
    return find_shards(f"{elsewhere}/*.tar")


@pytest.mark.parametrize("how", ["copy", "folder link", "link", "hard link"])
def test_the_same_shards_under_another_path_are_refused_before_anything_is_written(folder: Path, how: str):
    before = sorted((folder / "out").rglob("*"))
    with pytest.raises(OutputMismatch, match=r"elsewhere/photos-000\.tar has the same name and size as .*same_names"):
        Output.create(str(folder / "out"), layout(), moved(folder, how), config={})
    assert sorted((folder / "out").rglob("*")) == before


@pytest.mark.parametrize("how", ["folder link", "link", "hard link"])
def test_one_file_under_two_paths_in_one_list_is_refused(folder: Path, how: str):
    both = ShardList([*shards_in(folder), *moved(folder, how).shards])
    with pytest.raises(OutputMismatch, match="names one file twice"):
        Output.create(str(folder / "new"), layout(), both, config={})


def test_a_shard_under_another_path_is_taken_if_the_user_says_so(folder: Path):
    copies = moved(folder, "copy")
    output = Output.create(str(folder / "out"), layout(), copies, config={}, same_names="new")
    for shard, count in zip(copies.shards, SIZES, strict=True):
        commit_shard(output, shard, token_rows(shard, count), [], {}, now=3.0, same_names="new")
    proof = verify(output, level=DEEP)
    assert proof.problems == []
    assert "12 keys occur in more than one shard" in proof.notes[0]


@pytest.mark.parametrize("level", [FOOTERS, DEEP])
def test_two_shards_with_the_same_samples_from_two_runs_are_reported(folder: Path, level: str):
    """As an older version wrote it, or with another file name."""
    output = Output.open(str(folder / "out"))
    copy = folder / "elsewhere/renamed-000.tar"
    copy.parent.mkdir()
    shutil.copy(shards_in(folder)[0].url, copy)
    [shard] = find_shards(str(copy)).shards
    output.add_inputs(ShardList([shard]))
    commit_shard(output, shard, token_rows(shard, 5)[:-1], [quarantined(shard, 4)], {}, now=3.0)
    [problem] = verify(output, level=level).problems
    assert f"{copy} holds the same samples as {shards_in(folder)[0].url}" in problem
    for removal in plan_withdrawal(output, next(iter(output.input_lists().keys() - {the_first(output)}))):
        removal.remove()
    assert verify(output, level=DEEP).problems == []


def the_first(output: Output) -> str:
    return max(output.input_lists(), key=lambda name: len(output.input_lists()[name]))


def test_keys_that_repeat_across_shards_of_one_run_are_counted_but_no_problem(tmp_path: Path):
    for i in range(2):
        write_tar(tmp_path / f"in/photos-00{i}.tar", samples_of(3))
    shards = shards_in(tmp_path)
    output = Output.create(str(tmp_path / "out"), layout(), ShardList(shards), config={})
    for i, shard in enumerate(shards):
        rows = [replace(row, key=f"{row.source_index:04d}") for row in token_rows(shard, 3)]
        commit_shard(output, shard, rows, [], {}, now=float(i))
    proof = verify(output, level=DEEP)
    assert proof.problems == []
    assert proof.notes[0].startswith(f"3 keys occur in more than one shard, such as in {shards[0].url}")


@pytest.mark.s3
def test_a_repair_and_a_withdrawal_work_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    s3.use(monkeypatch)
    shards = write_corpus(tmp_path / "in", SIZES)
    output = Output.create(f"{s3.url}/repair/out", layout(), ShardList(shards), config={})

    def commit_all() -> None:
        for shard, count in zip(shards, SIZES, strict=True):
            commit_shard(output, shard, token_rows(shard, count)[:-1], [quarantined(shard, count - 1)], {}, now=1.0)

    commit_all()
    storage.replace(output.tokens_url(shards[0].name), b"cut")
    storage.remove(output.quarantine_url(shards[1].name))
    storage.write_once(f"{output.url}/tokens/.tmp-probe-x", b"young")
    removals = plan_repair(output, verify(output, level=FILES))
    assert sorted(one.what for one in removals) == sorted(f"shard {shard.name}" for shard in shards[:2])
    for removal in removals:
        removal.remove()
    commit_all()
    proof = verify(output, level=DEEP)
    assert (proof.problems, len(proof.temporary)) == ([], 1)
    [listed] = output.input_lists()
    for removal in plan_withdrawal(output, listed):
        removal.remove()
    assert (output.committed_names(), output.input_lists()) == (set(), {})
