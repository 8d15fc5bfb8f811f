"""A tiny tokenizer, the rows of an output, and drivers that tests can kill."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray  # noqa: F401  puts its bundled psutil on the path
import torch

import psutil  # isort: skip
from jobs.actors.run import EncodeWorker
from jobs.artifacts import load_tokenizer, token_layout
from jobs.config import TokensConfig
from jobs.encode import CachedTokenizeWorker, TokenizeWorker
from jobs.shards import encode_shard
from pipeline.corpus.shards import find_shards
from pipeline.tokens import Output
from tests.corpus import encoded, picture
from tests.faults.cluster import without_ray
from tokenizer.autoencoder import Autoencoder
from tokenizer.tokenizer import Tokenizer

W = TypeVar("W", bound=EncodeWorker)
SAMPLES = Path(__file__).parents[2] / "samples"
TINY_NET = {"name": "vqgan", "width": 8, "multipliers": [1, 1], "res_blocks": 1, "channels": 8, "attention": False}
ROWS = ("key", "source_shard", "source_index", "tokens", "shape", "height", "width")


def save_tiny_tokenizer(folder: Path, seed: int = 0, width: int = 8) -> str:
    """VP-VAE with an untrained net of factor 8 and 64 codes, fitted to the latents of a few images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = {**TINY_NET, "width": width, "patch_size": 4}
        quantizer = {"name": "vp_vae", "codebook_size": 64, "dim": 2}
        autoencoder = Autoencoder({"modality": "image", "net": net, "quantizer": quantizer}).eval()
        x = torch.rand(32, 3, 1, 1) + 0.3 * torch.rand(32, 3, 64, 64)
        with torch.no_grad():
            autoencoder.quantizer.fit(autoencoder.latents(x).flatten(0, -2))
    Tokenizer(autoencoder, {}).save_pretrained(folder)
    return str(folder)


@functools.cache
def jpegs(count: int, height: int = 40, width: int = 48) -> list[tuple[str, bytes]]:
    """Members of `count` samples with one image each."""
    return [(f"{i:04d}.jpg", encoded(picture(height, width, seed=i), "jpeg")) for i in range(count)]


def rows_of(output: str | Path) -> pa.Table:
    """Every committed token row, sorted by shard and position."""
    there = Output.open(str(output))
    tables = [pq.read_table(there.tokens_url(entry.name), columns=list(ROWS)) for entry in there.commits()]
    rows = pa.concat_tables(tables).sort_by([("source_shard", "ascending"), ("source_index", "ascending")])
    return rows.replace_schema_metadata(None).combine_chunks()


def rows_without_ray(shards: str | list[str], tokenizer_url: str) -> pa.Table:
    """The rows that these shards should give, made in this process with `encode_shard`."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_url)
    layout = token_layout(tokenizer, TokensConfig())
    tables = []
    for shard in find_shards(shards).shards:
        rows = encode_shard(shard, tokenizer, TokensConfig()).rows
        tables.append(layout.to_table(rows, shard.url).select(list(ROWS)).replace_schema_metadata(None))
    return pa.concat_tables(tables).combine_chunks()


def tokenize_without_ray(
    shards: str | list[str],
    tokenizer_url: str,
    output_url: str | Path,
    options: TokensConfig | None = None,
    member: str = "",
) -> Output:
    """Does the work of the job in this process: the job's own worker processes each shard without a commit."""
    options = options or TokensConfig()
    inputs = find_shards(shards)
    layout = token_layout(Tokenizer.from_pretrained(tokenizer_url), options, member)
    output = Output.create(str(output_url), layout, inputs, config={})
    kind = CachedTokenizeWorker if options.latents else TokenizeWorker
    worker = here(kind, tokenizer_url, output_url=output.url, options=options, member=member)
    done = output.committed_names()
    failures = [worker.process(shard).failure for shard in inputs.shards if shard.name not in done]
    assert not any(failures), failures
    return output


def here(worker: type[W], tokenizer_url: str, **settings: Any) -> W:
    """A worker of a job, in this process, on one CPU."""
    load = functools.partial(load_tokenizer, tokenizer_url)
    return worker(load=load, **{"options": TokensConfig(), "num_cpus": 1, "num_gpus": 0, **settings})


def children_named(part: str) -> list[psutil.Process]:
    """Child processes whose name contains `part`."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if part in child.name():
                found.append(child)
    return found


def children_titled(start: str) -> list[psutil.Process]:
    """Processes below this one whose title, which Ray sets, starts with that."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(child.cmdline()).startswith(start):
                found.append(child)
    return found


@contextlib.contextmanager
def driver_in_a_session(arguments: list[str], log: Path = Path(os.devnull)) -> Iterator[subprocess.Popen]:
    """Runs `tokenmill ...` with its own Ray, and prints to the log. All their processes are killed at the end."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments],
            start_new_session=True,
            env=without_ray(os.environ),
            preexec_fn=_take_ctrl_c,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        for left in left_in_session(process.pid):
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


def _take_ctrl_c() -> None:
    """A test run in the background of a script ignores ctrl-C, and so would its commands."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def left_in_session(session: int) -> list[psutil.Process]:
    """Processes of the session that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def make_a_checkpoint(run: Path) -> None:
    """An empty checkpoint of step 0. A run with a checkpoint keeps its configuration."""
    (run / "checkpoints/checkpoint_0").mkdir(parents=True)
    (run / "checkpoints/checkpoint_0/lanes.json").write_text("{}")
