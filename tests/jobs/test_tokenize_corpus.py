"""Shards to token shards through Ray, with every kind of bad input."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.artifacts import token_layout
from jobs.config import TokensConfig
from jobs.shards import encode_shard
from jobs.tokenize_corpus import warn_of_absent
from pipeline.corpus.shards import Shard, find_shards
from pipeline.tokens import Output
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import (
    SAMPLES,
    jpegs,
    rows_of,
    rows_without_ray,
    save_tiny_tokenizer,
    tokenize_without_ray,
)
from tokenizer.tokenizer import Tokenizer

GOOD = jpegs(6)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, but which holds few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def without_end_blocks(tar: bytes) -> bytes:
    return tar[: -len(tar) + 512 * -(-len(tar.rstrip(b"\0")) // 512)]


# -- one shard, without Ray ---------------------------------------------------------------------------------------


def test_a_real_shard_gives_a_row_for_each_photo(tokenizer: str):
    shard = find_shards(str(SAMPLES / "heldout/photos-001.tar")).shards[0]
    found = encode_shard(shard, Tokenizer.from_pretrained(tokenizer), TokensConfig())
    rows, quarantined, seconds = found.rows, found.quarantined, found.seconds
    assert quarantined == []
    assert [row.source_index for row in rows] == list(range(44))
    assert all(row.tokens.shape == (-(-row.size["height"] // 8), -(-row.size["width"] // 8)) for row in rows)
    assert len(np.unique(np.concatenate([row.tokens.ravel() for row in rows]))) > 32  # the pictures get different codes
    assert seconds["encode"] > 0


@pytest.mark.parametrize("budget", [1e-6, 0.017, 300.0])
def test_tokens_do_not_depend_on_how_pictures_are_batched(tokenizer: str, tmp_path: Path, budget: float):
    mixed = GOOD + [(f"wide-{name}", data) for name, data in jpegs(5, 24, 64)]
    (tmp_path / "mixed.tar").write_bytes(tar_bytes(mixed))
    shard, frozen = Shard(str(tmp_path / "mixed.tar"), None), Tokenizer.from_pretrained(tokenizer)
    expected = encode_shard(shard, frozen, TokensConfig()).rows
    rows = encode_shard(shard, frozen, TokensConfig(batch_budget=budget)).rows
    assert [row.key for row in rows] == [row.key for row in expected]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rows, expected, strict=True))


def test_packed_tokens_and_passthrough_arrive(tokenizer: str, tmp_path: Path):
    options = TokensConfig(encoding="packed", passthrough=["txt", "json"])
    tokenize_without_ray(f"{SAMPLES}/heldout/photos-001.tar", tokenizer, tmp_path, options)
    [file] = (tmp_path / "tokens").glob("*.parquet")
    table = pq.read_table(file)
    assert str(table.schema.field("tokens").type) == "binary"
    assert {text is None for text in table["txt"].to_pylist()} == {True, False}  # some photos have no caption
    assert all("licence" in text for text in table["json"].to_pylist())
    assert main(["verify", f"output={tmp_path}", "verify.deep=true"]) == 0


# -- a corpus with every kind of bad input -------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six shards that succeed (two with bad samples, one empty), and seven that cannot be read to their end."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    good = tar_bytes(GOOD)
    second_member = 512 + 512 * -(-len(GOOD[0][1]) // 512)
    shards = {
        "good": good,
        "keys": tar_bytes([GOOD[0], GOOD[1], ("0000.txt", b"too late"), GOOD[2], ("0002.jpg", b"again"), GOOD[3]]),
        "samples": tar_bytes(
            [
                GOOD[0],
                ("textonly.txt", b"no picture"),
                ("two.jpg", GOOD[1][1]),
                ("two.png", encoded(picture())),
                ("broken.jpg", GOOD[1][1][:700]),
                ("noise.jpg", bytes(range(256)) * 4),
                ("empty.jpg", b""),
                ("bomb.png", png_of_size(30_000, 30_000)),
                ("large.png", png_of_size(9_000, 9_000)),
                ("zero.png", png_of_size(0, 0)),
                ("thin.png", encoded(np.zeros((20_000, 1, 3), dtype=np.uint8))),
                ("pixel.png", encoded(np.zeros((1, 1, 3), dtype=np.uint8))),
                ("\udcff\udcfe.jpg", GOOD[1][1]),
                ("noextension", b"?"),
                GOOD[5],
            ],
            errors="surrogateescape",
        ),
        "nothing": tar_bytes([]),
        "badheader": good[: second_member + 20] + b"\xff" * 40 + good[second_member + 60 :],
        "cutheader": good[: second_member + 100],
        "cutdata": good[: second_member + 512 + 100],
        "noend": without_end_blocks(good),
        "zerobytes": b"",
    }
    for name, data in shards.items():
        (folder / f"{name}.tar").write_bytes(data)
    forbidden = folder / "forbidden.tar"
    if os.geteuid() == 0:  # root may read every file, so this is a folder
        forbidden.mkdir()
    else:
        forbidden.write_bytes(good)
        forbidden.chmod(0)
    return folder


SUCCEEDS = {"good": 0, "keys": 2, "samples": 11, "nothing": 0}  # shard -> quarantined samples
BREAKS = {
    "badheader": "broken header",
    "cutheader": "header",
    "cutdata": "unexpected end of data",
    "noend": "end-of-archive",
    "zerobytes": "empty",
    "forbidden": "forbidden.tar",
    "missing": "there is no such shard",
}
QUARANTINED = {  # of the shard "samples": stage and a word of the message
    "textonly": ("decode", "needs one member"),
    "two": ("decode", "has several image members: jpg, png; set data.member to one of them"),
    "broken": ("decode", "truncated"),
    "noise": ("decode", "not a picture"),
    "empty": ("decode", "the file is empty"),
    "bomb": ("decode", "30000x30000: more pixels than max_pixels"),
    "large": ("decode", "max_pixels"),
    "zero": ("decode", "a picture"),
    "thin": ("decode", "max_side"),
    r"\xff\xfe": ("read", "not UTF-8"),
    "noextension": ("read", "not KEY.EXTENSION"),
}


def command(corpus: Path, tokenizer: str, output: Path, *more: str) -> list[str]:
    shards = f"data.shards=[{corpus}/*.tar,'{corpus}/{{good,missing,forbidden}}.tar']"
    return ["tokenize", f"tokenizer={tokenizer}", shards, f"output={output}", *more]


def quarantine_of(output: Path, shard: str) -> dict[str, tuple[str, str]]:
    [file] = (output / "quarantine").glob(f"{shard}-*.parquet")
    return {row["key"]: (row["stage"], row["message"]) for row in pq.read_table(file).to_pylist()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_is_reported_and_repaired_and_verified(
    corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One long test, since each step needs the files of the step before."""
    output = tmp_path / "out"
    assert main(command(corpus, tokenizer, output)) == 3
    printed = capsys.readouterr().out
    assert "7 shards failed" in printed
    assert "exit 3" in printed.splitlines()[-1]

    entries = {Path(entry.source_shard).stem: entry for entry in Output.open(str(output)).commits()}
    assert {name: entry.num_quarantined for name, entry in entries.items()} == SUCCEEDS
    assert {(row["source_shard"].rsplit("/", 1)[1], row["key"]) for row in rows_of(output).to_pylist()} == {
        *(("good.tar", f"{i:04d}") for i in range(6)),
        *(("keys.tar", f"{i:04d}") for i in (0, 1, 3)),
        *(("samples.tar", key) for key in ("0000", "0005", "pixel")),
    }
    why = quarantine_of(output, "samples")
    assert set(why) == set(QUARANTINED)
    for key, (stage, word) in QUARANTINED.items():
        assert why[key][0] == stage, key
        assert word in why[key][1], key
    assert {key for key, (stage, _) in quarantine_of(output, "keys").items() if stage == "read"} == {"0000", "0002"}

    assert main(["status", f"output={output}"]) == 0
    status = capsys.readouterr().out
    assert "4 done, 7 left (7 failed last time)" in status
    for name, word in BREAKS.items():
        [line] = [line for line in status.splitlines() if f"/{name}.tar" in line]
        assert word in line
    assert main(["verify", f"output={output}"]) == 3
    assert "missing.tar: not tokenized" in capsys.readouterr().out

    forbidden = corpus / "forbidden.tar"
    if forbidden.is_dir():
        forbidden.rmdir()
    else:
        forbidden.chmod(0o644)
    for name in BREAKS:
        (corpus / f"{name}.tar").write_bytes(tar_bytes(GOOD))
    assert main(command(corpus, tokenizer, output)) == 4  # 13 bad samples of 67 are more than the 1 % of the default
    assert "max_bad_fraction" in capsys.readouterr().out
    assert main(command(corpus, tokenizer, output, "tokens.max_bad_fraction=0.5")) == 0
    assert main(["verify", f"output={output}", "verify.deep=true"]) == 0
    assert main(["status", f"output={output}"]) == 0
    assert "11 done, 0 left (0 failed last time)" in capsys.readouterr().out
    assert rows_of(output).equals(rows_without_ray([f"{corpus}/*.tar"], tokenizer))


