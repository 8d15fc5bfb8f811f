"""One local Ray for the whole session: starting one takes 5 to 20 s."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray, started as every job starts it, so that a job called in this process finds it running."""
    import ray

    from jobs import cluster

    os.environ.pop("RAY_ADDRESS", None)  # else the tests would run on whatever cluster the developer last used
    cluster.start()
    yield
    ray.shutdown()
