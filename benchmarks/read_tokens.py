"""Reading token shards for training: TokenDataset, Hugging Face datasets on the same Parquet files, np.memmap."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from benchmarks.measure import Table, interleaved, ratio_text
from pipeline.corpus.shards import Shard, ShardList
from pipeline.tokens import Output, ShardLayout, TokenDataset, TokenRow, commit_shard

NUM_SHARDS, ROWS_PER_SHARD, GRID = 8, 5000, (16, 16)
CODEBOOK_SIZE = 16384
BATCH = 256
WINDOW = 10_000  # rows: of TokenDataset's shuffle
ROUNDS = 5
NUM_TOKENS = NUM_SHARDS * ROWS_PER_SHARD * GRID[0] * GRID[1]

Batches = Callable[[], Iterable[np.ndarray]]


def run() -> Table:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokens = write(work)
        sides, conversion_s = make_sides(work, tokens)
        for name, batches in sides.items():
            prove_equal(name, batches, tokens)
        found = interleaved({name: partial(consume, batches) for name, batches in sides.items()}, ROUNDS)
    table = Table(
        "Reading token shards",
        [
            f"{NUM_SHARDS} shards of {ROWS_PER_SHARD} rows of {GRID[0]}x{GRID[1]} tokens, K={CODEBOOK_SIZE} (uint16), "
            f"uniformly random. Each side reads one epoch as batches of {BATCH} rows stacked in one array. The files "
            "are in the page cache.",
            f"TokenDataset shuffles the order of shards and windows of {WINDOW} rows. Hugging Face's `shuffle` and "
            "memmap permute all rows. One process reads the key and tokens of each row (memmap: only tokens).",
            "Hugging Face reads its own Arrow cache, which it makes from the Parquet files first "
            f"({conversion_s:.1f} s, not counted). Rows: `for row in dataset`; batches: `dataset.iter(batch_size)`. "
            "The format is numpy, except for packed tokens, which are read as Python bytes because the numpy format "
            "removes trailing zeros.",
            "Single rows: `dataset[i]` in random order. After the first round, TokenDataset has the 8 files in memory.",
            "Before timing we check that every side returns every row once, and in order where it reads sequentially.",
            f"Medians of {ROUNDS} interleaved rounds. Ratios compare runs of the same round; the range is in "
            "parentheses. Above 1, TokenDataset with the encoding of the column is faster: its rows compared to rows, "
            "its batches (int64, as a model takes them) to everything else.",
        ],
        [
            *("side", "order", "M tokens/s", "M tokens/CPU s"),
            *("list / this", "same in CPU time", "packed / this", "same in CPU time"),
        ],
    )
    for name in sides:
        side, order = name.rsplit(", ", 1)
        wall_s, cpu_s = [t.wall_s for t in found[name]], [t.cpu_s for t in found[name]]
        cells = [side, order, *(f"{NUM_TOKENS / 1e6 / statistics.median(seconds):.0f}" for seconds in (wall_s, cpu_s))]
        for encoding in ("list", "packed"):
            kind = next((kind for kind in ("single rows", "rows") if kind in side), "batches")
            ours = found[f"TokenDataset {kind}, {encoding}, {order}"]
            cells += [ratio_text(wall_s, [t.wall_s for t in ours]), ratio_text(cpu_s, [t.cpu_s for t in ours])]
        table.rows.append(cells)
    table.raw = {name: [vars(t) for t in times] for name, times in found.items()}
    return table


def write(work: Path) -> np.ndarray:
    """Commits both encodings as `tokenize` does, and writes a flat file for memmap. Returns the tokens [rows, 256]."""
    tokens = np.random.default_rng(0).integers(
        CODEBOOK_SIZE, size=(NUM_SHARDS * ROWS_PER_SHARD, *GRID), dtype=np.uint16
    )
    tokens.tofile(work / "tokens.bin")
    shards = [Shard(f"/corpus/part-{i:03d}.tar", 1) for i in range(NUM_SHARDS)]
    for encoding in ("list", "packed"):
        layout = ShardLayout.for_tokens(
            tokenizer_id="t" * 16,
            codebook_id="c" * 16,
            codebook_size=CODEBOOK_SIZE,
            modality="image",
            index_order="first dimension least significant",
            preprocessing={},
            encoding=encoding,
        )
        output = Output.create(str(work / encoding), layout, ShardList(shards), {})
        for i, shard in enumerate(shards):
            rows = range(i * ROWS_PER_SHARD, (i + 1) * ROWS_PER_SHARD)
            size = {"height": 128, "width": 128}
            made = [TokenRow(f"{r:09d}", r - rows[0], tokens[r], size) for r in rows]
            commit_shard(output, shard, made, [], {}, now=0.0)
    return tokens.reshape(len(tokens), -1)


def make_sides(work: Path, tokens: np.ndarray) -> tuple[dict[str, Batches], float]:
    sides: dict[str, Batches] = {}
    conversion_s = 0.0
    for order, window in (("sequential", 0), ("shuffled", WINDOW)):
        for encoding in ("list", "packed"):
            ours = TokenDataset(str(work / encoding), shuffle_window=window, seed=1)
            sides[f"TokenDataset rows, {encoding}, {order}"] = partial(stacked, ours, np.asarray)
            sides[f"TokenDataset batches, {encoding}, {order}"] = partial(own_batches, ours)
    for encoding, parse in (("list", np.asarray), ("packed", partial(np.frombuffer, dtype="<u2"))):
        start = time.perf_counter()
        files = sorted(map(str, work.glob(f"{encoding}/tokens/*.parquet")))
        theirs = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(work / "cache"))
        conversion_s = max(conversion_s, time.perf_counter() - start)
        theirs = theirs.select_columns(["key", "tokens"]).with_format("numpy" if encoding == "list" else None)
        for order, rows in (("sequential", theirs), ("shuffled", theirs.shuffle(seed=1))):
            sides[f"Hugging Face rows, {encoding}, {order}"] = partial(stacked, rows, parse)
            sides[f"Hugging Face batches, {encoding}, {order}"] = partial(hf_batches, rows, parse)
        order = np.random.default_rng(2).permutation(len(tokens))
        single = TokenDataset(str(work / encoding))
        sides[f"TokenDataset single rows, {encoding}, random"] = partial(singles, single, np.asarray, order)
        sides[f"Hugging Face single rows, {encoding}, random"] = partial(singles, theirs, parse, order)
    flat = np.memmap(work / "tokens.bin", np.uint16, "r", shape=tokens.shape)
    sides["np.memmap, sequential"] = partial(memmap_batches, flat, np.arange(len(flat)), in_order=True)
    sides["np.memmap, shuffled"] = partial(
        memmap_batches, flat, np.random.default_rng(1).permutation(len(flat)), in_order=False
    )
    return sides, conversion_s


def stacked(rows: Iterable[dict], parse: Callable) -> Iterator[np.ndarray]:
    """What a collate function does with rows."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        yield np.stack([parse(row["tokens"]) for row in batch]).reshape(len(batch), -1)


