"""A training stream ends when storage fails. It skips a shard only if the shard itself is broken."""

import bz2
import itertools
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard, find_shards
from pipeline.corpus.streams import Lanes, Position, training_samples
from pipeline.errors import ShardError, StorageError
from pipeline.storage import retries
from tests.corpus import write_corpus
from tests.s3 import start_s3


def keys(shards: list[Shard], bad: list[ShardError] | None = None) -> list[str]:
    """The keys of the first epoch."""
    reported = [] if bad is None else bad
    drawn = training_samples(shards, Lanes(1, 4), positions={}, on_bad_shard=reported.append)
    return [one.sample.key for one in itertools.takewhile(lambda one: one.before.epoch == 0, drawn)]


def test_a_failing_file_system_ends_the_stream(tmp_path: Path):
    shards = write_corpus(tmp_path)
    file = Path(shards[1].url)
    file.unlink()
    file.symlink_to(file)  # ELOOP stands for any error of the disk with an errno
    bad: list[ShardError] = []
    with pytest.raises(StorageError, match=rf"{file}: cannot be read to its end \(OSError: .*Too many levels"):
        keys(shards, bad)
    assert bad == []


def test_a_broken_compressed_shard_is_reported_and_the_others_are_read(tmp_path: Path):
    """The bzip2 reader raises OSError, as storage does, but without an errno."""
    shards = write_corpus(tmp_path)
    file = Path(shards[1].url)
    compressed = bytearray(bz2.compress(file.read_bytes()))
    compressed[100] ^= 0xFF
    file.write_bytes(compressed)
    bad: list[ShardError] = []
    assert set(keys(shards, bad)) >= {"0000", "0003", "0200", "0203"}
    assert [type(error.__cause__) for error in bad] == [OSError]


@pytest.mark.s3
def test_a_stream_that_ended_in_an_outage_resumes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with start_s3(tmp_path / "s3") as server:
        server.use(monkeypatch)
        for shard in write_corpus(tmp_path):
            storage.write_once(f"{server.url}/{Path(shard.url).name}", Path(shard.url).read_bytes())
        shards = find_shards(f"{server.url}/*.tar").shards
        undisturbed = keys(shards)
        stream = training_samples(shards, Lanes(1, 4), positions={}, on_bad_shard=pytest.fail)
        drawn = [next(stream)]
        server.kill()
        with monkeypatch.context() as patched:
            patched.setattr(retries, "RETRY_FOR_S", 0.5)
            with pytest.raises(StorageError, match="tries in"):
                drawn.extend(itertools.islice(stream, len(undisturbed)))
        server.start()  # it answers a few reads with "internal error" until its volumes are back
        after: dict[int, Position] = {0: drawn[-1].after}
        rest = training_samples(shards, Lanes(1, 4), positions=after, on_bad_shard=pytest.fail)
        drawn += itertools.islice(rest, len(undisturbed) - len(drawn))
    assert [one.sample.key for one in drawn] == undisturbed
