"""Test sets made for classes that others are trained on: ImageNet-A, -R, -Sketch, -V2, -C, and folders like them.

Their class folders are matched by name with the classes of the training images. ImageNet-V2 names them 0 to 999, the
positions in the sorted list of ImageNet's 1000 classes; sorted as texts, 10 would come before 2, so a number is read
as a number.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fdkit.data.sources import FolderSource, ImageSource
from fdkit.data.text import printable
from fdkit.errors import DataError

SEVERITY_NAMES = frozenset("12345")
SHOWN = 5


class RenamedClasses:
    """A source whose labels are positions in other class names."""

    def __init__(self, source: ImageSource, classes: Sequence[str], positions: Sequence[int]) -> None:
        """classes: the new names; positions: of each class of the source among them."""
        self.source = source
        self.name = source.name
        self.classes = tuple(classes)
        self.own_classes = tuple(sorted(set(positions)))
        """Positions of the classes that the source itself has."""
        assert source.labels is not None, "the caller has refused sources without labels"
        self.labels = np.asarray(positions, dtype=np.int64)[source.labels]

    @property
    def fingerprint(self) -> str:
        """The source's: its images are the same."""
        return self.source.fingerprint

    @property
    def content_stamp(self) -> str:
        """The source's."""
        stamp: str = getattr(self.source, "content_stamp", self.source.fingerprint)
        return stamp

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Image.Image:
        """The image; raises BadImage if it cannot be read."""
        return self.source.read(index)

    def read_pixels(self, index: int) -> Any:
        """The image by the source's quickest way; raises BadImage if it cannot be read."""
        return getattr(self.source, "read_pixels", self.source.read)(index)

    def describe(self, index: int) -> str:
        """What messages call the image."""
        return self.source.describe(index)


class Variant(NamedTuple):
    """One test set, or one corruption at one severity of a folder laid out as ImageNet-C is."""

    source: RenamedClasses
    corruption: str | None = None
    severity: int | None = None


def open_variants(folder: str | Path, classes: Sequence[str]) -> list[Variant]:
    """The test sets in a folder, labelled by positions in `classes`, the training classes.

    folder: of class folders, of CORRUPTION/SEVERITY/CLASS, or of groups of these as ImageNet-C is published.
    Raises DataError if there is no such folder, no image, no class folder, or a class that training lacks.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"{printable(str(folder))}: no such folder", "--variant is a folder of class folders")
    corrupted = list(_corrupted_folders(root, depth=2))
    if not corrupted:
        return [Variant(matched(FolderSource(root), classes))]
    return [
        Variant(matched(FolderSource(path), classes), path.parent.name, int(path.name)) for path in corrupted
    ]


def matched(source: ImageSource, classes: Sequence[str]) -> RenamedClasses:
    """A source with its classes matched by name with `classes`. Raises DataError if one of them is not there."""
    if source.labels is None:
        raise DataError(
            f"{printable(source.name)} has no labels: it is not made of class folders",
            "put the images of each class in a folder of its own",
        )
    known = {name: position for position, name in enumerate(classes)}
    numbered = range(int(np.max(source.labels)) + 1)
    own = _names(tuple(source.classes) or tuple(map(str, numbered)), known)
    unknown = [name for name in own if name not in known]
    if len(unknown) == len(own):
        raise DataError(
            f"{printable(source.name)} has no class in common with the {len(classes)} classes that are known: "
            f"{_some(own)} against {_some(classes)}",
            "class folders are matched by name",
        )
    if unknown:
        raise DataError(
            f"{printable(source.name)} has {len(unknown)} of {len(own)} classes that are not known: {_some(unknown)}",
            "take their folders out, or use training images that have these classes",
        )
    return RenamedClasses(source, classes, [known[name] for name in own])


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1000 classes, sorted: the order of every 1000-class head."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def _names(own: Sequence[str], known: dict[str, int]) -> list[str]:
    """The class folders' names, where all are numbers that training does not use as ImageNet's classes."""
    are_numbers = all(name.isascii() and name.isdigit() for name in own)
    if not are_numbers or any(name in known for name in own) or max(int(name) for name in own) > 999:
        return list(own)
    return [imagenet_wnids()[int(name)] for name in own]


def _corrupted_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Every folder CORRUPTION/SEVERITY in it or in its groups, sorted."""
    for path in _folders(folder):
        inside = _folders(path)
        if inside and {child.name for child in inside} <= SEVERITY_NAMES and all(map(_folders, inside)):
            yield from inside
        elif depth > 1:
            yield from _corrupted_folders(path, depth - 1)


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [folder / name for name in names]


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
