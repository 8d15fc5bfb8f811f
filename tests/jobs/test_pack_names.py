"""Keys of packed samples: unambiguous, and reversible."""

import random
import re
from urllib.parse import unquote_to_bytes

import pytest
from webdataset.tariterators import base_plus_ext

from jobs.packing.names import sample_key
from pipeline.corpus.samples import NAME

PIECES = [*"ab.%", "%2E", "%25", "2E", "é", "\n", "\x1b", "\udce9", "__", "/", " "]


def random_names(count: int) -> set[str]:
    rng = random.Random(0)
    names = {"".join(rng.choices(PIECES, k=rng.randint(1, 9))) for _ in range(count)}
    return {name for name in names if not any(part in ("", ".", "..") for part in name.split("/"))}


def test_the_bytes_of_the_name_come_back_from_the_key():
    for name in random_names(5000):
        assert unquote_to_bytes(sample_key(name)) == name.encode("utf-8", "surrogateescape")


def test_our_reader_and_webdatasets_split_key_and_member_at_the_same_dot():
    for key in map(sample_key, random_names(5000)):
        for member in ("jpg", "left.jpg", "_meta.json"):
            assert base_plus_ext(f"{key}.{member}") == (key, member)
            assert (match := NAME.match(f"{key}.{member}")) is not None
            assert match.groups() == (key, member)


def test_keys_are_plain_text():
    """A terminal obeys control characters, and Parquet refuses what is not UTF-8."""
    for key in map(sample_key, random_names(5000)):
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", key)


@pytest.mark.parametrize("name", ["a", "0001", "photos/IMG_0001", "a.b/c", "100%", "日本", "a_b c"])
def test_usual_names_stay_as_they_are(name: str):
    assert sample_key(name) == name


@pytest.mark.parametrize("name", ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/./b"])
def test_names_that_leave_the_folder_are_refused(name: str):
    """A tool that unpacks the tar would write the file elsewhere."""
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        sample_key(name)
