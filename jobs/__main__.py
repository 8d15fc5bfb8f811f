"""`tokenmill COMMAND CONFIG.yaml... [key=value ...]`, the same as `python -m jobs COMMAND ...`.

Exit codes: 0 all well; 2 a mistake in the configuration or command; 3 incomplete, or verification failed; 4 done, but
more was quarantined than tokens.max_bad_fraction allows; 130 and 143 interrupted by ctrl-C or SIGTERM; 1 anything
unforeseen.
"""

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

COMMANDS = {  # name: (module, what it does); modules are imported when their turn comes, since torch and ray are slow
    "pack": ("jobs.pack", "a folder of files, or a Parquet or CSV file of bytes, to WebDataset shards"),
    "train": ("jobs.train", "shards to a trained autoencoder"),
    "codebook": ("jobs.codebook", "after training: latents over the corpus, k-means, a frozen tokenizer"),
    "tokenize": ("jobs.tokenize_corpus", "shards to token shards, each sample exactly once"),
    "status": ("jobs.status", "done, left, failed, quarantined and the rate, from the output alone"),
    "verify": ("jobs.verify", "proof that every input sample is written or quarantined, once"),
    "audit": ("jobs.audit", "tokenizes a random sample of rows again and compares"),
    "retry": ("jobs.retry", "takes up quarantined samples and failed shards again, each still exactly once"),
    "decode": ("jobs.decode", "token rows back to pictures or sound"),
    "compare": ("jobs.compare", "several methods and sizes under one recipe, one table with seeds and plots"),
    "evaluate": ("jobs.evaluate", "quality and codebook usage on held-out shards, with a picture report"),
}
RERUN = "rerun the same command to continue"
OUTCOMES = {
    2: "a mistake in the command or its configuration",
    3: "incomplete or not sound",
    4: "too many bad samples",
    130: f"interrupted (ctrl-C); {RERUN}",
    143: f"terminated (SIGTERM); {RERUN}",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code, which the last line also tells in words."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command not in COMMANDS:
        return _finish(command, 2, f"unknown command {command!r}; there are: {', '.join(COMMANDS)}")
    from jobs.config import ConfigError, defaults_yaml, load_config

    job = importlib.import_module(COMMANDS[command][0])
    if any(argument in ("-h", "--help") for argument in rest):
        print(f"tokenmill {command} CONFIG.yaml... [key=value ...]\n\n{job.__doc__}")
        print(f"All keys with their defaults (jobs/config.py explains them):\n\n{defaults_yaml()}")
        return 0
    from pipeline import storage
    from pipeline.errors import BrokenOutput, NoShards, OutputMismatch, StorageError, UnsafeStorage
    from tokenizer.errors import CodebookMissing, TokenizerMismatch

    mistakes = (ConfigError, NoShards, OutputMismatch, BrokenOutput, UnsafeStorage, TokenizerMismatch, CodebookMissing)
    try:
        with _raising_at_sigterm():
            config = load_config([_as_setting(argument) for argument in rest])
            storage.configure(config.storage.options, config.storage.create_only)
            return _finish(command, job.run(config))
    except (*mistakes, PermissionError) as error:
        return _finish(command, 2, str(error))
    except StorageError as error:  # what was committed stays: the same command goes on from there
        return _finish(command, 3, str(error))
    except KeyboardInterrupt:
        return _finish(command, 130)
    except Terminated:
        return _finish(command, 143)


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextlib.contextmanager
def _raising_at_sigterm() -> Iterator[None]:
    def handle(signum: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(command: str, code: int, error: str = "") -> int:
    if error:
        print(f"tokenmill {command}: {error}", file=sys.stderr)
    if code:  # `ray job submit` turns every non-zero exit into 1: the words tell which it was
        print(f"tokenmill {command}: exit {code}: {OUTCOMES[code]}", flush=True)
    return code


def _as_setting(argument: str) -> str:
    """--deep is deep=true."""
    is_flag = argument.startswith("--") and "=" not in argument
    return f"{argument.removeprefix('--')}=true" if is_flag else argument


def _help() -> str:
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([f"{__doc__}", "Commands (`tokenmill COMMAND --help` tells more):", *lines])


if __name__ == "__main__":
    sys.exit(main())
