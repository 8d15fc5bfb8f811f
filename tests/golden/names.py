"""The only golden file that imports modules of the product. If a module moves, only this file changes."""

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from jobs.__main__ import main
from jobs.audit import draw
from jobs.config import TokensConfig, defaults_yaml, load_config, with_new_names
from jobs.retry import RetryWorker
from pipeline.corpus.samples import read_samples
from pipeline.corpus.shards import Shard, find_shards
from pipeline.corpus.streams import Lanes, training_samples
from pipeline.reservoir import Reservoir
from pipeline.tokens import Output, TokenDataset
from tests.jobs.helpers import here, tokenize_without_ray
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.modalities.base import MODALITIES
from tokenizer.nets.base.net import NETS
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent
# A shard's URL is part of its name, of the manifest's id and of each row. A checkout can be anywhere, so the shards are
# copied to this path, with a fixed modification time, which is the version of a local shard.
# Change the number if the tars change.
HOME = Path("/tmp/tokenmill-golden-1")
CHANGED_NS = 1_700_000_000_000_000_000
PHOTOS = f"{HOME}/in/photos-*.tar*"
SOUND = f"{HOME}/in/sound-000.tar"
RUN_TOKENIZER = "run/tokenizers/vp_vae-K16"
OUR_NAME = {"DecompressionBombError": "BadSample"}  # our own limit on pixels has replaced Pillow's
FEW_PIXELS = 1000  # between the size of the small pictures and half of the large one's

# -- the corpus and the commands --------------------------------------------------------------------------------------


def place_corpus() -> None:
    """Copies the shards to HOME. Parallel test runs are safe: files are replaced atomically by the same bytes."""
    for file in sorted((GOLDEN / "in").iterdir()):
        place(HOME / "in" / file.name, file.read_bytes())


def place(target: Path, data: bytes) -> None:
    if target.exists() and target.read_bytes() == data and target.stat().st_mtime_ns == CHANGED_NS:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(temporary, 0o644)
    os.utime(temporary, ns=(CHANGED_NS, CHANGED_NS))
    os.replace(temporary, target)


def command(*arguments: str | Path) -> int:
    """`tokenmill ...` in this process; returns its exit code."""
    return main([str(argument) for argument in arguments])


def all_keys() -> str:
    """Every configuration key with its default: YAML."""
    return defaults_yaml()


def accepts(file: Path) -> None:
    """Raises if a command would refuse this configuration."""
    load_config([str(file)])


def shards_of(spec: str) -> list[Shard]:
    return find_shards(spec).shards


def manifest_id(spec: str) -> str:
    return find_shards(spec).id


# -- tokenizers -------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def load_model(folder: Path) -> Autoencoder:
    return Autoencoder.load(folder)


def ids_of(tokenizer: Tokenizer) -> dict[str, str]:
    return {
        "tokenizer_id": tokenizer.id,
        "codebook_id": tokenizer.codebook_id,
        "encoder_id": tokenizer.encoder_id,
    }


def arrays_of(tokenizer: LatentEncoder, count: int = 2) -> dict[str, np.ndarray]:
    """The first audio samples by key, after the tokenizer's preprocessing."""
    spec, extension = (SOUND, "wav") if tokenizer.modality.name == "audio" else (PHOTOS, "png")
    every = (sample for shard in shards_of(spec) for sample in read_samples(shard.url))
    samples = itertools.islice((s for s in every if not s.key.startswith("broken")), count)
    return {s.key: tokenizer.modality.read(s.members[extension], extension).array for s in samples}


