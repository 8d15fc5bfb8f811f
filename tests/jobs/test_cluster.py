"""How many CPUs each rank gets; addresses without a cluster; workers for which a machine is too small."""

import socket

import pytest

from jobs.actors import cluster
from jobs.actors.cluster import even_share
from jobs.config import ConfigError, WorkersConfig


@pytest.mark.parametrize(
    ("nodes", "ranks", "expected"),
    [([8], 2, 4), ([8, 8], 3, 4), ([1, 1], 1, 1), ([0, 4], 1, 4), ([2], 4, 1), ([16, 8], 3, 8)],
)
def test_every_rank_fits_on_a_node(nodes: list[int], ranks: int, expected: int):
    assert even_share(nodes, ranks) == expected


def test_an_address_where_nothing_listens_is_a_mistake_within_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {address}, but nothing answers there"):
            cluster._check_reachable(address)


@pytest.mark.parametrize("address", ["nowhere.invalid:6379", "127.0.0.1:99999"])
def test_an_address_that_cannot_exist_is_a_mistake_at_once(address: str):
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {address}"):
        cluster._check_reachable(address)


def test_an_address_that_answers_is_accepted():
    with socket.create_server(("127.0.0.1", 0)) as server:
        cluster._check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
    cluster._check_reachable("auto")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("workers", "ranks", "told"),
    [
        (WorkersConfig(gpus=1), 1, "a worker needs 1 GPU, but this machine has 0; lower workers.count, workers.cpus"),
        (WorkersConfig(cpus=1000), 1, "a worker needs 1000 CPUs, but this machine has"),
        (WorkersConfig(), 1000, "1000 workers need 1000 CPUs, but this machine has"),
    ],
)
def test_workers_that_this_machine_will_never_hold_are_a_mistake(workers: WorkersConfig, ranks: int, told: str):
    with pytest.raises(ConfigError, match=told):
        cluster.check_room(workers, ranks)


@pytest.mark.parametrize(
    ("free", "fits"),
    [
        ({"CPU": 2.0, "GPU": 1.0}, True),
        ({"CPU": 1.5, "GPU": 1.0}, False),
        ({"CPU": 4.0, "GPU": 0.5}, False),
        ({}, False),
    ],
)
def test_whether_a_worker_has_room_decides_what_the_waiting_line_says(free: dict[str, float], fits: bool):
    assert cluster.has_room(WorkersConfig(cpus=2, gpus=1), free) is fits


def test_a_machine_too_busy_to_start_ray_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What Ray 2.60 raises then is a plain Exception."""
    import ray

    def too_slow(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)
    with pytest.raises(cluster.NoRoom, match=r"Ray did not start within 0 s: this machine is too busy"):
        cluster._init("local")
