"""Small real corpora for tests: images, tars and token shards. Imports neither torch nor ray."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.corpus.shards import Shard, ShardList, find_shards
from pipeline.tokens import Output, Quarantined, ShardLayout, TokenRow, commit_shard

Members = Iterable[tuple[str, bytes]]


def picture(height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    """A smooth image with some noise: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / rng.uniform(3, 9) + y / rng.uniform(3, 9) + phase) for phase in range(3)]
    return np.clip(np.stack(waves, axis=-1) + rng.normal(0, 5, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    """The image as the bytes of a file of that kind: png, jpeg, tiff, gif ..."""
    out = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(out, format=kind, **options)
    return out.getvalue()


def tar_bytes(members: Members, mode: str = "w", kind: int = tarfile.GNU_FORMAT, **options) -> bytes:
    """A tar with its end-of-archive mark. A name that ends in a slash is a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=kind, **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if info.isdir() else len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def samples_of(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` samples, each an image with a caption."""
    members: list[tuple[str, bytes]] = []
    for i in range(start, start + count):
        members += [(f"{i:04d}.png", encoded(picture(seed=i))), (f"{i:04d}.txt", f"picture {i}".encode())]
    return members


def write_tar(path: Path, members: Members) -> str:
    """Writes the tar; returns its path as a URL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return str(path)


def write_corpus(folder: Path, shards: Sequence[int] = (4, 4, 4)) -> list[Shard]:
    """Writes one tar per number, with that many samples. Keys are unique across shards."""
    for i, count in enumerate(shards):
        write_tar(folder / f"photos-{i:03d}.tar", samples_of(count, start=100 * i))
    return find_shards(str(folder / "photos-*.tar")).shards


# -- token shards, without a tokenizer ----------------------------------------------------------------------------


def layout(**changes) -> ShardLayout:
    settings: dict[str, Any] = {
        "tokenizer_id": "tok-a",
        "codebook_id": "book-a",
        "codebook_size": 1024,
        "modality": "image",
        "index_order": "first dimension least significant",
        "preprocessing": {"short_side": 0},
    }
    return ShardLayout.for_tokens(**{**settings, **changes})


def token_row(key: str, index: int, codebook_size: int = 1024, shape: tuple[int, ...] | None = None) -> TokenRow:
    """Random tokens in grids of several sizes. They depend only on the key, the index and codebook_size."""
    rng = np.random.default_rng([index, *key.encode()])
    shape = shape or (2 + index % 2, 3)
    tokens = rng.integers(codebook_size, size=shape)
    return TokenRow(key, index, tokens, {"height": 8 * shape[0], "width": 8 * shape[-1]})


def token_rows(shard: Shard, count: int, **settings) -> list[TokenRow]:
    """Rows with the keys that write_corpus gives to this shard."""
    start = 100 * int(shard.url.rsplit("-", 1)[1].split(".")[0])
    return [token_row(f"{start + i:04d}", i, **settings) for i in range(count)]


def write_tokens(folder: Path, shards: Sequence[int] = (5, 0, 7, 3), **changes) -> Output:
    """A complete, valid output in folder/out for the corpus in folder/in, with random tokens."""
    inputs = write_corpus(folder / "in", shards)
    output = Output.create(str(folder / "out"), layout(**changes), ShardList(inputs), config={})
    for shard, count in zip(inputs, shards, strict=True):
        rows = token_rows(shard, count, codebook_size=output.layout.codebook_size)
        commit_shard(output, shard, rows, [], seconds={}, now=0.0)
    return output


def quarantined(shard: Shard, index: int) -> Quarantined:
    start = 100 * int(shard.url.rsplit("-", 1)[1].split(".")[0])
    return Quarantined(f"{start + index:04d}", index, "decode", "BadSample", "broken on purpose")
