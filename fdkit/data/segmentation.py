"""Images with a mask that names the class of every pixel: folders of both, read as one.

Folders are images/SPLIT and masks/SPLIT, or SPLIT/images and SPLIT/masks, or images/ and masks/ without splits; an
image and its mask have the same name but for the ending. ADE20K's own folders (images/training, annotations/training)
are known too. Masks are files of 8 bits a pixel, with or without a palette.
"""

import copy
import csv
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.data.decode import EXTENSIONS, FORMATS, MAX_PIXELS, BadImage, decode, read_pixels
from fdkit.data.json_file import parse_json
from fdkit.data.text import printable
from fdkit.errors import DataError

log = logging.getLogger("fdkit")

IGNORED = 255
"""What a pixel that counts nowhere is in a mask as it is handed on."""
MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")
MASK_FOLDERS = ("masks", "annotations")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "test": ("test", "val", "validation"),
    "val": ("val", "validation"),
}
"""The folders a split may be, the first that is there; any other split is the folder of its name."""
CLASS_FILES = ("classes.txt", "classes.json", "objectInfo150.txt")
LAYOUTS = "images/train with masks/train, train/images with train/masks, or images/ with masks/"
MANY_MASKS = 5000
"""Masks that take so long to look through that it is said."""
_MAX_THREADS = 8
_ORIENTATION_TAG = 0x0112
_FIRST_TURNED = 5  # EXIF orientations from here swap height and width


class MaskConfig(Config):
    """What the values in the masks mean."""

    ignore_label: tuple[Annotated[int, Field(ge=0, le=255)], ...] = (255,)
    """Values in the files of masks whose pixels count nowhere, such as 11; several with commas between. 255 never
    counts."""
    reduce_zero_label: bool = False
    """Pixels of value 0 count nowhere, and 1, 2, ... are classes 0, 1, ...; on by itself for ADE20K's own folders."""


class SegmentationSource:
    """Images and their masks, in the order of their names.

    labels is None: an image has no class of its own.
    """

    labels: np.ndarray | None = None

    def __init__(
        self, files: "_Files", table: np.ndarray, classes: Sequence[str], counts: np.ndarray
    ) -> None:
        """table: (256,) uint8, from values in the files to classes or IGNORED; counts: (256,) pixels a value."""
        self.name = files.name
        self.classes = tuple(classes)
        self._files = files
        self._table = table
        self.pixels = np.bincount(table, weights=counts, minlength=256).astype(np.int64)[: len(classes)]
        """(K,) int64: pixels of each class."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every path, below the folder, and file size of images and masks, and of what values mean."""
        digest = hashlib.sha256(self._table.tobytes())
        for path in (*self._files.images, *self._files.masks):
            size = path.stat().st_size if path.exists() else -1
            name = path.relative_to(self._files.root).as_posix()
            digest.update(os.fsencode(name) + b"\0%d\n" % size)
        return digest.hexdigest()

    def part(self, number: int, count: int) -> "SegmentationSource":
        """The images number, number + count, ... as a source of their own, whose `pixels` are those of the whole."""
        files = self._files._replace(
            images=self._files.images[number::count], masks=self._files.masks[number::count]
        )
        other = copy.copy(self)
        other._files = files
        return other

    def __len__(self) -> int:
        return len(self._files.images)

    def read(self, index: int) -> Image.Image:
        """Image `index` without its mask: RGB, upright. Raises BadImage."""
        return decode(self._files.images[index])

    def read_pixels(self, index: int) -> Tensor:
        """uint8 (H, W, 4): red, green, blue, and the class or IGNORED. Raises BadImage."""
        image = read_pixels(self._files.images[index])
        mask = torch.from_numpy(self._table[_read_mask(self._files.masks[index])])
        if mask.shape != image.shape[:2]:
            raise BadImage(self.describe(index), "the mask has another size")
        return torch.cat([image, mask[..., None]], dim=2)

    def describe(self, index: int) -> str:
        """The path of image `index`, control characters escaped."""
        return printable(str(self._files.images[index]))


