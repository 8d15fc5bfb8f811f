"""docs/guarantees.md names only tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
NAMED = re.compile(r"`(?P<file>[\w/]+\.py)?(?:::(?P<test>\w+))?`")


def test_every_test_that_the_guarantees_name_exists():
    text = (TESTS.parent / "docs/guarantees.md").read_text()
    file, missing = "", []
    for named in NAMED.finditer(text):
        file = named["file"] or file  # `::test` alone means the file named before
        if named["test"] and f"def {named['test']}(" not in (TESTS / file).read_text():
            missing.append(f"{file}::{named['test']}")
        elif named["file"] and not (TESTS / file).exists():
            missing.append(file)
    assert missing == []
