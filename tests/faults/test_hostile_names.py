"""Names that a terminal would obey are shown as they are written, in everything that is printed and logged."""

import io
import logging
import sys
from pathlib import Path

import pytest
from faults.hostile_names import NAME, command_lines, make_places, try_names

from fdkit.cli import main
from fdkit.data.terminal import PlainFormatter, escaped, guard_streams

ALL = 99


@pytest.mark.slow
def test_a_run_and_refusals_show_hostile_names_as_they_are_written(tmp_path: Path) -> None:
    result = try_names(tmp_path, amount=14, seed=0)
    assert result["failures"] == []
    assert result["codes"]["distill"] == 0
    assert {code for name, code in result["codes"].items() if name != "distill"} <= {2, 3, 4, 5}
    assert result["shown"] == result["tried"] == 14


@pytest.mark.long
def test_every_command_shows_hostile_names_as_they_are_written(tmp_path: Path) -> None:
    result = try_names(tmp_path, amount=ALL, seed=0)
    assert result["failures"] == []
    assert sorted(result["codes"]) == sorted(command_lines(make_places(tmp_path / "again")))
    worked = [name for name, code in result["codes"].items() if code == 0]
    assert {"distill", "pack", "evaluate knn", "analyze", "compare", "report", "finetune", "segment"} <= set(
        worked
    )


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert escaped("plain \t ü 漢 [bold]x\n") == "plain \t ü 漢 [bold]x\n"
    assert escaped("\x1b[31mred\x07\r") == "\\x1b[31mred\\x07\\r"
    assert escaped("\x9b31m \u202egnp \udcff \u2028") == "\\x9b31m \\u202egnp \\udcff \\u2028"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_pass_on_a_terminal_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    guard_streams()
    guard_streams()  # a second time changes nothing
    print("\x1b[1;31mred\x1b[0m \x1b]0;title\x07 \x1bc \x9b2J \x1b]52;c;aGk=\x1b\\", end="")
    assert terminal.getvalue() == (
        "\x1b[1;31mred\x1b[0m \\x1b]0;title\\x07 \\x1bc \\x9b2J \\x1b]52;c;aGk=\\x1b\\"
    )


def test_a_log_line_is_escaped(tmp_path: Path) -> None:
    record = logging.LogRecord("fdkit", logging.INFO, "x.py", 1, "folder %s", (NAME,), None)
    assert PlainFormatter("%(message)s").format(record) == "folder \\x1b[31m[bold]x\\x1b]0;owned\\x07{y}%s"


def test_an_error_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "knn", NAME, "--data", "digits"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "\\x1b[31m[bold]x" in said
    assert "\x1b" not in said