def tokens_of(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    return {key: tokenizer.encode_batch([array])[0] for key, array in arrays_of(tokenizer).items()}


def latents_of(tokenizer: LatentEncoder, count: int = 2) -> dict[str, np.ndarray]:
    return {key: tokenizer.latents([array])[0].numpy() for key, array in arrays_of(tokenizer, count).items()}


def tokens_keep_distance(tokenizer: Tokenizer, count: int = 2, amount: float = 1e-4) -> bool:
    """Whether the tokens stay the same when each latent moves by this fraction of the latents' spread.

    On another processor, rounding moves a latent by about 1e-6 of the spread.
    """
    generator = torch.Generator().manual_seed(0)
    for z in latents_of(tokenizer, count).values():
        latents = torch.from_numpy(z)
        [tokens] = tokenizer.quantize([latents])
        for _ in range(20):
            noise = torch.randn(latents.shape, generator=generator) * amount * latents.std()
            if not np.array_equal(tokenizer.quantize([latents + noise])[0], tokens):
                return False
    return True


def codebook_of(tokenizer: Tokenizer) -> torch.Tensor:
    return tokenizer.autoencoder.quantizer.codebook


def config_defaults() -> dict[str, dict[str, dict[str, Any]]]:
    """Fields and defaults of every quantizer, net and modality: kind -> name -> field -> default.

    Without the fields of a modality that ids leave out where a tokenizer does not state them.
    """
    kinds: dict[str, Any] = {"quantizers": QUANTIZERS, "nets": NETS, "modalities": MODALITIES}
    return {
        kind: {name: _hashed_defaults(registry.get(name)) for name in registry.names()}
        for kind, registry in kinds.items()
    }


def _hashed_defaults(cls: Any) -> dict[str, Any]:
    unstated = getattr(cls, "unstated", {})
    return {name: value for name, value in dataclasses.asdict(cls.Config()).items() if name not in unstated}


# -- outputs ----------------------------------------------------------------------------------------------------------


def tokenize_here(spec: str, tokenizer: Path, output: Path, **options: Any) -> None:
    """Does the work of `tokenize` in this process, for each shard without a commit."""
    tokenize_without_ray(spec, str(tokenizer), output, TokensConfig(**options))


def tokenize_then_retry(spec: str, tokenizer: Path, output: Path, **options: Any) -> None:
    """Pictures above FEW_PIXELS go to quarantine; then the limit is lifted, and a retry recovers them."""
    tokenize_here(spec, tokenizer, output, max_pixels=FEW_PIXELS, **options)
    worker = here(RetryWorker, str(tokenizer), output_url=str(output), options=TokensConfig(**options))
    for shard in shards_of(spec):
        assert worker.process(shard).failure is None


def rows_of(output: Path) -> pa.Table:
    """All committed rows with all columns, read only with pyarrow, sorted by shard and position."""
    names = [file.stem for file in sorted((output / "manifest").glob("*.json"))]
    tables = [pq.read_table(output / "tokens" / f"{name}.parquet") for name in names]
    rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    return rows.sort_by([("source_shard", "ascending"), ("source_index", "ascending")]).combine_chunks()


def wide(rows: pa.Table) -> pa.Table:
    """The rows with the column num_samples as outputs have it that were created since it is int64."""
    place = rows.column_names.index("num_samples")
    return rows.set_column(place, "num_samples", rows["num_samples"].cast(pa.int64()))


def read_table(file: Path) -> pa.Table:
    return pq.read_table(file).replace_schema_metadata(None)


def read_quarantine(file: Path) -> pa.Table:
    """The quarantined samples without their messages: the decoder may choose other words in another version."""
    table = read_table(file).drop("message")
    errors = [OUR_NAME.get(error, error) for error in table["error"].to_pylist()]
    return table.set_column(table.column_names.index("error"), "error", pa.array(errors, pa.string()))


def read_order(output: Path, **settings: Any) -> list[str]:
    """Keys in the order in which the reader for training yields them."""
    return [row["key"] for row in TokenDataset(str(output), **settings)]


def _ours(name: str) -> str:
    for of_pillow, ours in OUR_NAME.items():
        name = name.replace(of_pillow, ours)
    return name


def names_in(value: Any, place: str = "") -> set[str]:
    """Dotted names of all keys of a JSON value."""
    if isinstance(value, dict):
        below = [names_in(inner, f"{place}.{name}".lstrip(".")) for name, inner in value.items()]
        return {f"{place}.{_ours(name)}".lstrip(".") for name in value}.union(*below)
    if isinstance(value, list):
        return set().union(*[names_in(inner, f"{place}[]") for inner in value])
    return set()


def yaml_names(file: Path) -> set[str]:
    return names_in(with_new_names(yaml.safe_load(file.read_text()))[0])


def json_names(folder: Path) -> dict[str, set[str]]:
    """Every JSON file under the folder, and the names of its keys."""
    return {str(f.relative_to(folder)): names_in(json.loads(f.read_text())) for f in sorted(folder.rglob("*.json"))}


def parquet_layout(folder: Path) -> dict[str, dict[str, Any]]:
    """Every Parquet file under the folder: its columns with their types, and its footer."""
    found = {}
    for file in sorted(folder.rglob("*.parquet")):
        schema = pq.read_schema(file)
        footer = {name.decode(): value.decode() for name, value in (schema.metadata or {}).items()}
        columns = {field.name: [str(field.type), field.nullable] for field in schema}
        found[str(file.relative_to(folder))] = {"columns": columns, "footer": footer}
    return found


def tensor_names(value: Any, place: str = "") -> dict[str, str]:
    """The name of each entry in a checkpoint file, with the dtype and the shape of tensors."""
    if isinstance(value, torch.Tensor):
        return {place: f"{value.dtype} {list(value.shape)}"}
    if isinstance(value, dict):
        items = value.items()
        return {k: v for name, inner in items for k, v in tensor_names(inner, f"{place}.{name}".lstrip(".")).items()}
    return {place: type(value).__name__}


# -- what a seed determines ------------------------------------------------------------------------------------------


def seed_recipes() -> dict[str, Any]:
    """What the current code draws for given seeds."""
    return {
        "training_stream": {str(rank): list(_stream(rank, world_size=1 if rank == 0 else 2)) for rank in (0, 1)},
        "reservoir": _reservoir(),
        "audit": draw(Output.open(str(GOLDEN / "out")).commits(), 6, seed=3),
        "read_in_order": read_order(GOLDEN / "out"),
        "read_shuffled": read_order(GOLDEN / "out", shuffle_window=5, seed=3),
        "read_shuffled_by_rank_1_of_2": read_order(GOLDEN / "out", shuffle_window=5, seed=3, rank=1, world_size=2),
        "pack": _packed(),
        "crop": _crop(),
    }


def _stream(rank: int, world_size: int, count: int = 40) -> Iterator[str]:
    """Keys that a training rank draws in more than one epoch."""
    shards = shards_of(PHOTOS)
    lanes = Lanes.for_ranks(world_size, len(shards), shuffle_buffer=6, seed=5)
    stream = training_samples(
        shards, lanes, rank=rank, world_size=world_size, positions={}, on_bad_shard=lambda error: None
    )
    for drawn in itertools.islice(stream, count):
        yield drawn.sample.key


def _reservoir() -> list[int]:
    """Which of 3 * 100 rows are kept, lowest priority first."""
    kept = Reservoir(12, seed=7)
    for i, name in enumerate(("a.tar", "b.tar", "c.tar")):
        kept.add(np.arange(100 * i, 100 * i + 100)[:, None], source=name)
    assert kept.rows is not None
    return kept.rows[:, 0].tolist()


def _packed() -> list[str]:
    """Keys in the order in which `pack` writes them with a seed."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(12):
            (Path(folder) / f"{i:02d}.png").write_bytes(b"never read")
        to = Path(folder) / "packed-%d.tar"
        order = ["pack.samples_per_shard=8", "pack.shuffle_seed=3"]
        assert command("pack", f"pack.source={folder}", f"pack.shards={to}", *order) == 0
        return [s.key for i in range(2) for s in read_samples(str(to).replace("%d", str(i)))]


def _crop() -> dict[str, list[float]]:
    """Corner values of a random training crop, by modality."""
    rows, columns = np.mgrid[0:64, 0:64]
    picture, sound = np.stack([rows, columns, rows], axis=-1).astype(np.uint8), np.arange(5000, dtype=np.float32)
    inputs: dict[str, np.ndarray] = {"image": picture, "audio": sound[:, None]}
    found = {}
    for name, array in inputs.items():
        modality = MODALITIES.get(name)
        piece = modality(modality.Config()).segment(array, 32, np.random.default_rng([3, 1, 2, 4]))  # type: ignore[call-arg]
        found[name] = [float(value) for value in piece.reshape(-1, piece.shape[-1])[0]]
    return found
