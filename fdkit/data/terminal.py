"""What is printed and logged, with what a terminal would obey escaped: names of files and classes are anybody's.

Only rich's own colours pass, and on standard error, where no name is printed that is not written out before, the
cursor moves of its progress lines; and both only where a terminal reads: into a file or pipe nothing does.
"""

import logging
import re
import sys
from typing import Any

_OBEYED = (
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029"  # control characters but tab and new line; other line ends
    r"\u200e\u200f\u202a-\u202e\u2066-\u2069"  # those that turn the direction of writing
    r"\ud800-\udfff]"  # bytes of names that are no UTF-8, which cannot be printed at all
)
_OF_NAMES = re.compile(_OBEYED)
_STYLED = re.compile(rf"(\x1b\[[0-9;]*m)|{_OBEYED}")
_MOVING = re.compile(rf"(\x1b\[[0-9;?]*[mKAJHhl]|\r)|{_OBEYED}")


def escaped(text: str) -> str:
    """The text with everything a terminal would obey written out, but for tabs and ends of lines."""
    return _OF_NAMES.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    if found.lastindex:
        return found[0]
    return found[0].encode("unicode_escape").decode()


class PlainFormatter(logging.Formatter):
    """A log line with everything in it that a terminal would obey written out."""

    def format(self, record: logging.LogRecord) -> str:
        """As usual, then escaped."""
        return escaped(super().format(record))


class _Guarded:
    """A text stream that writes out what a terminal would obey."""

    def __init__(self, stream: Any, on_a_terminal: re.Pattern[str]) -> None:
        self._stream = stream
        self._pattern = on_a_terminal if stream.isatty() else _OF_NAMES

    def write(self, text: str) -> int:
        """Write the text, escaped; the number of its own characters."""
        self._stream.write(self._pattern.sub(_written_out, text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Have standard output and error of this process write out what a terminal would obey."""
    for name, on_a_terminal in (("stdout", _STYLED), ("stderr", _MOVING)):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded):
            setattr(sys, name, _Guarded(stream, on_a_terminal))
