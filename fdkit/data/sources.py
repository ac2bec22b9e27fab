"""Where images come from: a folder, scikit-learn's digits, the built-in demonstration set, a torchvision set."""

import hashlib
import inspect
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from fdkit.data.decode import EXTENSIONS, BadImage, decode, read_pixels
from fdkit.data.listing import PackedNames, has_loose_images, images_below, stamps, subfolders
from fdkit.data.packed import MANIFEST, UNFINISHED
from fdkit.data.tar_source import SPLIT_FOLDERS, TEST_FOLDERS, TarSource, open_tars, tars_in
from fdkit.data.text import printable
from fdkit.errors import DataError, did_you_mean

__all__ = ["ArraySource", "BadImage", "FolderSource", "ImageSource", "TarSource", "decode", "open_source"]

log = logging.getLogger("fdkit")

KINDS = (
    "a folder of images or of .tar files, a .tar file, wds:SHARDS, digits, demo, or torchvision:NAME[@ROOT]"
)


class ImageSource(Protocol):
    """A fixed, ordered set of images, labelled or not.

    A source may also have `read_pixels(index)`, a quicker way to the pixels of `read` as uint8 (H, W, 3);
    `read_bytes(index)`, the image's file as it is; and `content_stamp`, a text that changes with its images even where
    `fingerprint` does not.
    """

    name: str
    """What messages call it: the user's PATH."""
    labels: np.ndarray | None
    """(N,) int64, or None when unlabelled."""
    classes: tuple[str, ...]
    """Class names, label order; () when unlabelled."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the listing or the content."""

    def __len__(self) -> int:
        """N, the number of images."""

    def read(self, index: int) -> Image.Image:
        """Image `index`: RGB, upright. Raises BadImage."""

    def describe(self, index: int) -> str:
        """What messages call image `index`: its path, or "digits[17]"."""


def open_source(data: str, split: str = "all") -> ImageSource:
    """The images that `data` names.

    data: a folder of images or of .tar files, a .tar file, "wds:SHARDS", "digits", "demo" or
    "torchvision:NAME[@ROOT]".
    split: "train" (all there is where a folder has no train/), "test" (the first of test/, val/, validation/),
    "all", or the name of a direct sub-folder.
    Raises DataError if there is no such data, no such split, or no image in it.
    """
    if data == "digits":
        return _digits(split)
    if data == "demo":
        from fdkit.data.demo import open_demo

        return open_demo(split)
    if data.startswith("torchvision:"):
        return _torchvision(data, split)
    if data.startswith("wds:"):
        return open_tars(data, split)
    if re.match(r"[a-z]{2,}:", data) and not Path(data).exists():
        raise DataError(f"{printable(data)}: unknown kind of data", f"data is {KINDS}")
    path = Path(data).expanduser()
    if _is_packed(path) or (data.lower().endswith(".tar") and path.is_file()):
        return open_tars(data, split)
    return FolderSource(data, split)


def splits_of(data: str) -> tuple[str, ...]:
    """The names of all splits of `data`, in which every image is once; ("all",) if there is only one whole.

    Raises DataError as `open_source` does.
    """
    if data in ("digits", "demo") or data.startswith("torchvision:"):
        return ("train", "test")
    source = open_source(data)
    if isinstance(source, TarSource):
        return source.splits or ("all",)
    folders = subfolders(Path(data).expanduser())
    return tuple(name for name in SPLIT_FOLDERS if name in folders) or ("all",)


