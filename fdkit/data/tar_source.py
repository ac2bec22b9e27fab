"""Images in tar archives, any of them one read away: WebDataset shards, packed folders, plain archives of images."""

import errno
import glob
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fdkit.data.decode import EXTENSIONS, BadImage, decode, read_pixels
from fdkit.data.packed import is_unfinished, read_manifest
from fdkit.data.patience import read_patiently
from fdkit.data.tars import NO_LABEL, Stamp, TarIndex, stamp_of, tar_index
from fdkit.data.text import printable
from fdkit.errors import DataError

log = logging.getLogger("fdkit")

TEST_FOLDERS = ("test", "val", "validation")
SPLIT_FOLDERS = ("train", *TEST_FOLDERS)

ELSEWHERE = "elsewhere"
"""What lies beside train/ and test/: of no split, as in a folder on disk."""

SECONDS_WITHOUT_A_WORD = 5.0
MAX_SHARDS = 1_000_000
MAX_OPEN_SHARDS = 128
MAX_IMAGE_BYTES = 1 << 29

_BRACES = re.compile(r"\{([^{}]*)\}")


class _Shard(NamedTuple):
    path: Path
    images: TarIndex
    stamp: Stamp
    split: str
    """The split that its folder or file name says; "" if none."""


class TarSource:
    """The images of one split of a set of tar archives, in the order of the archives and of what lies in them.

    Labels are the numbers in .cls members (or "label" in .json members) where there are any. Otherwise folders inside
    the archives make them, by the rules of a folder on disk: train/ and test/ are splits, what comes next is a class.
    Archives in a train/ or test/ folder, or with such a word in their file name, are of that split alone.
    """

    def __init__(self, name: str, paths: Sequence[Path], split: str = "all") -> None:
        self.name = name
        manifest = read_manifest(_common_folder(paths))
        shards = list(_listed(paths, _split_words(paths)))
        self._shards = shards
        self._files = _Files([(shard.path, shard.stamp) for shard in shards])
        table = _Folders(shards)
        splits = [table.splits_of(number) for number in range(len(shards))]  # one text an image's folder
        present = sorted({word for row in splits for word in row})
        self.splits = tuple(word for word in present if word in SPLIT_FOLDERS)
        """The splits that are there, chosen or not."""
        chosen = _chosen(present, split, name)
        rows = [
            np.flatnonzero(np.isin(np.array(row)[shard.images.folder_ids], chosen))
            if row
            else np.empty(0, int)
            for row, shard in zip(splits, shards, strict=True)
        ]
        self._rows = np.concatenate(rows)
        self._ends = np.cumsum([len(row) for row in rows])
        if not len(self._rows):
            raise DataError(
                f"no images in {printable(name)}", f"looked for members ending in {' '.join(EXTENSIONS)}"
            )
        class_names = manifest.classes if manifest else ()
        self.labels, self.classes = _labels(name, shards, rows, table, class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every member's name, size and label."""
        digest = hashlib.sha256()
        for number, shard in enumerate(self._shards):
            index, rows = shard.images, self._rows_of(number)
            for row in rows if len(rows) < len(index.names) else ():
                digest.update(os.fsencode(index.names[row]) + b"\0")
            for array in (index.sizes[rows], index.labels[rows]):
                digest.update(array.tobytes())
            if len(rows) == len(index.names):
                digest.update(index.names.bytes.tobytes())
                digest.update(index.names.ends.tobytes())
        return digest.hexdigest()

    @cached_property
    def content_stamp(self) -> str:
        """SHA-256 of the fingerprint and the size and time of last change of every archive."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for shard in self._shards:
            digest.update(b"%d %d\n" % (shard.stamp.size, shard.stamp.changed_ns))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Image.Image:
        """Image `index`: RGB, upright. Raises BadImage, also if its archive has changed since it was listed."""
        return decode(self.read_bytes(index), self.describe(index))

    def read_pixels(self, index: int) -> Tensor:
        """uint8 (H, W, 3): the pixels of `read`, sooner."""
        return read_pixels(self.read_bytes(index), self.describe(index))

    def read_bytes(self, index: int) -> bytes:
        """The bytes of image `index`, as they stand in the archive. Raises BadImage as `read` does."""
        shard, row = self._place(index)
        entry = self._shards[shard].images
        size = int(entry.sizes[row])
        if size > MAX_IMAGE_BYTES:
            raise BadImage(self.describe(index), f"{size} bytes are more than {MAX_IMAGE_BYTES}")
        offset = int(entry.offsets[row])
        try:
            data = read_patiently(
                lambda path: os.pread(self._files.open(shard), size, offset), self._shards[shard].path
            )
        except OSError as error:
            raise BadImage(self.describe(index), error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImage(self.describe(index), f"{len(data)} of {size} bytes are there")
        return data

    def member_name(self, index: int) -> str:
        """The name of image `index` inside its archive, as it is."""
        shard, row = self._place(index)
        return self._shards[shard].images.names[row]

    def num_bytes(self, index: int) -> int:
        """How many bytes image `index` has."""
        shard, row = self._place(index)
        return int(self._shards[shard].images.sizes[row])

    def describe(self, index: int) -> str:
        """Such as "shards/train-000.tar:cat/17.jpg", control characters escaped."""
        return printable(f"{self._shards[self._place(index)[0]].path}:{self.member_name(index)}")

    def _place(self, index: int) -> tuple[int, int]:
        """The archive of an image, and which of its images it is."""
        if not 0 <= index < len(self._rows):
            raise IndexError(f"image {index} of {len(self._rows)}")
        return int(np.searchsorted(self._ends, index, side="right")), int(self._rows[index])

    def _rows_of(self, shard: int) -> np.ndarray:
        start = self._ends[shard - 1] if shard else 0
        return self._rows[start : self._ends[shard]]


def _listed(paths: Sequence[Path], words: Sequence[str]) -> Iterator[_Shard]:
    """The archives with their indices; that it takes a while is said, once."""
    start, is_said = time.monotonic(), False
    for number, (path, word) in enumerate(zip(paths, words, strict=True)):
        if not is_said and time.monotonic() - start > SECONDS_WITHOUT_A_WORD:
            is_said = True
            log.info(
                "listing what is in %d .tar files (%d so far); this is kept for the next time",
                len(paths),
                number,
            )
        yield _Shard(path, *tar_index(path), word)


def open_tars(data: str, split: str = "all") -> TarSource:
    """The images of "wds:PATTERN[::PATTERN ...]", a .tar file, or a folder of .tar files.

    A pattern is a path with {000..123}, {a,b}, * or ?, or a folder.
    Raises DataError if no archive is there, or as `TarSource` does.
    """
    pattern = data.removeprefix("wds:")
    paths: list[Path] = []
    for part in pattern.split("::"):
        if re.match(r"[a-z][a-z0-9+]+:", part):
            raise DataError(
                f"{printable(data)}: {printable(part)} is not on this machine's disks",
                "fetch the shards first; any of their images is read when its turn comes",
            )
        paths += _archives(Path(part).expanduser(), data)
    return TarSource(data, paths, split)


def tars_in(folder: Path) -> list[Path]:
    """The .tar files directly in a folder, and in its train/, test/, val/ and validation/, sorted."""
    places = [folder, *(folder / name for name in SPLIT_FOLDERS)]
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            with os.scandir(place) as entries:
                names = sorted(e.name for e in entries if e.name.lower().endswith(".tar") and e.is_file())
            found += [place / name for name in names if not name.startswith(".")]
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """Every path a pattern stands for: {08..11} counts with leading zeros, {a,b} lists."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    for choice in _choices(match[1]):
        for rest in expand_braces(after):
            yield f"{before}{choice}{rest}"


def _choices(inside: str) -> Iterator[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if counted is None:
        yield from inside.split(",")
        return
    first, last = int(counted[1]), int(counted[2])
    if last < first or last - first >= MAX_SHARDS:
        raise DataError(f"{{{printable(inside)}}}: not a range of shards", "write it as {0000..0123}")
    padded = len(counted[1]) if counted[1].startswith("0") or len(counted[1]) == len(counted[2]) else 0
    for number in range(first, last + 1):
        yield str(number).zfill(padded)


def _archives(path: Path, data: str) -> list[Path]:
    shown = printable(data)
    if path.is_dir():
        if is_unfinished(path):
            raise DataError(
                f"{shown}: is packed only in part", "run the same `fdkit pack` again to finish it"
            )
        found = tars_in(path)
        if not found:
            raise DataError(
                f"{shown}: no .tar files there", "they lie in the folder, or in its train/ and test/"
            )
        return found
    found = []
    for name in [str(path)] if path.exists() else expand_braces(str(path)):
        if glob.has_magic(name) and not Path(name).exists():
            matches = [Path(match) for match in sorted(glob.glob(name))]
        else:
            matches = [Path(name)] if Path(name).is_file() else []
        if not matches:
            raise DataError(
                f"{shown}: no such file: {printable(name)}", "every shard of a pattern must be there"
            )
        found += matches
    return found


def _common_folder(paths: Sequence[Path]) -> Path:
    """The folder of a set: that of its archives, or the one above if that is a split's."""
    folder = paths[0].parent
    return folder.parent if folder.name in SPLIT_FOLDERS else folder


def _split_words(paths: Sequence[Path]) -> list[str]:
    """The split that each archive's folder or file name tells, "" where neither does."""
    words = []
    for path in paths:
        tokens = [path.parent.name, *re.split(r"[-_.]", path.stem.lower())]
        words.append(next((token for token in tokens if token in SPLIT_FOLDERS), ""))
    return words


class _Folders:
    """What the folders inside a set of archives mean: the split and the class of each."""

    def __init__(self, shards: Sequence[_Shard]) -> None:
        paths = [[_parts(folder) for folder in _all(shard)] for shard in shards]
        every = [parts for row in paths for parts in row]
        while every and _is_wrapped(every):
            every = [parts[1:] for parts in every]
            paths = [[parts[1:] for parts in row] for row in paths]
        # With labels of their own, images may lie in any folder.
        numbered = [bool((shard.images.labels != NO_LABEL).any()) for shard in shards]
        inside = any(
            parts[:1] and parts[0] in SPLIT_FOLDERS
            for row, has_labels in zip(paths, numbered, strict=True)
            for parts in (() if has_labels else row)
        )
        self._places = [
            [_place(parts, shard.split, inside and not has_labels) for parts in row]
            for row, shard, has_labels in zip(paths, shards, numbered, strict=True)
        ]

    def splits_of(self, shard: int) -> list[str]:
        """The split of each folder of an archive."""
        return [split for split, _ in self._places[shard]]

    def classes_of(self, shard: int) -> list[str]:
        """The class of each folder of an archive; "" for images that lie loose."""
        return [name for _, name in self._places[shard]]

    def all_classes(self) -> tuple[str, ...]:
        """Every class of every split, sorted: one that is missing from a split shifts no label."""
        named = {name for row in self._places for split, name in row if split != ELSEWHERE}
        return tuple(sorted(named - {""}))


def _place(parts: tuple[str, ...], split: str, has_splits_inside: bool) -> tuple[str, str]:
    """(split, class) of a folder; split: what the archive's name says."""
    if has_splits_inside and parts and parts[0] in SPLIT_FOLDERS:
        split, parts = parts[0], parts[1:]
    elif has_splits_inside and not split:
        split = ELSEWHERE
    return split, parts[0] if parts else ""


def _is_wrapped(folders: Sequence[tuple[str, ...]]) -> bool:
    """Whether everything lies in one folder that is neither a split nor a class."""
    first = {parts[:1] for parts in folders}
    return len(first) == 1 and all(len(parts) > 1 for parts in folders) and folders[0][0] not in SPLIT_FOLDERS


def _parts(folder: str) -> tuple[str, ...]:
    return tuple(part for part in folder.split("/") if part not in ("", "."))


def _all(shard: _Shard) -> list[str]:
    folders = shard.images.folders
    return [folders[place] for place in range(len(folders))]


def _chosen(present: Sequence[str], split: str, name: str) -> list[str]:
    """Which of the splits that are there make up the one asked for."""
    named = [word for word in present if word in SPLIT_FOLDERS]
    everything = named or list(present)
    if split == "all":
        return everything
    if split == "train":
        return ["train"] if "train" in named else everything
    for wanted in TEST_FOLDERS if split == "test" else (split,):
        if wanted in named:
            return [wanted]
    there = ", ".join(named) or "none"
    raise DataError(
        f"{printable(name)}: no split '{printable(split)}'",
        f"splits are told by folders train/ and test/ or by words in the archives' names; there is {there}",
    )


def _labels(
    name: str,
    shards: Sequence[_Shard],
    rows: Sequence[np.ndarray],
    table: _Folders,
    class_names: tuple[str, ...],
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The label of each chosen image and the names of the classes; None and () without labels."""
    parts = [shard.images.labels[row] for shard, row in zip(shards, rows, strict=True)]
    numbers = np.concatenate(parts)
    if (numbers == NO_LABEL).all():
        return _folder_labels(rows, shards, table)
    if (numbers == NO_LABEL).any():
        bare = [shard for shard, part in zip(shards, parts, strict=True) if (part == NO_LABEL).any()]
        labelled = {shard.split for shard, part in zip(shards, parts, strict=True) if (part >= 0).any()}
        if not labelled & {shard.split for shard in bare}:
            return None, ()  # such as a test split whose labels nobody tells
        raise DataError(
            f"{printable(name)}: {printable(str(bare[0].path))} has no labels, others have",
            "give the images of every shard a .cls or .json member, or of none",
        )
    highest = max(int(shard.images.labels.max(initial=0)) for shard in shards)
    classes = class_names or tuple(str(number) for number in range(highest + 1))
    if highest >= len(classes):
        raise DataError(f"{printable(name)}: label {highest} of {len(classes)} classes")
    return numbers, classes


def _folder_labels(
    rows: Sequence[np.ndarray], shards: Sequence[_Shard], table: _Folders
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels by class folders; None and () if an image lies loose."""
    classes = table.all_classes()
    places = {word: number for number, word in enumerate(classes)}
    found = [np.empty(0, np.int64)]
    for number, row in enumerate(rows):
        of_folders = [places.get(word, NO_LABEL) for word in table.classes_of(number)]
        if len(row):
            found.append(np.array(of_folders, np.int64)[shards[number].images.folder_ids[row]])
    labels = np.concatenate(found)
    return (None, ()) if (labels == NO_LABEL).any() else (labels, classes)


class _Files:
    """Descriptors of the archives read last; each process opens its own."""

    def __init__(self, files: Sequence[tuple[Path, Stamp]]) -> None:
        self._files = list(files)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def open(self, number: int) -> int:
        """A descriptor of an archive. Raises OSError if it is gone, or has changed since it was listed."""
        if self._process != os.getpid():  # a forked worker closes none of its parent's
            self._open, self._process = OrderedDict(), os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path, stamp = self._files[number]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if stamp_of(os.fstat(descriptor)) != stamp:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "its archive has changed since it was listed")
        self._open[number] = descriptor
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        return {"_files": self._files, "_open": OrderedDict(), "_process": 0}