def open_segmentation(
    data: str | Path, splits: Sequence[str], config: MaskConfig | None = None
) -> list[SegmentationSource]:
    """The images and masks of each split, with the same classes in all of them.

    Every mask is read once, so that what is wrong with one is said before hours of training. Classes are those that
    classes.txt (a name a line), classes.json (a list, or numbers to names) or ADE20K's objectInfo150.txt beside the
    folders name, else as many as the largest value needs. A split "test" may be the folder test, val or validation;
    folders without splits are the split "train".
    Raises DataError, in one sentence, for folders, masks or values that do not fit.
    """
    config = config or MaskConfig()
    name, root = str(data), Path(data).expanduser()
    if not root.is_dir():
        there = "a file, not a folder" if root.exists() else "no such folder"
        raise DataError(f"{printable(name)}: {there} of images and masks", f"it holds {LAYOUTS}")
    listings = [_list_split(name, root, split) for split in splits]
    table = _class_table(config, reduces_zero=any(files.is_ade20k for files in listings))
    num_masks = sum(len(files.masks) for files in listings)
    if num_masks > MANY_MASKS:
        log.info("%s: looking through %s masks", printable(name), f"{num_masks:,}")
    surveys = [_survey(files) for files in listings]
    classes = _read_classes(root, table) or _number_classes(table, surveys, name)
    sources = []
    for split, files, survey in zip(splits, listings, surveys, strict=True):
        _check_values(files, survey, table, classes)
        source = SegmentationSource(files, table, classes, survey.counts)
        if not source.pixels.any():
            raise DataError(
                f"{printable(name)}: all pixels of the split {split} are ignored",
                f"masks hold the values {_listed(np.flatnonzero(survey.counts))}; see --ignore-label",
            )
        sources.append(source)
    return sources


class _Files(NamedTuple):
    """The images of a split, and the mask of each."""

    name: str
    """What messages call the data."""
    root: Path
    images: list[Path]
    masks: list[Path]
    is_ade20k: bool


class _Survey(NamedTuple):
    """What the masks of a split hold."""

    counts: np.ndarray
    """(256,) int64: pixels of each value."""
    first: np.ndarray
    """(256,) int64: the first mask with each value; -1 if there is none."""


def _list_split(name: str, root: Path, split: str) -> _Files:
    """Every image of a split with its mask."""
    images, masks = _folders_of_split(name, root, split)
    is_ade20k = masks.parent.name == "annotations" and masks.name in ("training", "validation")
    found = _by_stem(images, EXTENSIONS)
    if not found:
        raise DataError(
            f"no images under {printable(str(images))}", f"looked for files ending in {' '.join(EXTENSIONS)}"
        )
    known = _by_stem(masks, MASK_EXTENSIONS)
    if not known:
        raise DataError(
            f"no masks under {printable(str(masks))}",
            f"looked for files ending in {' '.join(MASK_EXTENSIONS)}; JPEG would blur the borders between classes",
        )
    if without := [stem for stem in found if stem not in known]:
        raise DataError(
            f"{printable(str(found[without[0]]))}: no mask, and so for {len(without)} of {len(found)} images",
            f"expected {printable(str(masks / without[0]))}.png",
        )
    if unused := len(known) - len(found):
        log.info("%s: %d masks have no image and are left out", printable(str(masks)), unused)
    return _Files(name, root, list(found.values()), [known[stem] for stem in found], is_ade20k)


