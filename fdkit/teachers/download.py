"""Brings a file from a plain address: resumed where it was cut, verified, and in its place whole or not at all."""

import errno
import fcntl
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fdkit.data.json_file import read_object
from fdkit.errors import ResourceError, WeightsError
from fdkit.teachers.files import verify

logger = logging.getLogger("fdkit")

STALL_SECONDS = 15.0
"""How long a server may say nothing, at the first contact and between two pieces of the file."""
TRIES = 4
"""Attempts in a row that bring nothing new before a download is given up."""
_PAUSE_SECONDS = 1.0
_PIECE_BYTES = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STATUS = {
    401: "the server asks for a login",
    403: "the server refuses it (403): a gated file, or an address that needs a key",
    404: "there is no such file on the server (404)",
    410: "the file was taken off the server (410)",
}


class UnreachableError(Exception):
    """Why a file could not be had; whoever asked for it says what to do."""


class _CutError(Exception):
    """An attempt that ended early; the next goes on where it stopped."""


class _Part(NamedTuple):
    """What the file being received is a part of."""

    url: str
    validator: str
    """The server's own mark of this version of the file; empty if it gives none."""
    total: int | None


def download(url: str, path: Path, *, sha256: str | None = None) -> None:
    """Bring the file at an http(s) address to `path`.

    It is received beside it as `.part`, goes on where an earlier attempt was cut if the server still has the same
    file, and is renamed once it is complete and on disk. Of several processes one downloads and the others wait.
    sha256: published SHA-256 in hex, or its first digits; None checks the size alone.
    Raises UnreachableError if the server does not give it, WeightsError for a wrong checksum, ResourceError for a
    full disk, OSError for a folder that cannot be written.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UnreachableError(f"{url} is no http(s) address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with _alone(path):
        if path.is_file():
            return
        try:
            _receive_whole(part, url)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise _disk_full(path, error.strerror or "disk full") from error
            raise
        if sha256:
            _verify_or_delete(part, sha256, url)
        part.replace(path)
        _sync_folder(path.parent)
        _note_of(part).unlink(missing_ok=True)


def _verify_or_delete(part: Path, sha256: str, url: str) -> None:
    try:
        verify(part, sha256)
    except WeightsError as error:
        part.unlink()
        _note_of(part).unlink(missing_ok=True)
        raise WeightsError(
            f"{error.message} ({url})",
            hint="what was received is deleted; if it happens again, the server has another file than the "
            "published one, or something on the way changes it",
        ) from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process downloads the same file."""
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        said = False
        while not _locked(descriptor):
            if not said:
                logger.info("another process downloads %s: waiting for it", path.name)
            said = True
            time.sleep(0.2)
        yield
        lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _receive_whole(part: Path, url: str) -> None:
    """Attempts until the part is the whole file; only those that bring nothing new count against it."""
    failures, most = 0, _size(part)
    while True:
        try:
            return _receive(part, url)
        except _CutError as cut:
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures >= TRIES:
                raise UnreachableError(
                    f"{cut}; {_size(part)} bytes are kept in {part.name}, and running again goes on there"
                ) from cut
            logger.info("%s: %s: trying again", part.name, cut)
            time.sleep(_PAUSE_SECONDS * 2 ** (failures - 1))


def _receive(part: Path, url: str) -> None:
    """One request: the rest of the file, or all of it if there is no part to go on from."""
    note = _read_note(part, url)
    have = _size(part) if note.validator else 0
    if have and have == note.total:
        return
    headers = {"User-Agent": "fdkit", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": note.validator}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=STALL_SECONDS) as answer:
            given = _what_is_given(answer, url)
            if answer.status == 206 and (given.start, given.part) != (have, note):
                part.unlink(missing_ok=True)
                raise _CutError("the server answers with a part of another file")
            _store(part, answer, given)
    except urllib.error.HTTPError as error:
        raise _refusal(error, part) from error
    except urllib.error.URLError as error:
        raise UnreachableError(f"no connection to {urlsplit(url).hostname}: {error.reason}") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _CutError(f"the connection broke ({type(error).__name__})") from error


def _refusal(error: urllib.error.HTTPError, part: Path) -> Exception:
    """What a status that is no success means: try again, or give up."""
    if error.code == 416:
        part.unlink(missing_ok=True)
        return _CutError("the server has less of it than is here")
    said = f"the server answers {error.code} {error.reason}"
    if error.code in (408, 429) or error.code >= 500:
        return _CutError(said)
    return UnreachableError(_STATUS.get(error.code, said))


class _Given(NamedTuple):
    """An answer's bytes: of which file, and from where in it."""

    part: _Part
    start: int


def _what_is_given(answer: Any, url: str) -> _Given:
    etag = answer.headers.get("ETag") or ""
    validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified") or ""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range") or "")
    if answer.status == 206 and span is not None:
        return _Given(_Part(url, validator, int(span[2])), int(span[1]))
    length = answer.headers.get("Content-Length")
    return _Given(_Part(url, validator, int(length) if length else None), 0)


def _store(part: Path, answer: Any, given: _Given) -> None:
    """Writes an answer into the part from where it goes on; _CutError if it ends before the file does."""
    total = given.part.total
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - given.start > free:
        raise _disk_full(
            part, f"{(total - given.start) / 1e6:.0f} MB to receive and {free / 1e6:.0f} MB free"
        )
    size = "of a size it does not say" if total is None else f"{total / 1e6:.0f} MB"
    logger.info("downloading %s, %s, from byte %d", given.part.url, size, given.start)
    with part.open("r+b" if given.start else "wb") as file, _progress(part, total, given.start) as advance:
        _note_of(part).write_text(json.dumps(given.part._asdict()))
        file.seek(given.start)
        file.truncate()
        try:
            while piece := answer.read(_PIECE_BYTES):
                file.write(piece)
                advance(len(piece))
        finally:
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(part) != total:
        raise _CutError(f"the connection ended after {_size(part)} of {total} bytes")


@contextmanager
def _progress(part: Path, total: int | None, start: int) -> Iterator[Any]:
    """Shows a bar if standard error is a terminal; yields what to call with the bytes of each piece."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(part.stem, total=total, completed=start)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path, url: str) -> _Part:
    """What the part is of; nothing, if that is another address or not known."""
    try:
        note = read_object(_note_of(part))
    except (OSError, ValueError):
        return _Part(url, "", None)
    validator, total = note.get("validator"), note.get("total")
    is_note = isinstance(validator, str) and validator.isascii() and validator.isprintable()
    if note.get("url") != url or not is_note or not (total is None or (type(total) is int and total >= 0)):
        return _Part(url, "", None)
    return _Part(url, str(validator), total)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sync_folder(folder: Path) -> None:
    """Makes the rename last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(path: Path, reason: str) -> ResourceError:
    return ResourceError(
        f"no room for {path.name} in {path.parent}: {reason}",
        hint="free some space there, or set TORCH_HOME to a folder on a larger disk; what is received is kept",
    )
