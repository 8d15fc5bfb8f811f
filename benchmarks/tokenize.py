"""`tokenize` through Ray compared to a plain loop, and to the bare encoder on tensors in memory.

Same model, same shards, same cores.
"""

import dataclasses
import hashlib
import io
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from PIL import Image
from torch.nn.functional import pad

from benchmarks.measure import Table, ratio_text, timed
from jobs.actors import cluster
from jobs.actors.pool import ShardWorker, map_shards
from jobs.artifacts import load_tokenizer, token_layout
from jobs.config import Config, TokensConfig, WorkersConfig, load_config
from jobs.encode import Committed, TokenizeWorker
from jobs.shards import ShardReader
from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.tokens import Output
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
COPIES = 30 if ON_GPU else 3  # of the shards of samples/train
ROUNDS = 5
BATCH_ELEMENTS = 3 * 500_000  # as the job has it by default
CPUS = os.cpu_count() or 1
BARE = "bare encoder, a worker with the GPU" if ON_GPU else "bare encoder, a worker per CPU"
BARE_WORKERS = WorkersConfig(count=1, gpus=1) if ON_GPU else WorkersConfig()
WORKERS = (
    {
        "1 worker with the GPU": WorkersConfig(count=1, cpus=CPUS, gpus=1),
        "4 workers that share the GPU": WorkersConfig(count=4, cpus=CPUS // 4, gpus=0.25),
    }
    if ON_GPU
    else {
        "1 worker, all CPUs": WorkersConfig(count=1, cpus=CPUS),
        "a worker per CPU (default)": WorkersConfig(),
    }
)


@dataclass
class Run:
    """start_s: until work on the first shard begins, with the model loaded. work_s and cpu_s: from then to the end."""

    samples: int
    start_s: float
    work_s: float
    cpu_s: float
    driver_cpu_s: float = 0.0

    @property
    def whole(self) -> float:
        return self.samples / (self.start_s + self.work_s)

    @property
    def steady(self) -> float:
        return self.samples / self.work_s


def run() -> Table:
    cluster.start()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = load_config([str(ROOT / "configs/demo.yaml")])
        make_tokenizer(config, work / "tokenizer")
        shards = replicate(find_shards(str(ROOT / "samples/train/*.tar")).shards, work / "shards")
        threads = CPUS // 4 if ON_GPU else config.tokens.decode_threads
        return measure(dataclasses.replace(config.tokens, decode_threads=threads), shards, work)


def measure(options: TokensConfig, shards: list[Shard], work: Path) -> Table:
    prove_equal(options, shards[:8], work)
    runs: dict[str, list[Run]] = {"plain loop": [], BARE: [], **{name: [] for name in WORKERS}}
    for _ in range(ROUNDS):
        runs["plain loop"].append(plain_run(options, shards, work))
        runs[BARE].append(bare_run(options, shards, work))
        for name, workers in WORKERS.items():
            runs[name].append(ray_run(options, workers, shards, work)[0])
    plain, bare = runs["plain loop"], runs[BARE]
    table = Table(
        "tokenize through Ray compared to a plain loop",
        [
            f"{len(shards)} shards (the 8 of samples/train, {COPIES} times). The model is that of configs/demo.yaml "
            f"with random weights, K=1024, on the device {DEVICE}. Each side uses {torch.get_num_threads()} torch "
            "threads in total.",
            "Plain loop: one process. webdataset reads, PIL decodes, batches are made by shape, one Parquet file per "
            "shard.",
            f"{BARE}: everything is read, decoded and batched before the clock starts, and nothing is written. This "
            "is what the encoder alone can do on this device.",
            f"Ray: `map_shards`; Ray is started before. decode_threads={options.decode_threads}. Before timing we "
            "check that the tokens of the first 8 shards are equal, key by key.",
            "start: from the call until work on the first shard begins, including loading the model and starting "
            "workers. steady: from then to the end. whole: both. CPU: CPU time of the encoding processes in the steady "
            "part.",
            f"Medians of {ROUNDS} interleaved rounds. Ratios compare runs of the same round; the range is in "
            "parentheses.",
        ],
        [
            *("side", "start, s", "whole, samples/s", "ratio to plain"),
            *("steady, samples/s", "ratio to plain", "CPU ms/sample", "ratio to plain", "steady, ratio to bare"),
        ],
    )
    for name, found in runs.items():
        cells = [name, f"{statistics.median(r.start_s for r in found):.1f}"]
        for rate in (lambda r: r.whole, lambda r: r.steady, lambda r: r.cpu_s / r.samples * 1e3):
            ours, theirs = [rate(r) for r in found], [rate(r) for r in plain]
            cells += [f"{statistics.median(ours):.4g}", "1" if found is plain else ratio_text(ours, theirs)]
        steady = [[run.steady for run in side] for side in (found, bare)]
        table.rows.append([*cells, "1" if found is bare else ratio_text(*steady)])
    table.raw = {name: [vars(r) for r in found] for name, found in runs.items()}
    return table


def make_tokenizer(config: Config, folder: Path) -> None:
    """The demo's model with random weights, and a codebook of 1024 codes fitted to its own latents."""
    torch.manual_seed(0)
    autoencoder = Autoencoder({"modality": "image", "net": config.model.net, "quantizer": config.quantizer})
    encoder = LatentEncoder(autoencoder, config.data.preprocess)
    crops = [
        picture[:96, :96] for _, _, picture in itertools.islice(pictures(ROOT / "samples/train/photos-000.tar"), 48)
    ]
    autoencoder.quantizer.fit(torch.stack(encoder.latents(crops)).reshape(-1, autoencoder.quantizer.in_dim))
    Tokenizer(autoencoder, config.data.preprocess).save_pretrained(folder)


def replicate(shards: list[Shard], folder: Path) -> list[Shard]:
    folder.mkdir()
    for i, shard in enumerate(shards * COPIES):
        shutil.copyfile(shard.url, folder / f"photos-{i:03d}.tar")
    return find_shards(f"{folder}/*.tar").shards


# -- the plain loop: what one would write without this project; only the model is ours ----------------------------


def pictures(shard: Path) -> Iterator[tuple[str, bytes, np.ndarray]]:
    for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
        picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        yield sample["__key__"], sample.get("txt", b""), np.asarray(picture)


def plain_shard(model: Autoencoder, shard: Path, out: Path, budget: int) -> None:
    rows = list(pictures(shard))
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, (_, _, picture) in enumerate(rows):
        by_shape.setdefault(picture.shape, []).append(i)
    tokens: list[np.ndarray] = [np.empty(0)] * len(rows)
    for (height, width, channels), members in by_shape.items():
        size = max(1, budget // (height * width * channels))
        for batch in (members[i : i + size] for i in range(0, len(members), size)):
            x = torch.from_numpy(np.stack([rows[i][2] for i in batch])).permute(0, 3, 1, 2).float() / 255
            x = pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
            grids = model.quantizer.encode(model.latents(x.to(DEVICE))).cpu().numpy()
            for i, grid in zip(batch, grids, strict=True):
                tokens[i] = grid
    columns = {
        "key": [key for key, _, _ in rows],
        "tokens": [grid.reshape(-1).astype(np.uint16) for grid in tokens],
        "shape": [grid.shape for grid in tokens],
        "height": [picture.shape[0] for _, _, picture in rows],
        "width": [picture.shape[1] for _, _, picture in rows],
        "txt": [text.decode() for _, text, _ in rows],
    }
    pq.write_table(pa.table(columns), out)


@torch.inference_mode()
def plain_run(options: TokensConfig, shards: list[Shard], work: Path) -> Run:
    out = Path(tempfile.mkdtemp(dir=work, prefix="plain-"))
    called = time.perf_counter()
    model = Tokenizer.from_pretrained(work / "tokenizer", DEVICE).autoencoder
    ready = time.perf_counter()

    def loop() -> None:
        for shard in shards:
            plain_shard(model, Path(shard.url), out / f"{shard.name}.parquet", BATCH_ELEMENTS)

    spent = timed(loop)
    samples = sum(pq.read_metadata(file).num_rows for file in out.iterdir())
    return Run(samples, ready - called, spent.wall_s, spent.cpu_s)


# -- through Ray ----------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """When a worker began and ended a shard, and the CPU time of its process then. All processes share the clock."""

    result: Committed
    pid: int
    began: float
    ended: float
    cpu_before: float
    cpu_after: float


class TimedWorker(TokenizeWorker):
    def process(self, shard: Shard) -> Timed:  # type: ignore[override]
        began, cpu = time.monotonic(), time.process_time()
        result = super().process(shard)
        assert isinstance(result, Committed)
        return Timed(result, os.getpid(), began, time.monotonic(), cpu, time.process_time())


class BareWorker(ShardWorker):
    """Loads the batches of all shards into memory before it begins. Copies of a shard share theirs."""

    def __init__(self, tokenizer_url: str, shards: list[Shard], options: TokensConfig, **resources: float):
        super().__init__(**resources)
        self.tokenizer = Tokenizer.from_pretrained(tokenizer_url, self.device)
        self.batches: dict[str, list[torch.Tensor]] = {}
        distinct: dict[bytes, list[torch.Tensor]] = {}
        for shard in shards:
            content = hashlib.sha256(Path(shard.url).read_bytes()).digest()
            if content not in distinct:
                distinct[content] = self._load(shard, options)
            self.batches[shard.name] = distinct[content]

    def _load(self, shard: Shard, options: TokensConfig) -> list[torch.Tensor]:
        modality, factor = self.tokenizer.modality, self.tokenizer.autoencoder.factor
        read = ShardReader(shard, modality, options).batches()
        return [modality.batch([item.decoded.array for item in batch], factor).x for batch in read]

    @torch.inference_mode()
    def process(self, shard: Shard) -> Timed:
        began, cpu = time.monotonic(), time.process_time()
        count = 0
        for x in self.batches[shard.name]:
            model = self.tokenizer.autoencoder
            count += len(model.quantizer.encode(model.latents(x.to(self.device))).cpu())
        return Timed(Committed(shard, num_rows=count), os.getpid(), began, time.monotonic(), cpu, time.process_time())


def ray_run(options: TokensConfig, workers: WorkersConfig, shards: list[Shard], work: Path) -> tuple[Run, Output]:
    layout = token_layout(Tokenizer.from_pretrained(work / "tokenizer"), options)
    output = Output.create(tempfile.mkdtemp(dir=work, prefix="ray-"), layout, ShardList(shards), {})
    return _timed_run(TimedWorker, settings_of(work, output, options), workers, shards), output


def settings_of(work: Path, output: Output, options: TokensConfig) -> dict[str, Any]:
    load = partial(load_tokenizer, str(work / "tokenizer"))
    return {"load": load, "output_url": output.url, "options": options}


def bare_run(options: TokensConfig, shards: list[Shard], work: Path) -> Run:
    settings = {"tokenizer_url": str(work / "tokenizer"), "shards": shards, "options": options}
    return _timed_run(BareWorker, settings, BARE_WORKERS, shards)


def _timed_run(worker: type[ShardWorker], settings: dict[str, Any], workers: WorkersConfig, shards: list[Shard]) -> Run:
    return run_of(lambda: list(map_shards(shards, worker, settings, workers)))


def run_of(call: Callable[[], list["Timed"]]) -> Run:
    """Times a call that maps timed workers over shards."""
    called, driver_cpu = time.monotonic(), time.process_time()
    results = call()
    driver_cpu = time.process_time() - driver_cpu
    assert not any(one.result.failure for one in results), results
    cpu_s = 0.0
    for pid in {one.pid for one in results}:  # shards overlap within a process
        mine = [one for one in results if one.pid == pid]
        cpu_s += max(one.cpu_after for one in mine) - min(one.cpu_before for one in mine)
    first, last = min(one.began for one in results), max(one.ended for one in results)
    return Run(sum(one.result.num_rows for one in results), first - called, last - first, cpu_s, driver_cpu)


def prove_equal(options: TokensConfig, shards: list[Shard], work: Path) -> None:
    """Checks that both sides give the same tokens for the same keys. This also warms up both sides."""
    plain_run(options, shards, work)
    (plain,) = work.glob("plain-*")
    _, output = ray_run(options, next(iter(WORKERS.values())), shards, work)
    for shard in shards:
        theirs = pq.read_table(plain / f"{shard.name}.parquet", columns=["key", "tokens"]).to_pydict()
        ours = pq.read_table(output.tokens_url(shard.name), columns=["key", "tokens"]).to_pydict()
        assert ours == theirs, f"{shard.url}: the two sides differ"