# -- workers ------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_rows_do_not_depend_on_the_number_of_workers(tokenizer: str, tmp_path: Path):
    for i in range(3):
        members = [(f"{i}-{name}", data) for name, data in jpegs(12, 80 + i, 100)]
        (tmp_path / f"{i}.tar").write_bytes(tar_bytes(members))
    shards = f"{tmp_path}/*.tar"
    expected = rows_without_ray(shards, tokenizer)
    for count in (1, 2):
        output, workers = f"output={tmp_path}/{count}", f"workers.count={count}"
        assert main(["tokenize", f"tokenizer={tokenizer}", f"data.shards={shards}", output, workers]) == 0
        assert rows_of(tmp_path / str(count)).equals(expected)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tokenizer: str, tmp_path: Path) -> list[str]:
    """A command with nothing left to do, so that it needs no Ray."""
    (tmp_path / "a.tar").write_bytes(tar_bytes(GOOD))
    tokenize_without_ray(f"{tmp_path}/a.tar", tokenizer, tmp_path / "out")
    return ["tokenize", f"tokenizer={tokenizer}", f"data.shards={tmp_path}/a.tar", f"output={tmp_path}/out"]


def test_the_same_command_again_has_nothing_to_do(finished: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(finished) == 0
    assert "1 done before, 0 to do" in capsys.readouterr().out


def test_an_output_of_another_tokenizer_is_refused(
    finished: list[str], tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    assert main([*finished, f"tokenizer={other}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert Tokenizer.from_pretrained(tokenizer).id in line
    assert Tokenizer.from_pretrained(other).id in line


@pytest.mark.parametrize("change", ["tokens.encoding=packed", "tokens.passthrough=[txt]", "data.member=jpg"])
def test_an_output_of_another_layout_is_refused(finished: list[str], change: str, capsys: pytest.CaptureFixture[str]):
    assert main([*finished, change]) == 2
    assert "holds another dataset" in capsys.readouterr().err


def test_a_member_that_is_no_picture_is_refused(finished: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*finished, "data.member=txt"]) == 2
    assert "data.member is 'txt'; it must end in one of: " in capsys.readouterr().err


def test_a_cache_of_another_member_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    golden = Path(__file__).parents[1] / "golden"
    [tokenizer] = (golden / "run/tokenizers").iterdir()
    given = [f"data.shards={golden}/in/photos-*.tar", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}"]
    assert main(["tokenize", *given, f"tokens.latents={golden}/run/latents", "data.member=jpg"]) == 2
    assert "was made with data.member='', not 'jpg'" in capsys.readouterr().err


def test_the_end_counts_null_captions_and_members_that_were_passed_over(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    members = [*GOOD[:3], ("._0002.txt", b"fork"), ("0002.txt", "café".encode("latin-1"))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    options = TokensConfig(passthrough=["txt", "cls"])
    output = tokenize_without_ray(str(tmp_path / "a.tar"), tokenizer, tmp_path / "out", options)
    given = [f"data.shards={tmp_path}/a.tar", f"tokenizer={tokenizer}", f"output={output.url}"]
    assert main(["tokenize", *given, "tokens.passthrough=[txt,cls]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tokenize: all 3 rows without cls (tokens.passthrough), which is null there" in lines
    assert "tokenize: 2 rows without txt (tokens.passthrough), which is null there" in lines
    assert "tokenize: 1 rows whose txt (tokens.passthrough) is not UTF-8, which is null there" in lines
    assert "tokenize: 1 members passed over: macOS metadata (._*, .DS_Store, __MACOSX)" in lines
    assert main(["status", f"output={output.url}"]) == 0
    assert "3 rows without cls (tokens.passthrough), which is null there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "warned"),
    [(["jpg"], []), (["text"], ["text"]), (["txt", "cls", "text"], ["cls", "text"]), ([], [])],
)
def test_a_passthrough_that_no_first_sample_has_is_said_before_the_work(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: list[str], warned: list[str]
):
    (tmp_path / "a.tar").write_bytes(tar_bytes([*GOOD[:2], ("0001.txt", b"caption")]))
    options = TokensConfig(passthrough=wanted)
    inputs, frozen = find_shards(str(tmp_path / "a.tar")), Tokenizer.from_pretrained(tokenizer)
    output = Output.create(str(tmp_path / "out"), token_layout(frozen, options), inputs, config={})
    warn_of_absent(inputs.shards, output, options)
    lines = capsys.readouterr().out.splitlines()
    start = f"tokenize: warning: none of the first 2 samples of {tmp_path}/a.tar has a member"
    assert lines == [f"{start} {name} (tokens.passthrough); they have: jpg, txt" for name in warned]


def test_a_shard_that_was_replaced_after_its_commit_is_refused(
    finished: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.tar").write_bytes(tar_bytes(GOOD * 20))
    assert main(finished) == 2
    assert "was replaced" in capsys.readouterr().err


def test_a_tokenizer_whose_files_were_mixed_up_is_refused(
    finished: list[str], tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mixed = Path(save_tiny_tokenizer(tmp_path / "mixed", seed=1))
    (mixed / "codebook.safetensors").write_bytes((Path(tokenizer) / "codebook.safetensors").read_bytes())
    assert main([*finished, f"tokenizer={mixed}"]) == 2
    assert "changed or mixed up" in capsys.readouterr().err
