"""The tensors of a TorchScript archive, read without its program.

`torch.jit.load` compiles the code in an archive and may run parts of it. Here that code is never looked at. An archive
is a zip: `data.pkl` pickles the tree of modules as objects of the program's own classes, each with its attributes by
name, and tensors as references into `data/`. That pickle is read by an unpickler which knows the instructions
TorchScript's own writer uses, and of names only these: TorchScript's classes (any `__torch__.` name) become inert
objects that keep their attributes, and TorchScript's marks of typed lists and dictionaries are taken off. Any other
name is refused before anything is made of it, and so is an object that would restore itself by code of its own.
Tensors are made when all is read, over the mapped file, each checked against the size of its part.

What comes out is the state dict: every tensor by its path of attributes, as in `visual.ln_pre.weight`. Attributes
that are no tensors, such as `training`, are left out.

Source: the format as `torch.jit.save` writes it (torch/csrc/jit/serialization: pickler.cpp, export_module.cpp).
"""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkit.errors import WeightsError

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_INSTRUCTIONS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST"),
    *(
        "APPEND",
        "APPENDS",
        "LIST",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "DICT",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
    ),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "BINPUT", "LONG_BINPUT"),
    *("BINGET", "LONG_BINGET", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID"),
}
_MOST_VALUES = 100_000
"""Attributes an archive may have in all; a small one can name the same parts over and over without end."""
_DEEPEST = 100
"""Modules inside modules, and lists inside them."""


def is_torchscript(path: Path) -> bool:
    """Whether a zip is a TorchScript archive rather than one of tensors; BadZipFile if it is no zip."""
    names = _part_names(path)
    return "constants.pkl" in names or any(name.startswith("code/") for name in names)


def _part_names(path: Path) -> list[str]:
    """The parts of an archive, without the folder all of them are in."""
    with zipfile.ZipFile(path) as archive:
        return [name.partition("/")[2] for name in archive.namelist()]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor of a TorchScript archive by its path of attributes; nothing in the archive is run.

    The tensors are mapped from the file and have the types it has: half precision for most of CLIP's.
    Raises WeightsError for an archive that cannot be read so; RuntimeError, ValueError and others for a damaged one.
    """
    if "data.pkl" not in _part_names(path):
        raise _refused(path, "it is of a format before PyTorch 1.4")
    records: Any = torch.PyTorchFileReader(str(path))
    if records.has_record("byteorder") and records.get_record("byteorder") != b"little":
        raise _refused(path, "its numbers are big-endian")
    pickled = records.get_record("data.pkl")
    _check_instructions(path, pickled)
    references = _references(path, _Unpickler(path, pickled).load())
    mapped: Any = torch.UntypedStorage.from_file(os.fspath(path), False, path.stat().st_size)
    return {name: _tensor(reference, records, mapped) for name, reference in references.items()}


class _Part(NamedTuple):
    """Numbers of one part of the archive."""

    key: str
    dtype: torch.dtype
    length: int


class _Reference(NamedTuple):
    """A tensor over a part."""

    part: _Part
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Object:
    """An object of a class of the program: its attributes, and nothing it could do."""

    __slots__ = ("attributes",)

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}


class _Untyped:
    """Takes the mark of its elements' type off a list or dictionary."""

    __slots__ = ()

    def __call__(self, value: Any, *_: Any) -> Any:
        return value


class _MakeReference:
    """Stands in for torch's function that rebuilds a tensor."""

    __slots__ = ()

    def __call__(self, part: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Reference:
        whole = (offset, *size, *stride)
        if not isinstance(part, _Part) or not all(type(value) is int and value >= 0 for value in whole):
            raise ValueError(f"a tensor of {part!r:.100}")
        return _Reference(part, offset, tuple(size), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Makes inert objects, references, plain containers and numbers; any other name is refused."""

    def __init__(self, path: Path, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of the pickle."""
        if module == "__torch__" or module.startswith("__torch__."):
            return _stand_in(self._path, f"{module}.{name}")
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _MakeReference()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return _Untyped()
        raise _refused(self._path, f"it asks for {module}.{name}")

    def persistent_load(self, reference: Any) -> _Part:
        """The part a tensor refers to."""
        match reference:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as length) if length >= 0:
                return _Part(key, dtype, length)
        raise _refused(self._path, f"it refers to {reference!r:.100}")


def _stand_in(path: Path, name: str) -> type[_Object]:
    """A new inert class for a class of the program."""

    def restore(self: _Object, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise _refused(path, f"{name} restores itself by code of its own")
        self.attributes = state

    return type(name.rpartition(".")[2], (_Object,), {"__slots__": (), "__setstate__": restore})


def _check_instructions(path: Path, pickled: bytes) -> None:
    """Refuses instructions TorchScript does not write, and one that would reserve memory beyond the file's size."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name not in _INSTRUCTIONS:
            raise _refused(path, f"its pickle has the instruction {opcode.name}")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(pickled):
            raise _refused(path, "its pickle reserves more memory than it can use")


def _references(path: Path, root: Any) -> dict[str, _Reference]:
    """Every tensor in the tree of modules, by its path of attributes."""
    found: dict[str, _Reference] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    num_values = 0
    while waiting:
        names, value = waiting.pop()
        num_values += 1
        if num_values > _MOST_VALUES or len(names) > _DEEPEST:
            raise _refused(path, "its modules repeat or contain themselves")
        if isinstance(value, _Reference):
            found[".".join(names)] = value
        else:
            waiting += reversed([((*names, name), inside) for name, inside in _inside(value)])
    if not found:
        raise _refused(path, "it holds no tensors")
    return found


def _inside(value: Any) -> Iterable[tuple[str, Any]]:
    """What a module or container holds, by name; nothing for what is neither."""
    if isinstance(value, _Object):
        return getattr(value, "attributes", {}).items()
    if isinstance(value, dict):
        return [(str(key), inside) for key, inside in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), inside) for index, inside in enumerate(value)]
    return ()


def _tensor(reference: _Reference, records: Any, mapped: Any) -> Tensor:
    """The tensor of a reference; ValueError or RuntimeError if its part is not there, or holds less than it claims."""
    part, record = reference.part, f"data/{reference.part.key}"
    if not records.has_record(record):
        raise ValueError(f"the archive has no part {record}")
    num_bytes = part.length * part.dtype.itemsize
    if num_bytes > records.get_record_size(record):
        raise ValueError(f"part {record} is smaller than {part.length} numbers of {part.dtype}")
    start = records.get_record_offset(record)
    numbers = torch.empty(0, dtype=part.dtype).set_(mapped[start : start + num_bytes])
    tensor = numbers.as_strided(reference.size, reference.stride, reference.offset)
    if tensor.numel() > numbers.numel():
        raise ValueError(f"a tensor of size {reference.size} is made of {part.length} numbers")
    return tensor


def _refused(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{path} is a TorchScript archive whose tensors cannot be read without running it: {why}",
        hint="have its author save the state dict alone; for OpenAI's CLIP the names clip_vitb, clip_vitl, ... load "
        "timm's copy of the same weights",
    )
