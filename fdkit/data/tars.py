"""Where the images of a tar archive lie, so that any of them is one read. Nothing is ever unpacked.

Only the bytes of regular members are read: links, devices and paths that lead elsewhere are names like any other.
"""

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdkit.data.cache import read_arrays, write_arrays
from fdkit.data.decode import EXTENSIONS
from fdkit.data.json_file import parse_json
from fdkit.data.listing import PackedNames
from fdkit.data.text import printable
from fdkit.errors import DataError

log = logging.getLogger("fdkit")

BLOCK = 512
MAX_LABEL_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
"""Of a long name, or of one member's PAX records."""
MAX_LABEL = 999_999
"""The largest number of a class: all below it have a name, and a damaged one would make two thousand million."""
MAX_OFFSET = (1 << 63) - 1
"""The last byte that any file can have."""
NO_LABEL = -1
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_VERSION = 1


class TarIndex(NamedTuple):
    """The M images of one archive, in the order they lie in it."""

    names: PackedNames
    """Member names, as they are."""
    offsets: np.ndarray
    """(M,) int64: where the bytes of each begin."""
    sizes: np.ndarray
    """(M,) int64: how many bytes each has."""
    labels: np.ndarray
    """(M,) int64: the number in the .cls or .json member of the same key; NO_LABEL in an archive without any."""
    folders: PackedNames
    """The folders that hold images, each once; "" is the archive itself."""
    folder_ids: np.ndarray
    """(M,) int64: the folder of each image, as a place in `folders`."""


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    changed_ns: int
    inode: int


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file, from its status."""
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def tar_index(path: Path) -> tuple[TarIndex, Stamp]:
    """The images of an archive and the stamp of the file they were found in; kept, and made once.

    Raises DataError if the archive cannot be read, is damaged (named with the byte), is compressed, or has labels that
    are no class numbers.
    """
    try:
        stamp = stamp_of(path.stat())
    except OSError as error:
        raise DataError(f"{printable(str(path))}: {error.strerror or error}") from error
    key = json.dumps([_VERSION, str(path.absolute()), *stamp])
    kept = read_arrays("tars", str(path.absolute()), key)
    index = None if kept is None else _unpacked(kept, stamp.size)
    if index is None:
        index = _scan(path)
        write_arrays("tars", str(path.absolute()), key, _packed(index))
    return index, stamp


def _packed(index: TarIndex) -> dict[str, np.ndarray]:
    plain = {name: getattr(index, name) for name in ("offsets", "sizes", "labels", "folder_ids")}
    for name in ("names", "folders"):
        packed: PackedNames = getattr(index, name)
        plain |= {f"{name}_bytes": packed.bytes, f"{name}_ends": packed.ends}
    return plain


def _unpacked(kept: dict[str, np.ndarray], size: int) -> TarIndex | None:
    """The index in the arrays, or None if they do not fit the file or each other."""
    try:
        numbers = {name: kept[name] for name in ("offsets", "sizes", "labels", "folder_ids")}
        names = PackedNames.of_arrays(kept["names_bytes"], kept["names_ends"])
        folders = PackedNames.of_arrays(kept["folders_bytes"], kept["folders_ends"])
    except KeyError:
        return None
    offsets, sizes = numbers["offsets"], numbers["sizes"]
    if any(array.dtype != np.int64 or array.shape != (len(names),) for array in numbers.values()):
        return None
    if (sizes < 0).any() or (offsets < BLOCK).any() or (offsets > size - sizes).any():
        return None
    if (numbers["folder_ids"] < 0).any() or (numbers["folder_ids"] >= len(folders)).any():
        return None
    labels = numbers["labels"]
    if (labels < NO_LABEL).any() or (labels > MAX_LABEL).any():
        return None
    return TarIndex(names=names, folders=folders, **numbers)


def _scan(path: Path) -> TarIndex:
    shown = printable(str(path))
    found = _Found(shown)
    try:
        with path.open("rb") as file:
            head = file.read(8)
            for magic, remedy in _COMPRESSED.items():
                if head.startswith(magic):
                    raise DataError(
                        f"{shown}: is compressed", f"unpack it to a plain tar first: {remedy} FILE"
                    )
            file.seek(0)
            for member in _members(path, file.fileno()):
                found.add(member, file.fileno())
    except OSError as error:
        raise DataError(f"{shown}: {error.strerror or error}") from error
    if found.num_others:
        log.warning("%s: %d links or special files are left out", shown, found.num_others)
    return found.index()


class _Headers:
    """A file of which no more is read at a time than headers need: one that lies may ask for all memory there is."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """As the file does. Raises ReadError for more than MAX_HEADER_BYTES."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data: bytes = self._file.read(size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _members(path: Path, descriptor: int) -> Iterator[tarfile.TarInfo]:
    """Every member of an archive. Raises DataError where it is damaged; tarfile itself would end there in silence."""
    shown = printable(str(path))
    hint = "fetch or make it again, or move it away"
    with path.open("rb") as file:
        archive: Any = None
        last = ""
        try:
            archive = tarfile.TarFile(fileobj=_Headers(file), mode="r")
            archive.members.clear()
            # The constructor has read the first header.
            member = archive.firstmember
            archive.firstmember = None
            while member is not None:
                last = member.name
                if not 0 <= member.size <= MAX_OFFSET - member.offset_data:
                    raise tarfile.ReadError(f"a member of {member.size:,} bytes")
                yield member
                member = archive.next()
                archive.members.clear()  # else every header stays in memory
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            where = f" after {printable(last)}" if last else ""
            offset = archive.offset if archive else 0
            raise DataError(
                f"{shown}: damaged or cut short at byte {offset}{where}: {error}", hint
            ) from error
        _require_end(descriptor, archive.offset, shown, hint)


