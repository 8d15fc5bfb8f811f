"""Gives every key of every command wrong values, as a user would: `python -m tests.faults.mistakes`.

Each command has otherwise valid settings, and stops where it would start Ray. A wrong value must give exit code 2 or 3
with a line that is no traceback, or be a value that the key takes. Writes results/faults/mistakes.json.
"""

import collections
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jobs.actors.cluster
from jobs.__main__ import COMMANDS
from jobs.__main__ import main as run_command
from jobs.config.schema import all_keys
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import save_tiny_tokenizer, tokenize_without_ray

RESULTS = Path(__file__).parents[2] / "results/faults/mistakes.json"
VALUES = (
    *("", "null", "-1", "0", "1.5", "nan", "inf", "1e400", "999999999999999999999", "true", "yes", "x", "'1'"),
    *(
        "[]",
        "[1]",
        "[null]",
        "[x, y]",
        "{}",
        "{a: 1}",
        "{a: {b: c}}",
        "[[1]]",
        "/nowhere/at/all",
        "/dev/null",
        "/proc/x",
    ),
    *("s3:/oops", "foo://bar/x", "file:///nowhere", "*.tar", "{0..3}.tar", "${nothing}", "${oc.env:NOT_SET}", "a=b"),
    *(
        "\x1b[31mred",
        "é日本",
        " ",
        "{",
        "[",
        "}",
        ":",
        "- a",
        "!!python/object:os.system x",
        "&a [*a]",
        "~",
        "../..",
        "x" * 5000,
    ),
)


class _WouldStart(Exception):
    """The command has accepted its settings."""


def _refuse(*_: object, **__: object) -> None:
    raise _WouldStart


def settings(folder: Path) -> dict[str, list[str]]:
    """Settings with which each command works."""
    (folder / "in").mkdir()
    images = [(f"{i}.png", encoded(picture(seed=i))) for i in range(3)]
    (folder / "in/a.tar").write_bytes(tar_bytes(images))
    (folder / "photos").mkdir()
    (folder / "photos/a.png").write_bytes(images[0][1])
    tokenizer = save_tiny_tokenizer(folder / "tokenizer")
    output = tokenize_without_ray(f"{folder}/in/*.tar", tokenizer, folder / "out").url
    shards, frozen = f"data.shards={folder}/in/*.tar", f"tokenizer={tokenizer}"
    out = f"output={output}"
    return {
        "pack": [f"pack.source={folder}/photos", f"pack.shards={folder}/packed/a-%03d.tar"],
        "train": [f"run={folder}/run", shards],
        "codebook": [f"run={folder}/run", shards],
        "tokenize": [shards, frozen, f"output={folder}/new"],
        "status": [out],
        "verify": [out],
        "audit": [out, frozen],
        "retry": [out, frozen],
        "decode": [out, frozen, f"decode.output={folder}/decoded"],
        "export": [out, "export.format=nanogpt", f"export.to={folder}/exported"],
        "compare": [
            f"run={folder}/compared",
            shards,
            "compare.methods={fsq: {quantizer: {name: fsq}}}",
            f"compare.heldout={folder}/in/*.tar",
        ],
        "evaluate": [shards, frozen, f"run={folder}/run"],
    }


def attempt(command: str, arguments: list[str]) -> tuple[str, str]:
    """What happened, and what was printed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run_command([command, *arguments])
    except _WouldStart:
        return "accepted", printed.getvalue()
    except BaseException as error:
        return f"{type(error).__name__}", f"{printed.getvalue()}\n{type(error).__name__}: {error}"
    if "Traceback" in printed.getvalue():
        return "traceback", printed.getvalue()
    return f"exit {code}", printed.getvalue()


def attack(
    folder: Path, values: tuple[str, ...] = VALUES, commands: tuple[str, ...] = tuple(COMMANDS)
) -> dict[str, Any]:
    """Returns how often each outcome occurred, and the attempts that ended in an error of Python."""
    valid = settings(folder)
    before, jobs.actors.cluster.start = jobs.actors.cluster.start, _refuse  # type: ignore[assignment]
    here = os.getcwd()
    os.chdir(folder)
    outcomes: dict[str, collections.Counter[str]] = {}
    unhandled = []
    try:
        for command in commands:
            outcomes[command] = collections.Counter()
            for key in (key for key in all_keys() if command in key.commands):
                for value in values:
                    outcome, printed = attempt(command, [*valid[command], f"{key.name}={value}"])
                    outcomes[command][outcome] += 1
                    if outcome not in ("accepted", "exit 0", "exit 2", "exit 3", "exit 4"):
                        last = printed.strip().splitlines()[-1].replace(str(folder), "FOLDER")
                        unhandled.append(f"{command} {key.name}={value[:40]!r}: {last[:200]}")
    finally:
        os.chdir(here)
        jobs.actors.cluster.start = before
    total = sum(sum(counts.values()) for counts in outcomes.values())
    by_command = {command: dict(sorted(counts.items())) for command, counts in outcomes.items()}
    return {"attempts": total, "outcomes": by_command, "unhandled": unhandled}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = attack(Path(folder), commands=tuple(sys.argv[1:]) or tuple(COMMANDS))
    print(json.dumps(figures, indent=1))
    if len(sys.argv) == 1:
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
