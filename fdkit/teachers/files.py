"""Reads what a file of weights holds, and nothing more: tensors, plain containers and numbers, never code.

The kind of a file is told by its first bytes, not by its name: safetensors, PyTorch's zip or its older pickle, or a
TorchScript archive (see `fdkit.teachers.torchscript`). Tensors are mapped from the file, not copied, where the
format allows it.
"""

import argparse
import contextlib
import hashlib
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from fdkit.errors import WeightsError
from fdkit.teachers.torchscript import is_torchscript, read_torchscript

_ALIEN = (
    (rb"<", "a web page or other text, not weights: a sign-in page, often"),
    (rb"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (rb"{", "a JSON text, not weights: a refused request, often"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\x93NUMPY", "one NumPy array, not a file of weights"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them, not PyTorch weights"),
)
_ALIEN_HINTS = {
    "a Git LFS": "run `git lfs pull` in the repository it came from",
    "compressed": "unpack it first",
}
_TAR_MAGIC = (257, b"ustar")
_LARGEST_HEADER = 100_000_000
"""Bytes of names and shapes a .safetensors file may have; the format's own bound."""


def read_file(path: Path) -> Any:
    """The content of a .safetensors, PyTorch or TorchScript file: containers, tensors and numbers as they stand.

    Of classes, a file may hold those in which published files keep the options and figures of their training
    (argparse's Namespace, yacs' CfgNode, NumPy's numbers, paths); the file's code, if it has any, is never run.
    Raises WeightsError if the file is missing, damaged, no weights at all, or asks to run code.
    """
    start = _first_bytes(path)
    is_zip = start.startswith(b"PK")
    try:
        if _is_safetensors(start):
            return safetensors.torch.load_file(path)
        _refuse_other_kinds(path, start)
        if path.suffix == ".safetensors" and start.startswith((b"PK", b"\x80\x02")):
            raise WeightsError(
                f"{path} is named .safetensors and is a PyTorch file", hint="rename it to .pth"
            )
        if is_zip:
            _check_archive(path)
            if is_torchscript(path):
                return read_torchscript(path)
        return _read_torch(path, is_zip=is_zip)
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise _damaged(path, error) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex; a file that did not change since is not read again."""
    return _digest_of(path, "sha256")


def verify(path: Path, published: str, *, algorithm: Literal["sha256", "md5"] = "sha256") -> None:
    """Refuses a file that is not the published one.

    published: its digest in hex, or the first digits as torch's hub writes them into file names.
    Raises WeightsError naming both.
    """
    found = _digest_of(path, algorithm)
    if not published or not found.startswith(published.lower()):
        name = {"sha256": "SHA-256", "md5": "MD5"}[algorithm]
        raise WeightsError(
            f"wrong checksum: {path} ({path.stat().st_size} bytes) has {name} {found}, "
            f"the published one is {published}",
            hint="the file is damaged, changed or another one: delete it and get it again from its source",
        )


def _digest_of(path: Path, algorithm: str) -> str:
    status = path.stat()
    return _digest(path.resolve(), algorithm, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, algorithm: str, inode: int, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        raise WeightsError(f"there is no file {path}")
    if not path.is_file():
        raise WeightsError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise WeightsError(
            f"{path} is empty", hint="its download or copy did not finish: delete it and get it again"
        )
    return start


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """Says in plain words what a file is that holds no weights."""
    text = start.lstrip()
    what = next((words for magic, words in _ALIEN if text.startswith(magic)), "")
    offset, magic = _TAR_MAGIC
    if start[offset : offset + len(magic)] == magic:
        what = "an archive (tar) of other files"
    if what:
        other = next((hint for words, hint in _ALIEN_HINTS.items() if what.startswith(words)), "")
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is {what}", hint=other or "get the file of weights again"
        )


def _is_safetensors(start: bytes) -> bool:
    """Whether a file starts with a safetensors header: its length in 8 bytes, then a JSON object."""
    return start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") <= _LARGEST_HEADER


def _check_archive(path: Path) -> None:
    """Refuses a zip that is no file of weights, or whose parts are other than they claim.

    PyTorch stores parts as they are; a compressed part may be small in the file and without bound in memory.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    names = [part.filename for part in parts]
    if names and all(name.endswith(".npy") for name in names):
        raise WeightsError(
            f"{path} is a NumPy archive ({names[0].removesuffix('.npy')}, ...), as Big Vision and other JAX code "
            "keep weights, not PyTorch weights",
            hint="use timm's copy of the same weights: timm:NAME, or a teacher of `fdkit teachers`",
        )
    if not any(name.endswith(("data.pkl", "/constants.pkl")) for name in names):
        raise WeightsError(
            f"{path} is a zip archive of other files ({', '.join(names[:3]) or 'none'}), not a file of weights",
            hint="unpack it and give the file of weights inside",
        )
    wanted = [
        part for part in parts if re.search(r"(^|/)(data\.pkl|data/[^/]*|byteorder|version)$", part.filename)
    ]
    compressed = [part.filename for part in wanted if part.compress_type != zipfile.ZIP_STORED]
    if compressed or sum(part.file_size for part in wanted) > path.stat().st_size:
        raise WeightsError(
            f"{path} is refused: its tensors are compressed ({', '.join(compressed[:3])}) or larger than the file",
            hint="get the file again from its source: PyTorch itself does not compress tensors",
        )


class _Leftover:
    """Stands in for an object beside the weights, such as a NumPy number; takes its parts and forgets them."""

    def __new__(cls, *parts: Any) -> "_Leftover":
        return super().__new__(cls)

    def __init__(self, *parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Options(OrderedDict):
    """Stands in for a dictionary class of configuration files; made as a plain ordered dictionary."""

    def __new__(cls, *parts: Any) -> Any:
        return OrderedDict()


_STAND_INS: list[Any] = [
    argparse.Namespace,
    *(
        (_Leftover, name)
        for name in (
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
            "pathlib.PosixPath",
            "pathlib.PurePosixPath",
        )
    ),
    (_Options, "yacs.config.CfgNode"),
]


def _read_torch(path: Path, *, is_zip: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        asked = _classes_asked_for(path, is_zip=is_zip)
        if not asked:
            raise _damaged(path, error) from None
        raise WeightsError(
            f"{path} is refused: it asks to run code ({', '.join(asked[:5])}) and holds more than tensors",
            hint="use a .safetensors file, or have the file's author save the state dict alone",
        ) from None


def _classes_asked_for(path: Path, *, is_zip: bool) -> list[str]:
    """What a refused pickle wanted to import, beyond tensors; its instructions are listed, not followed."""
    known = {entry[1] if isinstance(entry, tuple) else "argparse.Namespace" for entry in _STAND_INS}
    if is_zip:
        with contextlib.suppress(pickle.UnpicklingError, RuntimeError, ValueError):
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known)
    asked, strings = set(), [""]
    with path.open("rb") as file, contextlib.suppress(ValueError):  # ends where no further pickle follows
        while True:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    asked.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    asked.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return sorted(
        name for name in asked - known if not name.startswith(("torch.", "collections.OrderedDict"))
    )


def _damaged(path: Path, error: BaseException) -> WeightsError:
    return WeightsError(
        f"{path} ({path.stat().st_size} bytes) is damaged or cut short, or not a file of weights "
        f"({type(error).__name__})",
        hint="get the file again and compare its size or SHA-256 with the source's",
    )