def singles(rows: Any, parse: Callable, order: np.ndarray) -> Iterator[np.ndarray]:
    """Rows by their numbers, one call each."""
    return stacked((rows[i] for i in order.tolist()), parse)


def own_batches(dataset: TokenDataset) -> Iterator[np.ndarray]:
    return (batch["tokens"].reshape(len(batch["tokens"]), -1) for batch in dataset.batches(BATCH))


def hf_batches(rows: datasets.Dataset, parse: Callable) -> Iterator[np.ndarray]:
    for batch in rows.iter(batch_size=BATCH):
        yield np.stack([parse(row) for row in batch["tokens"]])


def memmap_batches(flat: np.memmap, order: np.ndarray, *, in_order: bool) -> Iterator[np.ndarray]:
    for low in range(0, len(flat), BATCH):
        yield np.array(flat[low : low + BATCH]) if in_order else flat[order[low : low + BATCH]]


def consume(batches: Batches) -> None:
    for batch in batches():
        batch[-1, -1].item()


def prove_equal(name: str, batches: Batches, tokens: np.ndarray) -> None:
    found = np.concatenate([np.array(batch) for batch in batches()])
    if name.endswith("sequential"):
        assert np.array_equal(found, tokens), f"{name}: the tokens or their order differ"
        return
    assert not np.array_equal(found, tokens), f"{name}: not shuffled"
    assert np.array_equal(_sorted_rows(found), _sorted_rows(tokens)), f"{name}: not every row once"


def _sorted_rows(tokens: np.ndarray) -> np.ndarray:
    return tokens[np.lexsort(tokens.T[:4])]  # the first 4 tokens (56 bits) distinguish random rows
