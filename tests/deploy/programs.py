"""Programs that the tests of deploy/ run."""

import shutil
import sys
from pathlib import Path

import pytest


def program(name: str) -> str:
    """Path of a program of the extra `dev`. Skips the test if it is not installed."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip(f"needs {name}: pip install -e '.[dev]'")
    return found
