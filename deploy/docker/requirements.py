"""Prints the requirements of extras of pyproject.toml, one a line: `python requirements.py jobs s3 audio`.

The image installs them before it copies the code, so that a change of code does not install them again.
"""

import re
import sys
import tomllib
from collections.abc import Iterator


def requirements(project: dict, extras: list[str]) -> Iterator[str]:
    """Those of the project and of its extras; an extra may name others as tokenmill[a,b]."""
    yield from project["dependencies"]
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            if nested := re.fullmatch(rf"{project['name']}\[(.+)\]", requirement):
                yield from requirements(project, nested[1].split(","))
            else:
                yield requirement


if __name__ == "__main__":
    with open("pyproject.toml", "rb") as file:
        print(*dict.fromkeys(requirements(tomllib.load(file)["project"], sys.argv[1:])), sep="\n")