def _folders_of_split(name: str, root: Path, split: str) -> tuple[Path, Path]:
    """The folder of the images of a split, and that of their masks."""
    shown = printable(name)
    folders = SPLIT_FOLDERS.get(split, (split,))
    for images, masks in _candidates(root, folders):
        if images.is_dir() and masks.is_dir():
            return images, masks
    present = sorted({path.name for path in _split_folders(root)})
    if not present and (root / "images").is_dir():
        flat = next((root / masks for masks in MASK_FOLDERS if (root / masks).is_dir()), None)
        if flat is None:
            raise DataError(f"{shown}: images/ has no masks beside it", f"it holds {LAYOUTS}")
        if split == "train":
            return root / "images", flat
    elif any(images.is_dir() for images, _ in _candidates(root, folders)):
        raise DataError(f"{shown}: the images of the split {split} have no masks", f"it holds {LAYOUTS}")
    elif not present:
        raise DataError(f"{shown}: no folder images/ in it, and none in its splits", f"it holds {LAYOUTS}")
    there = ", ".join(f"{folder}/" for folder in present) or "none, so that everything is the split train"
    raise DataError(
        f"{shown}: no split {printable(split)}",
        f"looked for {' or '.join(f'{folder}/' for folder in folders)}; there is {printable(there)}",
    )


