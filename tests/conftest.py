"""One local Ray and one S3 server for the session, since starting Ray takes 5 to 20 s. Only marked tests start Ray."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.s3 import S3Server, start_s3

# gcsfs reads it when it is imported. Else it asks for the kind of bucket by gRPC, which the server of the tests does
# not speak, for a minute.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# Ray Train looks for checkpoints, and for the end, every 2 s otherwise. Its watcher of nodes that will be lost is
# another process for each training (2 s of CPU); the test of such a node switches it on.
QUICK_RAY_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Ray's workers have the niceness 15 otherwise, and get no processor while other tests or programs run
AS_NICE_AS_WE = {"RAY_worker_niceness": "0"}
for name, value in {**QUICK_RAY_TRAIN, **AS_NICE_AS_WE}.items():
    os.environ.setdefault(name, value)
NO_RAY = "this test starts Ray: mark it with @pytest.mark.ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    with_ray = [item for item in items if "ray_cluster" in getattr(item, "fixturenames", ())]
    unmarked = [item.nodeid for item in with_ray if item.get_closest_marker("ray") is None]
    if unmarked:
        raise pytest.UsageError(f"mark with @pytest.mark.ray what uses the fixture ray_cluster: {', '.join(unmarked)}")


@pytest.fixture(autouse=True)
def no_ray_without_its_marker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test without the marker `ray` that starts Ray, in this process or in one that it starts."""
    if request.node.get_closest_marker("ray"):
        yield
        return

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail(NO_RAY)

    monkeypatch.setenv("RAY_ADDRESS", NO_RAY)  # for new processes: Ray refuses an address that it cannot parse
    had_ray = "ray" in sys.modules  # importing it here would cost every test run a second
    for module, function in (("ray", "init"), ("jobs.actors.cluster", "start")):
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], function, refuse)
    yield
    if not had_ray and "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()
        pytest.fail(NO_RAY)


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
