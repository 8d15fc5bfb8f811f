"""`tokenmill verify`: it says which proof it gave, what that leaves open, and the exit code for programs."""

from pathlib import Path

import pytest

from jobs.__main__ import main
from pipeline.tokens import Output
from tests.corpus import write_tokens


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return write_tokens(tmp_path, (3, 2))


def flip_a_byte(output: Output) -> str:
    """In the tokens of a shard, not in the footer; returns its name."""
    name = output.commits()[0].name
    path = Path(output.tokens_url(name))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    return name


def test_the_default_says_what_it_did_not_read(output: Output, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", f"output={output.url}"]) == 0
    printed = capsys.readouterr().out
    assert "2 shards, 5 rows, 0 quarantined, tokenizer tok-a" in printed
    assert "verify: not checked: checksums, single rows, token values and keys" in printed


@pytest.mark.parametrize("flag", ["verify.deep=true", "--deep"])
def test_deep_proves_every_sample(output: Output, flag: str, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", f"output={output.url}", flag]) == 0
    printed = capsys.readouterr().out
    assert "every input sample is in exactly one row or one quarantine row" in printed
    assert "not checked" not in printed


def test_a_flipped_byte_is_found_by_reading_it(output: Output, capsys: pytest.CaptureFixture[str]):
    name = flip_a_byte(output)
    assert main(["verify", f"output={output.url}"]) == 0
    assert main(["verify", f"output={output.url}", "--deep"]) == 3
    printed = capsys.readouterr().out
    assert f"verify: tokens/{name}.parquet: the file is not the one that was committed" in printed
    assert "verify: FAILED: 1 problems" in printed


def test_leftovers_are_reported_and_harmless(output: Output, capsys: pytest.CaptureFixture[str]):
    (Path(output.url) / "tokens" / "left-000000000000.parquet").write_bytes(b"torn")
    assert main(["verify", f"output={output.url}"]) == 0
    assert "verify: 1 files belong to no manifest entry" in capsys.readouterr().out


def test_an_unknown_flag_is_refused(output: Output, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", f"output={output.url}", "--depe"]) == 2
    assert "did you mean verify.deep?" in capsys.readouterr().err