class FolderSource:
    """Every image below a folder, in sorted order; class folders make labels.

    Class folders are the direct sub-folders of the split's folder that hold an image, numbered in sorted order over
    all splits, so that a class missing from one split shifts no label. Images lying loose in the split's folder make
    the whole split unlabelled. Hidden files and folders are left out; links are followed, loops once.
    """

    def __init__(self, root: str | Path, split: str = "all") -> None:
        self.name = str(root)
        self.root = Path(root).expanduser()
        _require_folder(self.root, self.name)
        try:
            folders = _folders_of_split(self.root, split, self.name)
            self.classes = _class_names(self.root, folders)
            counts: list[tuple[int, int]] = []
            self._names = PackedNames(self._list(folders, counts))
        except PermissionError as error:
            raise DataError(f"{printable(str(error.filename))}: this folder may not be read") from error
        if not len(self._names):
            where = printable(", ".join(os.path.join(self.name, folder) for folder in folders))
            raise DataError(f"no images under {where}", f"looked for files ending in {' '.join(EXTENSIONS)}")
        labels = np.repeat(*np.array(counts, dtype=np.int64).T)
        self.labels = labels if self.classes else None

    def _list(self, folders: Sequence[str], counts: list[tuple[int, int]]) -> Iterator[str]:
        """Every path below the root; counts: receives (label, how many) a class folder."""
        for folder in folders:
            for label, class_name in enumerate(self.classes or ("",)):
                below = os.path.join(folder, class_name)
                if not (self.root / below).is_dir():
                    continue
                count = 0
                for count, name in enumerate(images_below(self.root / below), start=1):  # noqa: B007
                    yield os.path.join(below, name)
                counts.append((label, count))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every relative path and file size; a file that is gone counts as -1 bytes."""
        return self._stamps[0]

    @cached_property
    def content_stamp(self) -> str:
        """SHA-256 of the fingerprint and the time of every file's last change."""
        return self._stamps[1]

    @cached_property
    def _stamps(self) -> tuple[str, str]:
        return stamps(self.root, self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Image.Image:
        """Image `index`: RGB, upright. Raises BadImage."""
        return decode(os.path.join(self.root, self._names[index]))

    def read_pixels(self, index: int) -> Tensor:
        """uint8 (H, W, 3): the pixels of `read`, sooner. Raises BadImage."""
        return read_pixels(os.path.join(self.root, self._names[index]))

    def read_bytes(self, index: int) -> bytes:
        """The file of image `index`, as it is. Raises BadImage."""
        try:
            return (self.root / self._names[index]).read_bytes()
        except OSError as error:
            raise BadImage(self.describe(index), error.strerror or str(error)) from error

    def member_name(self, index: int) -> str:
        """The path of image `index` below the folder, as it is."""
        return self._names[index]

    def describe(self, index: int) -> str:
        """The path of image `index`, control characters escaped."""
        return printable(os.path.join(self.root, self._names[index]))


class ArraySource:
    """Images held in memory."""

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray | None, classes: Sequence[str] = ()
    ) -> None:
        """images: (N, H, W, 3) uint8; labels: (N,) or None."""
        self.name = name
        self.images = images
        self.labels = None if labels is None else labels.astype(np.int64)
        self.classes = tuple(classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the pixels and labels."""
        return _digest(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image:
        """Image `index`: RGB."""
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        """Such as "digits[17]"."""
        return f"{self.name}[{index}]"


class TorchvisionSource:
    """One or several splits of a torchvision classification set, end to end."""

    def __init__(self, name: str, datasets: Sequence[Any]) -> None:
        self.name = name
        self._datasets = list(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self._datasets])
        labels = [_torchvision_labels(dataset) for dataset in self._datasets]
        known = [array for array in labels if array is not None]
        self.labels = np.concatenate(known) if len(known) == len(labels) else None
        self.classes = _torchvision_classes(self._datasets[0], self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the name, the lengths and the labels; torchvision checks the files themselves."""
        return _digest(np.frombuffer(self.name.encode(), np.uint8), self._ends, self.labels)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Image.Image:
        """Image `index`: RGB. Raises BadImage."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        try:
            image: Image.Image = self._datasets[part][index - first][0]
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(self.describe(index), str(error)) from error

    def describe(self, index: int) -> str:
        """Such as "torchvision:CIFAR10[17]"."""
        return f"{self.name}[{index}]"


def _is_packed(folder: Path) -> bool:
    """Whether the images of a folder are to be read from .tar files in it: it has some, and no image beside them."""
    try:
        if any((folder / name).exists() for name in (MANIFEST, UNFINISHED)):
            return True
        places = [folder, *(folder / name for name in SPLIT_FOLDERS if (folder / name).is_dir())]
        return bool(tars_in(folder)) and not any(any(images_below(place)) for place in places)
    except OSError:
        return False  # what is wrong with it is said where it is read as a folder


def _require_folder(folder: Path, name: str) -> None:
    shown = printable(name)
    if not folder.exists():
        near = did_you_mean(name, ["digits", "demo"])
        raise DataError(f"{shown}: no such folder", near or f"data is {KINDS}")
    if not folder.is_dir():
        raise DataError(f"{shown}: a file, not a folder of images", f"data is {KINDS}")


def _folders_of_split(root: Path, split: str, name: str) -> list[str]:
    """The folders, relative to root, that make up the split; [""] is the root itself."""
    present = subfolders(root)
    everything = [folder for folder in SPLIT_FOLDERS if folder in present] or [""]
    if split == "all":
        return everything
    if split == "train":
        return ["train"] if "train" in present else everything
    wanted = TEST_FOLDERS if split == "test" else (split,)
    for folder in wanted:
        if folder in present:
            return [folder]
    there = printable(", ".join(f"{folder}/" for folder in present[:20])) or "no sub-folder"
    looked_for = " or ".join(f"{folder}/" for folder in wanted)
    raise DataError(
        f"{printable(name)}: no split '{printable(split)}'", f"looked for {looked_for}; there is {there}"
    )


def _class_names(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    if any(has_loose_images(root / folder) for folder in folders):
        return ()
    siblings = {folder for folder in SPLIT_FOLDERS if (root / folder).is_dir()} if folders != [""] else set()
    found: set[str] = set()
    for folder in siblings.union(folders):
        found.update(name for name in subfolders(root / folder) if any(images_below(root / folder / name)))
    return tuple(sorted(found))


def _digits(split: str) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits at 32 x 32; every fourth image of the sorted classes is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    by_class = np.argsort(bunch.target, kind="stable")
    chosen = {
        "train": np.sort(np.delete(by_class, np.s_[::4])),  # 1,347 images
        "test": np.sort(by_class[::4]),  # 450 images
        "all": np.arange(len(by_class)),
    }.get(split)
    if chosen is None:
        raise DataError(f"digits: no split '{split}'", "there are train, test and all")
    pixels = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    large = [
        Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in pixels
    ]
    images = np.stack([np.asarray(image) for image in large])
    return ArraySource("digits", images, bunch.target[chosen], [str(digit) for digit in range(10)])


def _torchvision(data: str, split: str) -> TorchvisionSource:
    import torchvision.datasets

    name, _, root = data.removeprefix("torchvision:").partition("@")
    root = root or "data"
    kind = getattr(torchvision.datasets, name, None) if name in torchvision.datasets.__all__ else None
    parameters = inspect.signature(kind).parameters if kind else {}
    if "download" not in parameters or not {"train", "split"} & set(parameters):
        known = did_you_mean(name, torchvision.datasets.__all__)
        raise DataError(f"{data}: not a torchvision set with splits to classify", known or "such as CIFAR10")
    if split not in ("train", "test", "all"):
        raise DataError(f"{data}: no split '{split}'", "there are train, test and all")
    if not Path(root).is_dir():
        raise DataError(
            f"{data}: no folder {root}",
            f"put the set there, or make the folder and it is downloaded: mkdir -p {root}",
        )
    parts = ("train", "test") if split == "all" else (split,)
    options = [{"train": part == "train"} if "train" in parameters else {"split": part} for part in parts]
    try:
        datasets = [kind(root, download=True, **option) for option in options]  # type: ignore[misc]
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{data}: cannot be opened or downloaded ({error})", f"put the set into {root}"
        ) from error
    return TorchvisionSource(data, datasets)


def _torchvision_labels(dataset: Any) -> np.ndarray | None:
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            return np.asarray(labels, dtype=np.int64)
    return None


def _torchvision_classes(dataset: Any, labels: np.ndarray | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    named = getattr(dataset, "classes", None)
    return tuple(str(name) for name in (named if named is not None else range(int(labels.max()) + 1)))


def _digest(*arrays: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode())
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
