"""Which images lie below a folder, and their names in little memory."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fdkit.data.decode import EXTENSIONS, printable

log = logging.getLogger("fdkit")


class PackedNames:
    """A list of strings in two arrays: a million Python strings would be copied into every worker."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedNames":
        """The names in the two arrays of another. Raises KeyError if they are none."""
        if data.dtype != np.uint8 or ends.dtype != np.int64 or (ends[-1] if len(ends) else 0) != len(data):
            raise KeyError("not packed names")
        if (np.diff(ends, prepend=0) < 0).any():
            raise KeyError("not packed names")
        packed = cls.__new__(cls)
        packed.bytes, packed.ends = data, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())


def subfolders(folder: Path) -> list[str]:
    """Names of the folders directly inside that may hold images, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry))


def has_loose_images(folder: Path) -> bool:
    """Whether an image lies directly in a folder."""
    with os.scandir(folder) as entries:
        return any(_is_image(entry) for entry in entries)


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
    return entry.is_dir() and not entry.name.startswith(".") and not entry.name.lower().endswith(EXTENSIONS)


def _is_image(entry: os.DirEntry[str]) -> bool:
    # A dangling link counts: it is reported as unreadable rather than passed over in silence.
    if entry.name.startswith(".") or not entry.name.lower().endswith(EXTENSIONS):
        return False
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
