"""What a terminal would obey is written out: in files and pipes all of it, on a terminal all but rich's own."""

import io
import logging
import sys

import pytest

from fdkit.data.terminal import PlainFormatter, escaped, guard_streams


class Screen(io.StringIO):
    """A terminal, as far as anyone can tell."""

    def isatty(self) -> bool:
        return True


TITLE, CLEAR, RED, UP, LINE = "\x1b]0;owned\x07", "\x1b[2J", "\x1b[31m", "\x1b[5A", "\r"


@pytest.mark.parametrize(
    ("stream", "screen", "obeyed"),
    [
        ("stdout", False, ""),
        ("stderr", False, ""),
        ("stdout", True, RED),
        ("stderr", True, CLEAR + RED + UP + LINE),
    ],
)
def test_what_passes(stream: str, screen: bool, obeyed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Screen() if screen else io.StringIO())
    under = getattr(sys, stream)
    guard_streams()
    guard_streams()  # a second call adds nothing
    for code in (TITLE, CLEAR, RED, UP, LINE):
        print(f"{code}x", end="", file=getattr(sys, stream))
        written = under.getvalue()
        under.truncate(0)
        under.seek(0)
        assert (written == f"{code}x") == (code in obeyed), repr(code)
        if code not in obeyed:
            assert written.isprintable()
            assert written.endswith("x")


def test_written_out_text_keeps_its_lines_and_tabs() -> None:
    assert escaped("a\tb\nc\u202ed\x1b[1me\ud800") == "a\tb\nc\\u202ed\\x1b[1me\\ud800"
    record = logging.LogRecord("fdkit", logging.INFO, "", 0, "%s", ("\x9b2J",), None)
    assert PlainFormatter("%(message)s").format(record) == "\\x9b2J"
