"""What reaches the terminal: no control characters of names, and no secrets of URLs."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from jobs.__main__ import main
from jobs.reports.progress import Progress
from jobs.reports.terminal import Printable, printable
from pipeline.storage import retries


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07\x7f\x9b31m", r"a\x1b[2Jb\x07\x7f\x9b31m"),
        ("over\rwritten", r"over\rwritten"),
        ("exe\u202egpj.tar", r"exe\u202egpj.tar"),
        ("not utf-8: \udcff", r"not utf-8: \udcff"),
        ("two\u2028lines", r"two\u2028lines"),
        ("two\nlines\tand é, 日本, \u0645\u06cc\u200c\u062e", "two\nlines\tand é, 日本, \u0645\u06cc\u200c\u062e"),
        ("https://me:s3cret@host/x", "https://***@host/x"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str):
    assert printable(text) == shown


def test_an_error_shows_the_escape_characters_of_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "packed").mkdir()
    assert main(["pack", f"pack.source={tmp_path}/\x1b]0;title\x07", f"pack.shards={tmp_path}/packed/x"]) == 2
    printed = "".join(capsys.readouterr())
    assert r"\x1b]0;title\x07" in printed
    assert "\x1b" not in printed


def test_an_error_hides_the_password_of_a_url(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "RETRY_FOR_S", 0.1)
    assert main(["pack", "pack.source=http://me:s3cret@127.0.0.1:1/x", "pack.shards=/nowhere/x"]) == 3
    printed = "".join(capsys.readouterr())
    assert "http://127.0.0.1:1/x" in printed
    assert "s3cret" not in printed


def test_an_error_about_storage_options_does_not_show_them(capsys: pytest.CaptureFixture[str]):
    assert main(["status", "output=/nowhere", "storage.options.s3=s3cret"]) == 2
    printed = "".join(capsys.readouterr())
    assert "storage.options.s3 must hold keys" in printed
    assert "s3cret" not in printed


def test_progress_erases_its_line_but_names_cannot():
    terminal = Terminal()
    with redirect_stdout(Printable(terminal)):  # type: ignore[type-var]
        progress = Progress("decode", 1, "files")
        progress.show("\r\x1b[Kname")
        progress.say("\x1b[Aup")
    assert terminal.getvalue() == ("\r\x1b[Kdecode: 0/1 files  \\r\\x1b[Kname  0s left\r\x1b[Kdecode: \\x1b[Aup\n")