def _require_end(descriptor: int, offset: int, shown: str, hint: str) -> None:
    block = os.pread(descriptor, BLOCK, offset)
    if not block:
        log.warning("%s: has no end mark at byte %d; more images may have followed", shown, offset)
        return
    if len(block) < BLOCK or block.strip(b"\0"):
        raise DataError(f"{shown}: damaged at byte {offset}: not the header of a member", hint)
    while rest := os.pread(descriptor, 1 << 20, offset):
        if rest.strip(b"\0"):
            raise DataError(
                f"{shown}: more bytes follow the end of the archive at byte {offset}: two archives joined?",
                "keep them as two files",
            )
        offset += len(rest)


class _Found:
    """What a scan has met so far."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.names: list[str] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.labels: dict[str, int] = {}
        self.num_others = 0

    def add(self, member: tarfile.TarInfo, descriptor: int) -> None:
        """Note a member that is an image or a label."""
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            self.num_others += 1
            return
        base = os.path.basename(member.name)
        if base.startswith("."):  # hidden, as macOS's ._ files
            return
        if base.lower().endswith(EXTENSIONS):
            self.names.append(member.name)
            self.offsets.append(member.offset_data)
            self.sizes.append(member.size)
        elif (kind := _key(member.name)[1]) in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
            label = self._label(member, os.pread(descriptor, member.size, member.offset_data), kind)
            key = _key(member.name)[0]
            if label is not None and (kind == "cls" or key not in self.labels):
                self.labels[key] = label

    def _label(self, member: tarfile.TarInfo, data: bytes, kind: str) -> int | None:
        where = f"{self.shown}:{printable(member.name)}"
        try:
            value = parse_json(data)
        except ValueError:
            value = data[:40].decode(errors="replace").strip()
            if kind == "json":
                raise DataError(
                    f"{where}: not JSON: {printable(value)}", "mend the member, or pack the images again"
                ) from None
        if kind == "json":
            value = value.get("label") if isinstance(value, dict) else None
            if value is None:
                return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LABEL:
            raise DataError(
                f"{where}: label {printable(str(value)[:40])!r} is no class number",
                f"classes are numbered from 0 to {MAX_LABEL:,}; class names come from folders, or from `fdkit pack`",
            )
        return value

    def index(self) -> TarIndex:
        """What was found, with each image's label and folder."""
        rows = range(len(self.names))
        labels = [NO_LABEL] * len(self.names)
        if (
            self.labels
        ):  # samples of several members: only KEY.jpg is the image, KEY.mask.png is something else
            rows_of_keys: dict[str, int] = {}
            for row in rows:
                key, kind = _key(self.names[row])
                if f".{kind}" not in EXTENSIONS:
                    continue
                if key in rows_of_keys:
                    both = f"{printable(self.names[rows_of_keys[key]])} and {printable(self.names[row])}"
                    raise DataError(
                        f"{self.shown}: one sample with two images: {both}",
                        "give each image a name of its own before the first dot",
                    )
                rows_of_keys[key] = row
                if key not in self.labels:
                    raise DataError(
                        f"{self.shown}:{printable(self.names[row])}: has no label, others here have",
                        "give every image a .cls or .json member, or none",
                    )
                labels[row] = self.labels[key]
            rows = rows_of_keys.values()  # type: ignore[assignment]
        folders: dict[str, int] = {}
        names = [self.names[row] for row in rows]
        ids = [folders.setdefault(os.path.dirname(name), len(folders)) for name in names]
        return TarIndex(
            PackedNames(names),
            np.array([self.offsets[row] for row in rows], np.int64),
            np.array([self.sizes[row] for row in rows], np.int64),
            np.array([labels[row] for row in rows], np.int64),
            PackedNames(list(folders)),
            np.array(ids, np.int64),
        )


def _key(name: str) -> tuple[str, str]:
    """A member's sample and what it is of it: everything before and after the first dot of the file's name.

    Source: the WebDataset format, Aizman et al. 2020 (arXiv 2001.01858), section 4.
    """
    folder, base = os.path.split(name)
    stem, _, kind = base.partition(".")
    return os.path.join(folder, stem), kind.lower()
