"""Tensors of a mapped file, in memory of their own.

A network must not keep its weights mapped: a file that is overwritten while a run of days uses it would change the
run, and one that is cut short would end it. But a copy that reads through the mapping leaves both in memory, the
file's pages and its own, twice the weights at the end. So the bytes are read from the file itself, tensor by tensor,
and the mapping is only asked where they stand.
"""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(.*)")
_WRITTEN = re.compile(r"(Anonymous|Swap): +[1-9]")


class Mapping(NamedTuple):
    """A part of a file that this process has mapped, and nobody has written to."""

    start: int
    end: int
    """Addresses, the end excluded."""
    offset: int
    """Where in the file the start stands, in bytes."""
    path: str


def mappings() -> list[Mapping]:
    """The files mapped by now, libraries among them; none where the system does not tell (it is Linux that does).

    A mapping that has been written to, as by a conversion in place, is left out: its memory is no longer the file's.
    """
    areas: list[Mapping] = []
    written = set()
    with contextlib.suppress(OSError), Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if area := _AREA.match(line):
                start, end, offset = (int(number, 16) for number in area.groups()[:3])
                areas.append(Mapping(start, end, offset, area[4]))
            elif _WRITTEN.match(line):
                written.add(areas[-1])
    return [area for area in areas if area.path.startswith("/") and area not in written]


def own_copy(value: Tensor, dtype: torch.dtype, known: Sequence[Mapping]) -> Tensor:
    """A tensor's values, contiguous and in a dtype; never in memory that is mapped from a file where `known` tells.

    known: what `mappings` gives. A tensor that is in no file and is as it should be is given back itself.
    """
    if value.numel() == 0 or value.device.type != "cpu":
        return value.to(dtype).contiguous()
    length = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start, num_bytes = value.data_ptr(), length * value.itemsize
    place = next((one for one in known if one.start <= start and start + num_bytes <= one.end), None)
    read = None if place is None else _read(place.path, place.offset + start - place.start, num_bytes)
    if read is not None:
        value = read.view(value.dtype).as_strided(value.shape, value.stride())
    elif place is not None:
        value = value.clone()
    return value.to(dtype).contiguous()


def _read(path: str, offset: int, num_bytes: int) -> Tensor | None:
    """Bytes of a file as a tensor; None if it is not there any more, as one that was deleted."""
    content = torch.empty(num_bytes, dtype=torch.uint8)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            count = file.readinto(content.numpy())
    except OSError:
        return None
    return content if count == num_bytes else None
