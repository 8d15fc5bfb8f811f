"""`tokenmill.Tokenizer` on URLs."""

import numpy as np
import pytest

import tokenmill
from pipeline import storage
from tests.corpus import encoded, picture
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
