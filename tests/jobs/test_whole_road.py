"""All commands with everything on S3, on a head and two nodes. Training gives the same result as on one machine."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.__main__ import main
from pipeline import storage
from tests.faults.cluster import Cluster, start_cluster
from tests.jobs.helpers import SAMPLES, TINY_NET
from tests.s3 import S3Server

ROOT = Path(__file__).parents[2]
WAIT_S = 300
SETTINGS = {
    "model": {"net": {**TINY_NET, "patch_size": 4}},
    "quantizer": {"name": "vp_vae", "codebook_size": 16, "dim": 2},
    "train": {"steps": 12, "batch_size": 4, "crop_size": 32, "log_every": 1, "checkpoint_every": 6},
    "codebook": {"full": True, "size": [8, 16]},
    "workers": {"count": 2, "cpus": 1},
}


@pytest.fixture
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one CPU each. They get the options of S3 from their environment."""
    with start_cluster(s3.environment()) as started:
        yield started


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.usefixtures("ray_cluster")
def test_everything_on_s3_on_two_nodes(cluster: Cluster, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {**SETTINGS, "data": {"shards": f"{SAMPLES}/heldout/*.tar"}, "run": f"{tmp_path}/run"}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(tmp_path / "local.yaml")]) == 0
    trained = (tmp_path / "run/model/model.safetensors").read_bytes()

    s3.use(monkeypatch)
    place = f"{s3.url}/whole-road"
    storage.upload(SAMPLES / "heldout", f"{place}/in")
    settings |= {"data": {"shards": f"{place}/in/*.tar"}, "run": f"{place}/run"}
    settings |= {"tokenizer": f"{place}/run/tokenizers/vp_vae-K16", "output": f"{place}/tokens"}
    (tmp_path / "s3.yaml").write_text(yaml.safe_dump(settings))
    for command in ("train", "codebook", "tokenize", "verify", "evaluate"):
        done = run(command, str(tmp_path / "s3.yaml"), cluster)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert storage.read(f"{place}/run/model/model.safetensors") == trained
    assert {name(folder) for folder in storage.list_folders(f"{place}/run/tokenizers")} == {"vp_vae-K8", "vp_vae-K16"}
    assert storage.exists(f"{place}/run/reports/evaluate-vp_vae-K16.png")


def run(command: str, file: str, cluster: Cluster) -> subprocess.CompletedProcess:
    deep = ["verify.deep=true"] if command == "verify" else []
    return subprocess.run(
        [sys.executable, "-m", "jobs", command, file, *deep],
        cwd=ROOT,
        env=cluster.client_environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1]
