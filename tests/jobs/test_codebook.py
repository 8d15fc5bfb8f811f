"""Codebooks from a corpus do not depend on workers, cache, or the order in which shards finish."""

import contextlib
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from jobs.__main__ import main
from jobs.codebook import _exists
from jobs.config import ConfigError, WorkersConfig
from jobs.latents.sharded import CachedLatents
from pipeline.tokens import Output, TokenDataset
from tests.corpus import write_tar
from tests.jobs.helpers import TINY_NET, children_named, jpegs, rows_of
from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.kmeans import kmeans
from tokenizer.clustering.latents import InMemory, LatentBatch
from tokenizer.quantizers.base.quantizer import build_quantizer
from tokenizer.tokenizer import Tokenizer

SIZE = 24
QUANTIZER = {"name": "vp_vae", "codebook_size": SIZE, "dim": 3, "balance": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's folder at run/model, and five shards with bad samples in two of them."""
    folder = tmp_path_factory.mktemp("codebook")
    torch.manual_seed(0)
    Autoencoder({"modality": "image", "net": {**TINY_NET, "patch_size": 4}, "quantizer": QUANTIZER}).eval().save(
        folder / "run/model"
    )
    for shard in range(5):
        members = [(f"{shard}-{name}", data) for name, data in jpegs(12 + shard)]
        if shard in (1, 3):
            members.insert(4, (f"{shard}-bad.jpg", b"no picture"))
        members += [(name.replace(".jpg", ".txt"), name.encode()) for name, _ in members[:3]]
        write_tar(folder / f"in/{shard}.tar", sorted(members))
    return folder


def config(place: Path, run: str, **others) -> str:
    """Path of a YAML file with its own run and the shared model. One worker, if `others` do not say how many."""
    model = place / run / "model"
    if not model.exists():
        model.parent.mkdir()
        model.symlink_to(place / "run/model")
    settings = {"run": str(place / run), "data": {"shards": f"{place}/in/*.tar"}, "quantizer": QUANTIZER}
    settings |= {"workers": {"count": 1}, **others}
    (place / f"{run}.yaml").write_text(yaml.safe_dump(settings))
    return str(place / f"{run}.yaml")


def tokenizer_of(place: Path, run: str, size: int = SIZE) -> Tokenizer:
    return Tokenizer.from_pretrained(place / run / f"tokenizers/vp_vae-K{size}")


def report_of(place: Path, run: str, size: int = SIZE) -> dict:
    return json.loads((place / run / f"reports/codebook-vp_vae-K{size}.json").read_text())


def cached_rows(place: Path, run: str) -> np.ndarray:
    cache = Output.open(str(place / run / "latents"))
    tables = [pq.read_table(io.BytesIO(cache.read_tokens(entry.name))) for entry in cache.commits()]
    flat = [np.frombuffer(row, np.float32) for table in tables for row in table["tokens"].to_pylist()]
    return np.concatenate(flat).reshape(-1, QUANTIZER["dim"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_codebook_depends_neither_on_workers_nor_on_cache_nor_on_streaming(place: Path):
    """One worker and two; a sample sent to the driver, a sample of the cache, and k-means over the whole cache."""
    ids = {}
    for run, workers, codebook in (
        ("sampled-1", 1, {"max_latents": 300}),
        ("sampled-2", 2, {"max_latents": 300}),
        ("cached", 1, {"max_latents": 300, "cache": True}),
        ("full-1", 1, {"max_latents": 300, "full": True}),
        ("full-2", 2, {"max_latents": 300, "full": True}),
    ):
        assert main(["codebook", config(place, run, workers={"count": workers}, codebook=codebook)]) == 0
        ids[run] = tokenizer_of(place, run).id
    assert ids["sampled-1"] == ids["sampled-2"] == ids["cached"]
    assert ids["full-1"] == ids["full-2"] != ids["cached"]
    assert report_of(place, "cached")["num_latents"] == 300
    rows = cached_rows(place, "full-2")
    assert report_of(place, "full-2")["num_latents"] == len(rows)

    table = tokenizer_of(place, "full-2").autoencoder.quantizer.codebook
    error = torch.cdist(torch.from_numpy(rows).double(), table.double()).min(dim=1).values.square().mean()
    assert report_of(place, "full-2")["mse"] == pytest.approx(float(error), rel=1e-5)
    alone = [kmeans(torch.from_numpy(rows), SIZE, seed=seed).mse[-1] for seed in range(5)]  # in memory, in one process
    assert float(error) < max(alone) * 1.02  # no worse than the local minima


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_more_sizes_come_from_a_cache_whose_shards_are_gone_and_tokens_too(place: Path, capsys):
    """The second command and `tokenize` read no images, because the shards are empty files by then."""
    settings = {"codebook": {"cache": True, "size": [8, SIZE]}, "tokens": {"passthrough": ["txt"]}}
    file = config(place, "again", **settings)
    assert main(["codebook", file]) == 0
    chosen = f"tokenizer={place}/again/tokenizers/vp_vae-K8"
    assert main(["tokenize", file, chosen, f"output={place}/direct", "tokens.max_bad_fraction=1"]) == 0

    contents = {tar: (tar.read_bytes(), tar.stat()) for tar in (place / "in").glob("*.tar")}
    try:
        for tar, (data, stat) in contents.items():
            tar.write_bytes(bytes(len(data)))
            os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        capsys.readouterr()
        assert main(["codebook", file, "codebook.size=16"]) == 0
        assert "5 shards, 5 done before, 0 to do" in capsys.readouterr().out
        from_cache = [
            f"tokens.latents={place}/again/latents",
            f"output={place}/from-cache",
            "tokens.max_bad_fraction=1",
        ]
        assert main(["tokenize", file, chosen, *from_cache]) == 0
    finally:
        for tar, (data, stat) in contents.items():
            tar.write_bytes(data)
            os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rows_of(place / "from-cache").equals(rows_of(place / "direct"))
    direct, cached = Output.open(f"{place}/direct"), Output.open(f"{place}/from-cache")
    for one, other in zip(direct.commits(), cached.commits(), strict=True):
        assert one.tokens_sha256 == other.tokens_sha256  # including text, sizes and footer
        assert one.quarantine_sha256 == other.quarantine_sha256
    assert sum(entry.num_quarantined for entry in cached.commits()) == 2
    quantizer = Tokenizer.from_pretrained(place / "again/tokenizers/vp_vae-K8").autoencoder.quantizer
    for latents, row in zip(TokenDataset(f"{place}/again/latents"), TokenDataset(direct.url), strict=True):
        assert latents["key"] == row["key"]
        assert np.array_equal(quantizer.encode(torch.from_numpy(latents["tokens"])).numpy(), row["tokens"])
    assert main(["verify", file, chosen, f"output={place}/from-cache", "verify.deep=true"]) == 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "quantizer",
    [
        {"name": "vp_vae", "codebook_size": 16, "dim": 3, "balance": 0.5},
        {"name": "residual", "num_quantizers": 2, "base": {"name": "vp_vae", "codebook_size": 8, "dim": 3}},
    ],
    ids=lambda quantizer: quantizer["name"],
)
def test_latents_on_workers_give_the_same_result_as_in_memory(place: Path, quantizer: dict):
    """With weights, with residual layers, with several shards in a group, and with a killed worker."""
    assert main(["codebook", config(place, "lying", codebook={"cache": True})]) == 0
    cache = Output.open(str(place / "lying/latents"))
    num_latents = len(cached_rows(place, "lying"))
    codebooks = []
    for count, killed in ((1, False), (2, True)):
        workers = WorkersConfig(count=count)
        latents = CachedLatents.of(cache, cache.commits(), 3, num_latents, seed=0, workers=workers, num_groups=2)
        assert latents is not None
        fitted = build_quantizer(quantizer).eval()
        with killed_while_summing() if killed else contextlib.nullcontext():
            fitted.fit(latents)
        codebooks.append(fitted.codebook)
    assert torch.equal(*codebooks)
    alone = build_quantizer(quantizer).eval()
    alone.fit(SampledInMemory(latents.drawn))
    torch.testing.assert_close(codebooks[0], alone.codebook, rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def killed_while_summing() -> Iterator[None]:
    """Kills one of Ray's processes that map a function over the latents, and asserts that it found one."""
    killed, over = [], threading.Event()

    def kill() -> None:
        while not killed and not over.wait(0.02):
            for process in children_named("ray::Map")[:1]:
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert killed


class SampledInMemory(InMemory):
    """All latents in the order of the drawn sample; a sample is the first of them."""

    def sample(self, count: int, seed: int) -> LatentBatch:
        weights = self.batch.weights
        return LatentBatch(self.batch.latents[:count], None if weights is None else weights[:count])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_codebook_made_with_other_settings_is_refused(place: Path, capsys):
    file = config(place, "sampled-otherwise", codebook={"max_latents": 200})
    assert main(["codebook", file]) == 0
    assert main(["codebook", file]) == 0
    assert "already exists" in capsys.readouterr().out
    assert main(["codebook", file, "codebook.full=true"]) == 2
    assert "was made with another codebook.full: False, not True; delete it" in capsys.readouterr().err
    assert main(["codebook", file, "codebook.size=5000"]) == 2
    told = "a codebook of 5000 codes needs as many latents, but there are 200; lower codebook.size"
    assert told in capsys.readouterr().err
    assert main(["codebook", file, f"data.shards={place}/in/[01].tar"]) == 2
    assert "another data.shards" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_broken_shard_is_reported_and_codebook_full_needs_all_shards(place: Path, capsys):
    broken = place / "broken"
    broken.mkdir()
    for tar in (place / "in").glob("*.tar"):
        (broken / tar.name).write_bytes(tar.read_bytes())
    (broken / "4.tar").write_bytes((broken / "4.tar").read_bytes()[:20_000])
    file = config(place, "with-broken", data={"shards": f"{broken}/*.tar"})
    assert main(["codebook", file, "codebook.full=true"]) == 3
    assert not (place / "with-broken/tokenizers").exists()
    assert "incomplete: 1 shards failed; fix the cause" in capsys.readouterr().out
    assert main(["codebook", file]) == 3
    assert report_of(place, "with-broken")["made_by"]["num_failed_shards"] == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_warm_start_begins_with_the_next_smaller_size_in_a_later_run_too(place: Path):
    assert main(["codebook", config(place, "fresh", codebook={"size": [SIZE, 60]})]) == 0
    assert main(["codebook", config(place, "warm", codebook={"size": [60, SIZE], "warm_start": True})]) == 0
    # The smallest size has no smaller one to start from.
    assert tokenizer_of(place, "warm").id == tokenizer_of(place, "fresh").id
    whole = tokenizer_of(place, "warm", 60).id
    assert whole != tokenizer_of(place, "fresh", 60).id
    shutil.rmtree(place / "warm/tokenizers/vp_vae-K60")  # as if the command had been killed here
    assert main(["codebook", config(place, "warm", codebook={"size": [60, SIZE], "warm_start": True})]) == 0
    assert tokenizer_of(place, "warm", 60).id == whole
    warm, fresh = report_of(place, "warm", 60), report_of(place, "fresh", 60)
    assert warm["mse"] == pytest.approx(fresh["mse"], rel=0.15)
    assert 0 < fresh["perturbation_ratio"] < 3


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tokens_of_another_encoder_or_of_missing_shards_are_refused(place: Path, tokenizer: str, capsys):
    file = config(place, "other", codebook={"cache": True}, data={"shards": f"{place}/in/[01].tar"})
    assert main(["codebook", file]) == 0
    latents = [f"tokens.latents={place}/other/latents", f"output={place}/refused"]
    assert main(["tokenize", file, *latents, f"tokenizer={tokenizer}"]) == 2
    assert "the nets or data.preprocess differ" in capsys.readouterr().err
    assert main(["tokenize", file, *latents, f"data.shards={place}/in/*.tar"]) == 2
    assert "lacks 3 of 5 shards" in capsys.readouterr().err
    assert main(["tokenize", file, *latents, "tokens.passthrough=[txt]"]) == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "now"), [({}, {"member": "left.jpg"}), ({"member": "left.jpg"}, {})])
def test_a_codebook_of_another_member_is_refused(tmp_path: Path, before: dict[str, str], now: dict[str, str]):
    (tmp_path / "tokenizers/a").mkdir(parents=True)
    (tmp_path / "tokenizers/a/tokenizer.json").write_text("{}")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/codebook-a.json").write_text(json.dumps({"made_by": before}))
    assert _exists(str(tmp_path / "tokenizers/a"), before)
    with pytest.raises(ConfigError, match=r"was made with another data\.member"):
        _exists(str(tmp_path / "tokenizers/a"), now)
