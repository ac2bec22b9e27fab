"""Reading from a disk that may be slow or away for a while: a network share, a mounted bucket.

A read that fails because the disk did not answer is tried again soon, three times; it may be one bad sector. Where the
folder itself is gone, it is waited for up to a limit, since every other image would fail as well.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from fdkit.data.text import printable
from fdkit.errors import DataError

T = TypeVar("T")

log = logging.getLogger("fdkit")

DEFAULT_SECONDS = 120.0
PAUSES = (0.1, 0.5, 2.0)
"""Seconds before a read that the disk did not answer is tried again."""
LOOK_EVERY_SECONDS = 1.0
NO_ANSWER = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ECONNRESET", "EAGAIN",
                 "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ENOLINK")
    if hasattr(errno, name)
}  # fmt: skip
"""What the system says where a disk, rather than a file, is at fault."""

_seconds: ContextVar[float] = ContextVar("seconds", default=DEFAULT_SECONDS)


class LostData(DataError):  # noqa: N818 - where images were, nothing is any more
    """A folder of images went away and did not come back."""


@contextlib.contextmanager
def waiting_up_to(seconds: float) -> Iterator[None]:
    """Inside, a folder that is gone is waited for this long; 0 for not at all."""
    before = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(before)


def read_patiently(read: Callable[[Path], T], path: Path) -> T:
    """What `read` makes of a file, tried again where the disk did not answer.

    Raises the last OSError of a file that cannot be read, and LostData where its folder is gone for longer than
    `waiting_up_to` says.
    """
    for pause in (*PAUSES, None):
        try:
            return read(path)
        except OSError as error:
            if _is_gone(path.parent):
                _wait_for(path.parent)
            elif error.errno not in NO_ANSWER or pause is None:
                raise
            else:
                time.sleep(pause)
    return read(path)


def _is_gone(folder: Path) -> bool:
    try:
        folder.stat()
    except OSError:
        return True
    return False


def _wait_for(folder: Path) -> None:
    """Return when a folder is there again."""
    limit, start = _seconds.get(), time.monotonic()
    shown = printable(str(folder))
    if limit:
        log.warning("%s is gone; waiting up to %.0f s for it", shown, limit)
    while _is_gone(folder):
        waited = time.monotonic() - start
        if waited >= limit:
            raise LostData(
                f"{shown}: the folder of images is gone, and did not come back within {limit:.0f} s",
                "bring it back, then run the same command with --resume; --loader.retry-seconds waits longer",
            )
        time.sleep(min(LOOK_EVERY_SECONDS, limit - waited + 0.01))
    log.warning("%s is there again after %.0f s", shown, time.monotonic() - start)
