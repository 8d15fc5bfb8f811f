"""`python deploy/docker/check.py FOLDER` runs the RUN lines of the Dockerfile's last stage in a new venv in FOLDER.

For machines without a container engine. It copies what .dockerignore lets through, as COPY does, and leaves out what
only the image has: the stage of pesq's wheel (pip compiles it, with the compiler of this machine) and the user `ray`.
TORCH_INDEX in the environment replaces the build argument. Needs Python 3.11 and about 3 GB in FOLDER.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEFAULT_INDEX = "https://pypi.org/simple"


def steps() -> Iterator[tuple[str, str]]:
    """(instruction, its text) of the last stage, in order, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "deploy/docker/Dockerfile").read_text())
    last = text.rsplit("\nFROM ", 1)[1].splitlines()[1:]
    for line in last:
        if line and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            yield instruction, rest


def context() -> set[Path]:
    """The files that the build gets: those that git knows and .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = tuple(line[1:] for line in lines if line.startswith("!"))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {Path(name) for name in listed.splitlines() if name in kept or name.startswith(tuple(f"{k}/" for k in kept))}


def copy(text: str, folder: Path) -> None:
    sources = [word for word in shlex.split(text)[:-1] if not word.startswith("--")]
    for source in sources:
        for file in context() if source == "." else [Path(source)]:
            target = folder / (file if source == "." else file.name)
            assert file in context(), f"COPY {file}: .dockerignore leaves it out"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)


def main(place: Path) -> None:
    folder, environment = place / "tokenmill", place / "venv"
    folder.mkdir(parents=True)
    venv.create(environment, with_pip=True)
    variables = {**os.environ, "PATH": f"{environment}/bin:{os.environ['PATH']}"}
    variables.setdefault("TORCH_INDEX", DEFAULT_INDEX)
    variables.pop("PYTHONPATH", None)
    for instruction, text in steps():
        if instruction == "COPY" and "--from=" not in text:
            copy(text, folder)
        elif instruction == "RUN":
            print(f"RUN {text}", flush=True)
            text = text.replace("/home/ray/wheels", str(place / "wheels"))
            subprocess.run(text, shell=True, check=True, cwd=folder, env=variables)
    print("all RUN lines passed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