def _candidates(root: Path, folders: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Where the images and masks of a split may be."""
    for folder in folders:
        for masks in MASK_FOLDERS:
            yield root / "images" / folder, root / masks / folder
            yield root / folder / "images", root / folder / masks


def _split_folders(root: Path) -> Iterator[Path]:
    """The folders that are splits, whichever way round folders are named."""
    for path in root.iterdir():
        if path.is_dir() and (path / "images").is_dir():
            yield path
    known = {folder for folders in SPLIT_FOLDERS.values() for folder in folders}
    if (root / "images").is_dir():
        yield from (path for path in (root / "images").iterdir() if path.is_dir() and path.name in known)


def _by_stem(folder: Path, extensions: tuple[str, ...]) -> dict[str, Path]:
    """Files below a folder, sorted, by their path in it without the ending.

    Hidden ones are left out; links are followed, but no folder is entered twice.
    """
    found: dict[str, Path] = {}
    entered: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        kept = [] if real in entered else [name for name in names if _is_kept(name, extensions)]
        entered.add(real)
        for path in (Path(where, name) for name in kept):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise DataError(
                    f"{printable(str(path))}: {found[stem].name} has the same name but for its ending",
                    "remove or rename one of them",
                )
            found[stem] = path
    return dict(sorted(found.items()))


def _is_kept(name: str, extensions: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.lower().endswith(extensions)


def _refuse(error: OSError) -> None:
    raise DataError(f"{printable(str(error.filename))}: this folder may not be read") from error


def _class_table(config: MaskConfig, *, reduces_zero: bool) -> np.ndarray:
    """(256,) uint8: the class of each value in a file, or IGNORED."""
    table = np.arange(256, dtype=np.uint8)
    if config.reduce_zero_label or reduces_zero:
        table = table - np.uint8(1)  # 0 becomes 255, which is IGNORED
    table[list(config.ignore_label)] = IGNORED
    return table


def _read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8: the values of a mask, the indices of one with a palette.

    Raises DataError for a file that is no mask, BadImage for one that cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(printable(str(path)), f"more than {MAX_PIXELS} pixels")
            mode = image.mode
            if mode in ("L", "P", "1"):
                return np.asarray(image).astype(np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(printable(str(path)), f"mask: {error}") from error
    what = "16 or 32 bits a pixel" if mode.startswith(("I", "F")) else f"a colour picture ({mode})"
    raise DataError(
        f"{printable(str(path))}: {what}, where a mask holds the number of a class in 8 bits a pixel",
        "write masks as 8-bit PNG, grey or with a palette, whose values are classes 0, 1, ...",
    )


def _survey(files: _Files) -> _Survey:
    """The values of all masks, read by several threads; unreadable files are left to the loader, which names them."""
    counts, first = np.zeros(256, dtype=np.int64), np.full(256, -1, dtype=np.int64)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        found = threads.map(_count_values, files.images, files.masks)
        for index, values in enumerate(found):
            counts += values
            first[(values > 0) & (first < 0)] = index
    return _Survey(counts, first)


def _count_values(image: Path, mask: Path) -> np.ndarray:
    """(256,) int64: pixels of each value of a mask. Raises DataError if the image has another size."""
    try:
        values = _read_mask(mask)
        width, height = _size_of_image(image)
    except BadImage:
        return np.zeros(256, dtype=np.int64)
    if (height, width) != values.shape:
        raise DataError(
            f"{printable(str(image))} is {width} x {height} pixels, and its mask {values.shape[1]} x {values.shape[0]}",
            "write each mask at the size of its image",
        )
    return np.bincount(values.ravel(), minlength=256)


def _size_of_image(path: Path) -> tuple[int, int]:
    """Width and height of an image once it is upright, from its header. Raises BadImage."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            is_turned = image.getexif().get(_ORIENTATION_TAG, 1) >= _FIRST_TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(printable(str(path)), str(error)) from error
    return (height, width) if is_turned else (width, height)


def _read_classes(root: Path, table: np.ndarray) -> list[str]:
    """The names of the classes, in their order, from a file beside the folders; empty if there is none.

    Names past the last class that counts, such as "unlabelled", are left out.
    """
    path = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    if path is None:
        return []
    try:
        names = _parse_classes(path)
    except (OSError, ValueError, AttributeError, KeyError, csv.Error) as error:
        raise DataError(
            f"{printable(str(path))}: cannot be read as names of classes: {error}",
            "classes.txt has a name a line; classes.json a list of names, or numbers to names",
        ) from error
    used = {int(value) for value in table if value != IGNORED}
    while names and len(names) - 1 not in used:
        names.pop()
    if len(names) < 2:
        raise DataError(
            f"{printable(str(path))}: names {len(names)} classes that count; there are at least 2",
            "write a name a line, in the order of the numbers in the masks",
        )
    return names


def _parse_classes(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig")
    if path.name == "objectInfo150.txt":
        return [row["Name"].strip() for row in csv.DictReader(text.splitlines(), delimiter="\t")]
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = parse_json(text)
    if isinstance(names, dict):
        numbered = {int(number): str(name) for number, name in names.items()}
        if not all(0 <= number <= 255 for number in numbered):
            raise ValueError("a number is none of a mask's, 0 to 255")
        return [numbered.get(number, str(number)) for number in range(max(numbered, default=-1) + 1)]
    if not isinstance(names, list):
        raise ValueError(f"it holds {type(names).__name__}")
    return [str(name) for name in names]


def _number_classes(table: np.ndarray, surveys: Sequence[_Survey], name: str) -> list[str]:
    """Numbers for names, as many as the largest class in any mask needs."""
    seen = np.unique(np.concatenate([table[survey.counts > 0] for survey in surveys]))
    classes = seen[seen != IGNORED]
    if len(classes) == 1:
        raise DataError(
            f"{printable(name)}: every pixel that counts is of class {classes[0]}, so there is nothing to tell apart",
            "masks hold the numbers of classes, 0, 1, ..., and 255 is never one",
        )
    return [str(number) for number in range(max(classes.tolist(), default=-1) + 1)]


def _check_values(files: _Files, survey: _Survey, table: np.ndarray, classes: Sequence[str]) -> None:
    """Raises DataError for a value in a mask that is no class."""
    is_wrong = (survey.counts > 0) & (table != IGNORED) & (table >= len(classes))
    if not is_wrong.any():
        return
    wrong = np.flatnonzero(is_wrong)
    path = files.masks[survey.first[wrong[0]]]
    raise DataError(
        f"{printable(str(path))}: value {wrong[0]} is above the {len(classes)} classes named beside the folders",
        f"name it there, or leave its pixels out with --ignore-label {_listed(wrong, separator=',')}",
    )


def _listed(values: np.ndarray, separator: str = ", ") -> str:
    return separator.join(str(value) for value in values[:20])
