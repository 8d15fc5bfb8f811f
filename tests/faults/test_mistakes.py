"""A short form of `python -m tests.faults.mistakes`, whose figures are in results/faults/mistakes.json."""

from pathlib import Path

from tests.faults.mistakes import attack

VALUES = ("-1", "x", "[[1]]", "{a: 1}", "${nothing}", "999999999999999999999", "\x1b[31m", "/dev/null")
COMMANDS = ("pack", "status", "verify", "audit", "decode", "export")


def test_wrong_values_of_any_key_give_a_line_and_no_error_of_python(tmp_path: Path):
    figures = attack(tmp_path, VALUES, COMMANDS)
    assert figures["unhandled"] == []
    assert figures["attempts"] > 300
    assert all(counts["exit 2"] > 10 for counts in figures["outcomes"].values())
