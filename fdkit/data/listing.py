"""Which images lie below a folder, and their names in little memory."""

import hashlib
import logging
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from fdkit.data.decode import EXTENSIONS
from fdkit.data.text import printable

log = logging.getLogger("fdkit")

STAT_CHUNK = 1000
STAT_THREADS = 32
SLOW_SECONDS = 5e-5
"""Asking for a file's size takes a local disk 3 microseconds; where it takes longer than this, threads share it."""


class PackedNames:
    """A list of strings in two arrays: a million Python strings would be copied into every worker."""

    def __init__(self, names: Iterable[str]) -> None:
        data, ends = bytearray(), array("q")
        for name in names:
            data += os.fsencode(name)
            ends.append(len(data))
        self.bytes = np.frombuffer(bytes(data), dtype=np.uint8)
        self.ends = np.array(ends, dtype=np.int64)

    @classmethod
    def of_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedNames":
        """The names in the two arrays of another. Raises KeyError if they are none."""
        if data.dtype != np.uint8 or ends.dtype != np.int64 or data.ndim != 1 or ends.ndim != 1:
            raise KeyError("not packed names")
        if (ends[-1] if len(ends) else 0) != len(data):
            raise KeyError("not packed names")
        if (ends < 0).any() or (ends > len(data)).any() or (np.diff(ends, prepend=0) < 0).any():
            raise KeyError("not packed names")
        packed = cls.__new__(cls)
        packed.bytes, packed.ends = data, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())

    def encoded(self) -> Iterator[bytes]:
        """The names one after another, as the file system has them."""
        data, start = self.bytes.data, 0
        for end in self.ends.tolist():
            yield bytes(data[start:end])
            start = end


def stamps(root: Path, names: PackedNames) -> tuple[str, str]:
    """SHA-256 of every name and file size, and of these and the time of every file's last change.

    A file that is gone counts as -1 bytes. Every file is asked each time: one that is written over in place changes
    no folder's time, so nothing that is remembered would tell. Slow (network) disks are asked by many at once.
    """
    sizes, times = hashlib.sha256(), hashlib.sha256()
    prefix = os.path.join(os.fsencode(root), b"")
    seconds = 0.0
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for chunk in _chunks(names.encoded()):
            start = time.perf_counter()
            paths = [prefix + name for name in chunk]
            found = list(pool.map(_stat, paths) if seconds > SLOW_SECONDS else map(_stat, paths))
            seconds = seconds or (time.perf_counter() - start) / len(chunk)
            named = [name.replace(os.fsencode(os.sep), b"/") for name in chunk]
            sizes.update(
                b"".join(b"%b\0%d\n" % (name, size) for name, (size, _) in zip(named, found, strict=True))
            )
            times.update(b"".join(b"%d\n" % changed for _, changed in found))
    times.update(sizes.digest())
    return sizes.hexdigest(), times.hexdigest()


def _chunks(names: Iterator[bytes]) -> Iterator[list[bytes]]:
    while chunk := list(islice(names, STAT_CHUNK)):
        yield chunk


def _stat(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def subfolders(folder: Path) -> list[str]:
    """Names of the folders directly inside that may hold images, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry))


def has_loose_images(folder: Path) -> bool:
    """Whether an image lies directly in a folder."""
    with os.scandir(folder) as entries:
        return any(_is_image(entry) and not _is_a_folder(entry) for entry in entries)


def images_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of the images below a folder, relative to it, sorted level by level; `above` ends loops of links."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        log.warning("unreadable folder left out: %s", printable(str(folder)))
        return
    for entry in entries:
        if _is_image(entry):
            yield entry.name
        elif _is_folder(entry):
            for name in images_below(folder / entry.name, above | {here}):
                yield os.path.join(entry.name, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or entry.name.lower().endswith(EXTENSIONS):
        return False
    return _is_a_folder(entry)


def _is_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    # Whatever has an image's name counts, a dangling link, a folder or a pipe too: it is reported as unreadable rather
    # than passed over in silence.
    return entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
