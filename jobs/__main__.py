"""`tokenmill COMMAND [CONFIG ...] [key=value ...]`, the same as `python -m jobs COMMAND ...`.

Exit codes: 0 success; 2 a mistake in the configuration or the command; 3 incomplete, or verification failed; 4 done,
but more samples were quarantined than tokens.max_bad_fraction allows; 130 and 143 interrupted by ctrl-C or SIGTERM;
1 any other error.
"""

import contextlib
import difflib
import errno
import importlib
import importlib.metadata
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from jobs.reports.terminal import printing_safely

COMMANDS = {  # name: (module, summary); a module is imported only to run its command, since torch and ray are slow
    "pack": ("jobs.pack", "pack a folder of files, or Parquet or CSV files, into WebDataset shards"),
    "import": ("jobs.import_model", "import a published tokenizer, such as hf:kyutai/mimi"),
    "train": ("jobs.train", "train an autoencoder on shards"),
    "codebook": ("jobs.codebook", "make the codebook of a trained model and freeze the tokenizer"),
    "tokenize": ("jobs.tokenize_corpus", "turn shards into token shards, each sample exactly once"),
    "status": ("jobs.status", "show the progress of tokenize: shards done, left and failed, and the rate"),
    "verify": ("jobs.verify", "prove that every input sample is in the output exactly once"),
    "audit": ("jobs.audit", "tokenize a random sample of rows again and compare the tokens"),
    "retry": ("jobs.retry", "process quarantined samples and failed shards again"),
    "decode": ("jobs.decode", "decode token rows to images or audio files"),
    "export": ("jobs.export", "write the tokens in the format of another reader, such as nanoGPT or WebDataset"),
    "view": ("jobs.view", "make a page that shows the rows, codes and quarantined samples of an output"),
    "compare": ("jobs.compare", "train several methods and sizes with one recipe and compare them"),
    "evaluate": ("jobs.evaluate", "measure quality and codebook usage on held-out shards"),
}
RERUN = "rerun the same command to continue"
OUTCOMES = {
    2: "a mistake in the command or its configuration",
    3: "incomplete, or verification failed",
    4: "too many quarantined samples",
    130: f"interrupted (ctrl-C); {RERUN}",
    143: f"terminated (SIGTERM); {RERUN}",
}
UPLOADED = "/working_dir_files/_ray_pkg_"  # in paths where Ray unpacks the working directory of a submitted job
HELP = ("-h", "--help")
WITHOUT_MODELS = ("status", "verify", "export")  # these start without torch, whose import takes seconds
ALONE = {"import": "pretrained.source", "view": "output"}  # the key that an argument without one is the value of
SHORT_FLAGS = {"deep": "verify.deep", "repair": "verify.repair", "dry-run": "verify.dry_run", "json": "status.json"}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. The last line that it prints says in words what a non-zero code
    means."""
    if arguments is None:
        sys.excepthook = _print_without_secrets
    try:
        with printing_safely():
            code = _main((sys.argv[1:] if arguments is None else arguments) or ["--help"])
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again as it exits
        return 128 + signal.SIGPIPE


def _print_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of an error that no command expects. Libraries put URLs and options into their errors."""
    from pipeline import storage

    print(storage.without_values("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _main(arguments: list[str]) -> int:
    command, *rest = arguments
    if command in (*HELP, "help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"tokenmill {version()}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return _finish(command, 2, f"unknown command {command!r}; {hint}choose one of: {', '.join(COMMANDS)}")
    if any(argument in HELP for argument in rest):
        from jobs.config.help import command_help

        print(command_help(command, COMMANDS[command][0]))
        return 0
    return _run(command, rest)


def version() -> str:
    try:
        return importlib.metadata.version("tokenmill")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _run(command: str, arguments: list[str]) -> int:
    from jobs.actors.cluster import NoRoom
    from jobs.config import ConfigError, load_config, to_yaml
    from jobs.config.secrets import take_url_secrets
    from pipeline import storage
    from pipeline.errors import BrokenOutput, NoShards, OutputMismatch, StorageError, UnknownStorage, UnsafeStorage
    from tokenizer.errors import CodebookMissing, MissingPackage, TokenizerMismatch, UnsupportedModel

    broken = (NoShards, OutputMismatch, BrokenOutput, UnknownStorage, UnsafeStorage)
    of_tokenizer = (TokenizerMismatch, CodebookMissing, MissingPackage, UnsupportedModel)
    mistakes = (ConfigError, *broken, *of_tokenizer, PermissionError)
    try:
        with _raising_at_sigterm():
            settings = [_as_setting(a, command) for a in arguments if a != "--print"]
            config = load_config(settings, models=command not in WITHOUT_MODELS)
            url_secrets = take_url_secrets(config)
            if "--print" in arguments:
                print(to_yaml(config, command), end="")
                return 0
            _refuse_uploaded(config)
            job = importlib.import_module(COMMANDS[command][0])
            storage.configure(config.storage.options, config.storage.create_only, url_secrets)
            config.command = storage.without_values(_command_line(command, arguments))
            return _finish(command, job.run(config))
    except mistakes as error:
        return _finish(command, 2, str(error))
    except StorageError as error:  # committed shards stay; the same command continues from them
        return _finish(command, 3, str(error))
    except NoRoom as error:
        return _finish(command, 3, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        return _finish(command, 3 if error.errno in PASSING else 2, f"{error}; {_remedy(error.errno)}")
    except KeyboardInterrupt:
        return _finish(command, 130)
    except Terminated:
        return _finish(command, 143)


def _command_line(command: str, arguments: list[str]) -> str:
    """The command as a user would type it, without the values of `storage`, which may be secrets."""
    shown = [re.sub(r"^((--)?storage\.[^=]*)=.*", r"\1=...", argument, flags=re.S) for argument in arguments]
    return shlex.join(["tokenmill", command, *shown])


# errors of the machine rather than of the command: a disk that is full or fails, too many open files
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _remedy(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space and {RERUN}"
    if number in PASSING:
        return f"fix the cause and {RERUN}"
    return "check this path: a folder that a command writes must be writable"


def _refuse_uploaded(config: Any) -> None:
    """Raises ConfigError for a relative path that the command would write inside of Ray's copy of the working
    directory: Ray deletes that folder after the job."""
    from jobs.config import ConfigError
    from pipeline import storage

    written = {"run": config.run, "output": config.output, "decode.output": config.decode.output}
    written |= {"pack.shards": config.pack.shards, "export.to": config.export.to, "view.page": config.view.page}
    for key, value in written.items():
        if value and UPLOADED in storage.normalise(value):
            raise ConfigError(
                f"{key} is {value}: a path in Ray's copy of the working directory, which is deleted after the job; "
                "give an absolute path that all nodes share, or a URL"
            )


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
    if code:  # `ray job submit` turns every non-zero exit code into 1, so we also print which one it was
        print(f"tokenmill {command}: exit {code}: {OUTCOMES[code]}", flush=True)
    return code


def _is_place(argument: str, command: str) -> bool:
    """Whether an argument of `import` or `view` is what the command is about, and not a configuration."""
    from pipeline import storage

    if argument.endswith((".yaml", ".yml")):
        return False
    return command == "import" or "/" in argument or storage.exists(storage.join(argument, "dataset.json"))


def _as_setting(argument: str, command: str) -> str:
    """--deep becomes verify.deep=true, and --codebook.cache becomes codebook.cache=true. What `import` and `view` are
    about may be given alone."""
    if command in ALONE and "=" not in argument and not argument.startswith("-") and _is_place(argument, command):
        return f"{ALONE[command]}={argument}"
    if not argument.startswith("--"):
        return argument
    key, _, value = argument.removeprefix("--").partition("=")
    return f"{SHORT_FLAGS.get(key, key)}={value or 'true'}"


def _help() -> str:
    return "\n".join(
        [
            f"tokenmill {version()}: turns image and audio corpora into discrete tokens.",
            "",
            "Usage: tokenmill COMMAND [CONFIG ...] [key=value ...]",
            "       tokenmill COMMAND --help     what a command does, and its keys with their defaults",
            "       tokenmill COMMAND --print    the merged configuration; the command does not run",
            "       tokenmill --version",
            "",
            "Commands:",
            *(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            f"Exit codes:{(__doc__ or '').partition('Exit codes:')[2].rstrip()}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
