"""Damages files of an output at random, and follows the documented way back: `python -m tests.faults.damage TRIALS`.

Each trial takes a copy of a correct output, damages one to three files (any file, any kind of damage), and checks:
- `verify --deep` finds the damage, or every row, quarantined sample and count is still the committed one;
- a reader yields rows of the correct output, or an error of ours that names the output, and never a wrong row;
- `status`, `verify`, `verify --repair` end with exit code 0, 2 or 3 and print no traceback;
- after the repair, tokenizing again gives the rows of the correct output, and `verify --deep` passes.
Writes results/faults/damage.json and prints its figures.
"""

import collections
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.__main__ import main as run_command
from pipeline.errors import BrokenOutput, OutputMismatch, UnsupportedSchema
from pipeline.tokens import Output, TokenDataset
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import rows_of, save_tiny_tokenizer, tokenize_without_ray

RESULTS = Path(__file__).parents[2] / "results/faults/damage.json"
SHARDS, PER_SHARD = 4, 4

Damage = Callable[[Path, random.Random, list[Path]], object]


def _flip(path: Path, rng: random.Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _overwrite(path: Path, rng: random.Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    at, size = rng.randrange(len(data) + 1), rng.randrange(1, 64)
    data[at : at + size] = rng.randbytes(size)
    path.write_bytes(data)


def _cut(path: Path, rng: random.Random, _: list[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def _lose_a_part(path: Path, rng: random.Random, _: list[Path]) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    path.write_bytes(data[:at] + data[at + rng.randrange(1, 100) :])


def _replace_by_another(path: Path, rng: random.Random, files: list[Path]) -> None:
    path.write_bytes(rng.choice(files).read_bytes())


def _swap(path: Path, rng: random.Random, files: list[Path]) -> None:
    other = rng.choice([file for file in files if file.parent == path.parent])
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def _become_a_folder(path: Path, *_: object) -> None:
    path.unlink()
    path.mkdir()


def _become_a_broken_link(path: Path, *_: object) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


def _change_a_value(path: Path, rng: random.Random, files: list[Path]) -> None:
    """A JSON value becomes one of another type or size. Other files are flipped."""
    if path.suffix != ".json":
        _flip(path, rng, files)
        return
    value: Any = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []
    todo = [value]
    for node in todo:
        keys = node.keys() if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
    node, key = rng.choice(places)
    node[key] = rng.choice([None, -1, 0, 1, 7.5, 10**30, "", "x", "\x1b[2J", [], {}, [None], {"a": None}, True])
    path.write_text(json.dumps(value))


DAMAGES: dict[str, Damage] = {
    "a bit flipped": _flip,
    "bytes overwritten": _overwrite,
    "cut": _cut,
    "a part in the middle lost": _lose_a_part,
    "longer": lambda path, rng, _: path.open("ab").write(rng.randbytes(rng.randrange(1, 100))),
    "empty": lambda path, *_: path.write_bytes(b""),
    "zeros": lambda path, *_: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path, *_: path.unlink(),
    "replaced by any other file": _replace_by_another,
    "swapped with another of its folder": _swap,
    "renamed": lambda path, *_: path.rename(path.with_name(f"x{path.name}")),
    "copied under another name": lambda path, *_: shutil.copy(path, path.with_name(f"x{path.name}")),
    "a folder": _become_a_folder,
    "a broken link": _become_a_broken_link,
    "a JSON value changed": _change_a_value,
    "its whole folder deleted": lambda path, *_: shutil.rmtree(path.parent),
}


class Attack:
    """An output in a temporary folder, and what it should hold."""

    def __init__(self, folder: Path):
        self.folder, self.printed = folder, ""
        self.tokenizer = save_tiny_tokenizer(folder / "tokenizer")
        (folder / "in").mkdir()
        for shard in range(SHARDS):
            images = [(f"{shard}-{i}.png", encoded(picture(seed=10 * shard + i))) for i in range(PER_SHARD)]
            (folder / f"in/s-{shard}.tar").write_bytes(tar_bytes([*images, (f"{shard}-9.png", b"no picture")]))
        self.shards = f"{folder}/in/*.tar"
        tokenize_without_ray(self.shards, self.tokenizer, folder / "good")
        self.out = folder / "out"
        self.restore()
        self.content = self.read()
        self.rows = self.rows_by_key()

    def restore(self) -> None:
        if self.out.is_symlink() or self.out.exists():
            shutil.rmtree(self.out)
        shutil.copytree(self.folder / "good", self.out)

    def read(self) -> Any:
        """All rows, and what is in quarantine."""
        output = Output.open(str(self.out))
        bad = [output.quarantined(shard.last) for shard in output.committed_shards()]
        return rows_of(self.out).to_pylist(), bad

    def rows_by_key(self) -> dict[str, bytes]:
        return {row["key"]: row["tokens"].tobytes() for row in TokenDataset(str(self.out))}

    def damage(self, rng: random.Random) -> list[tuple[str, str]]:
        """Returns each damage and the file's folder, or its name if it is in none."""
        done = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            files = sorted(path for path in self.out.rglob("*") if path.is_file() and path.parent != self.out.parent)
            path = rng.choice(files)
            name = rng.choice(sorted(DAMAGES))
            if name == "its whole folder deleted" and path.parent == self.out:
                continue
            DAMAGES[name](path, rng, files)
            done.append((name, path.name if path.parent == self.out else f"{path.parent.name}/"))
        return done

    def check(self) -> str:
        """Follows the way back. Returns what came of it; raises AssertionError if a promise is broken."""
        self.check_reader()
        assert self.command("status") in (0, 2, 3)
        found = self.command("verify", "--deep")
        assert found in (0, 2, 3)
        if found == 0:
            assert self.read() == self.content, "verify --deep passed, but the content differs"
            return "harmless"
        for repairs in range(1, 4):  # without dataset.json, tokenize is needed before the other files can be judged
            assert self.command("verify", "--repair") in (0, 2, 3)
            with contextlib.suppress(BrokenOutput):  # a line that asks for another repair
                tokenize_without_ray(self.shards, self.tokenizer, self.out)
            if self.command("verify", "--deep") == 0:
                assert self.read() == self.content, "the repaired output differs"
                return f"found, and repaired by {repairs}"
        raise AssertionError(f"verify --deep still fails after the repairs: {self.printed}")

    def check_reader(self) -> None:
        with contextlib.suppress(BrokenOutput, OutputMismatch, UnsupportedSchema, FileNotFoundError):
            for row in TokenDataset(str(self.out)):
                assert self.rows.get(row["key"]) == row["tokens"].tobytes(), "the reader yields a wrong row"

    def command(self, name: str, *more: str) -> int:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run_command([name, f"output={self.out}", *more])
        self.printed = printed.getvalue()
        assert "Traceback" not in printed.getvalue(), printed.getvalue()
        return code


def attack(trials: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Returns the figures: trials, found, harmless, damages by kind and by file, and broken promises."""
    attacked = Attack(folder)
    outcomes: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    broken = []
    for trial in range(trials):
        attacked.restore()
        done = attacked.damage(random.Random(f"{seed}-{trial}"))
        kinds.update(kind for kind, _ in done)
        places.update(place for _, place in done)
        try:
            outcomes[attacked.check()] += 1
        except Exception as error:
            outcomes["broken promise"] += 1
            what = f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER").splitlines()[0]
            broken.append({"trial": trial, "damage": done, "error": what})
    return {
        "seed": seed,
        "trials": trials,
        "outcomes": dict(sorted(outcomes.items())),
        "damages": dict(sorted(kinds.items())),
        "files": dict(sorted(places.items())),
        "broken promises": broken,
    }


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        figures = attack(trials, Path(folder))
    for broken in figures["broken promises"]:
        print(broken["trial"], broken["damage"], broken["error"], sep="\n")
    print(json.dumps({**figures, "broken promises": len(figures["broken promises"])}, indent=1))
    if not os.environ.get("DRY"):
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
