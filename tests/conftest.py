"""One local Ray and one S3 server for the whole session: starting Ray takes 5 to 20 s."""

import os
from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, start_s3

# Ray Train looks for checkpoints, and for the end, every 2 s otherwise
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray, started as every job starts it, so that a job called in this process finds it running."""
    import ray

    from jobs.actors import cluster

    os.environ.pop("RAY_ADDRESS", None)  # else the tests would run on whatever cluster the developer last used
    cluster.start()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket; `s3.use(monkeypatch)` makes this process talk to it."""
    with start_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server
