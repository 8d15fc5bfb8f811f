"""`tokenmill.Tokenizer` on URLs."""

from pathlib import Path

import numpy as np
import pytest

import tokenmill
from pipeline import storage
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import jpegs, tokenize_without_ray
from tests.s3 import S3Server


@pytest.mark.s3
def test_a_tokenizer_and_its_inputs_may_be_urls(tokenizer: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch)
    storage.upload(tokenizer, f"{s3.url}/api/tokenizer")
    storage.write_once(f"{s3.url}/api/a.png", encoded(picture()))
    loaded = tokenmill.Tokenizer.from_pretrained(f"{s3.url}/api/tokenizer")
    assert type(loaded) is tokenmill.Tokenizer
    assert loaded.id == tokenmill.Tokenizer.from_pretrained(tokenizer).id
    assert np.array_equal(loaded(f"{s3.url}/api/a.png"), loaded(picture()))


def test_the_tokens_of_a_file_are_those_of_the_job(tokenizer: str, tmp_path: Path):
    """One file alone, and several of other sizes together, have the tokens that `tokenize` writes for them."""
    members = [*jpegs(3), ("large.png", encoded(picture(50, 70))), ("small.webp", encoded(picture(9, 13), "webp"))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    output = tokenize_without_ray(str(tmp_path / "a.tar"), tokenizer, tmp_path / "tokens")
    rows = {row["key"]: row["tokens"] for row in tokenmill.TokenDataset(output.url)}
    loaded = tokenmill.Tokenizer.from_pretrained(tokenizer)
    together = loaded([data for _, data in members])
    for (name, data), tokens in zip(members, together, strict=True):
        assert np.array_equal(loaded(data), rows[Path(name).stem])
        assert np.array_equal(tokens, rows[Path(name).stem])
