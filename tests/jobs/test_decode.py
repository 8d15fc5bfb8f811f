"""Token rows back to pictures."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.__main__ import main
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import save_tiny_tokenizer, tokenize_without_ray
from tokenizer.tokenizer import Tokenizer

SIZES = {"0001": (16, 24), "0002": (17, 9), "sub/0003": (1, 1), "ä ö": (40, 33)}  # height, width


@pytest.fixture
def output(tmp_path: Path, tokenizer: str) -> Path:
    """Two shards with the same four pictures of different sizes."""
    members = [(f"{key}.png", encoded(picture(*size, seed=i))) for i, (key, size) in enumerate(SIZES.items())]
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    tokenize_without_ray(f"{tmp_path}/*.tar", tokenizer, tmp_path / "out")
    return tmp_path / "out"


def decode(output: Path, tokenizer: str, *more: str) -> int:
    return main(["decode", f"output={output}", f"tokenizer={tokenizer}", f"decode.output={output}/../png", *more])


def decoded(output: Path) -> dict[str, tuple[int, int]]:
    """File name to height and width."""
    return {file.name: Image.open(file).size[::-1] for file in (output.parent / "png").iterdir()}


def test_the_ranks_of_a_training_do_not_divide_the_rows_of_a_command(
    output: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert decode(output, tokenizer) == 0
    assert "8 files" in capsys.readouterr().out


def test_every_picture_comes_back_in_its_size(output: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]):
    assert decode(output, tokenizer) == 0
    assert "8 files" in capsys.readouterr().out
    assert decoded(output) == {
        f"{shard}-{i:06d}-{key.replace('/', '_').replace(' ', '_')}.png": size
        for shard in ("a", "b")
        for i, (key, size) in enumerate(SIZES.items())
    }


def test_a_decoded_picture_is_the_tokenizers_reconstruction(output: Path, tokenizer: str):
    decode(output, tokenizer, "decode.limit=1")
    frozen, original = Tokenizer.from_pretrained(tokenizer), picture(16, 24, seed=0)
    [expected] = frozen.decode(frozen.encode_batch([original]), [{"height": 16, "width": 24}])
    assert np.array_equal(np.asarray(Image.open(output.parent / "png/a-000000-0001.png")), expected)


def test_limit_takes_the_first_rows(output: Path, tokenizer: str):
    decode(output, tokenizer, "decode.limit=3")
    assert sorted(decoded(output)) == ["a-000000-0001.png", "a-000001-0002.png", "a-000002-sub_0003.png"]


def test_keys_choose_rows_in_every_shard(output: Path, tokenizer: str):
    assert decode(output, tokenizer, "decode.keys=[sub/0003]") == 0
    assert sorted(decoded(output)) == ["a-000002-sub_0003.png", "b-000002-sub_0003.png"]


def test_keys_of_digits_are_taken_as_they_stand(output: Path, tokenizer: str):
    assert decode(output, tokenizer, "decode.keys=[0002]") == 0
    assert sorted(decoded(output)) == ["a-000001-0002.png", "b-000001-0002.png"]


def test_an_unknown_key_is_named(output: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]):
    assert decode(output, tokenizer, "decode.keys=[sub/0003,nope]") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("has no rows with keys nope")


def test_another_tokenizer_is_refused(output: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    assert decode(output, other) == 2
    assert Tokenizer.from_pretrained(tokenizer).id in capsys.readouterr().err


def test_a_key_in_quarantine_says_so(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.tar").write_bytes(tar_bytes([("good.png", encoded(picture())), ("bad.png", b"no picture")]))
    output = tmp_path / "out"
    tokenize_without_ray(f"{tmp_path}/a.tar", tokenizer, output)
    assert decode(output, tokenizer, "decode.keys=[bad,good,nope]") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"has no rows with keys bad (in quarantine, shard {tmp_path}/a.tar: " in line
    assert line.endswith(", nope")


@pytest.mark.parametrize("key", ["x" * 240, "ä" * 127, "folder/" * 60])
def test_a_key_longer_than_a_file_name_is_decoded(tmp_path: Path, tokenizer: str, key: str):
    keys = [f"{key}{end}" for end in ("1", "2")]
    members = [(f"{name}.png", encoded(picture(16, 24))) for name in keys]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members, kind=tarfile.PAX_FORMAT))
    output = tmp_path / "out"
    tokenize_without_ray(f"{tmp_path}/a.tar", tokenizer, output)
    assert decode(output, tokenizer, *(f"decode.keys=[{','.join(keys)}]",)) == 0
    names = sorted(decoded(output))
    assert len(names) == 2
    assert all(name.startswith(f"a-00000{i}-{key[:20].replace('/', '_')}") for i, name in enumerate(names))
