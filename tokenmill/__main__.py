"""The command `tokenmill`, the same as `python -m tokenmill` and `python -m jobs`."""

import sys

from tokenmill.extras import explain


def main() -> int:
    """Runs one command and returns its exit code. A missing extra is a mistake in the installation: exit code 2."""
    try:
        from jobs.__main__ import main as run_command

        return run_command()
    except ImportError as error:
        line = explain(error, " ".join(["tokenmill", *sys.argv[1:2]]))
        if line is error:
            raise
        print(line, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
