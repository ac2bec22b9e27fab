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

from fdkit.errors import WeightsError

_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(.*)")
_WRITTEN = re.compile(r"(Anonymous|Swap): +[1-9]")
_BUFFER_LENGTH = 1 << 18
"""Numbers read at a time."""


class Mapping(NamedTuple):
    """A part of a file that this process has mapped."""

    start: int
    end: int
    """Addresses, the end excluded."""
    offset: int
    """Where in the file the start stands, in bytes."""
    path: str
    is_changed: bool = False
    """Whether it was written to, as by a conversion in place, so that its memory is no longer the file's."""


def mappings() -> list[Mapping]:
    """The files mapped by now, libraries among them; none where the system does not tell (it is Linux that does)."""
    areas: list[Mapping] = []
    with contextlib.suppress(OSError), Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if area := _AREA.match(line):
                start, end, offset = (int(number, 16) for number in area.groups()[:3])
                areas.append(Mapping(start, end, offset, area[4]))
            elif _WRITTEN.match(line):
                areas[-1] = areas[-1]._replace(is_changed=True)
    return [area for area in areas if area.path.startswith("/")]


def own_copy(value: Tensor, dtype: torch.dtype, known: Sequence[Mapping]) -> Tensor:
    """A tensor's values, contiguous and in a dtype; never in memory that is mapped from a file where `known` tells.

    known: what `mappings` gives. A tensor that is in no file and is as it should be is given back itself.
    Raises WeightsError if the file was cut short meanwhile.
    """
    start, end = value.data_ptr(), value.data_ptr() + value.nbytes
    place = next((one for one in known if one.start <= start < end <= one.end), None)
    if place is None or value.device.type != "cpu":
        return value.to(dtype).contiguous()
    copy = torch.empty(value.shape, dtype=dtype)
    is_in_file = value.is_contiguous() and not place.is_changed
    if not is_in_file or not _read(place, start, value.dtype, into=copy.view(-1)):
        copy.copy_(value)
    return copy


def _read(place: Mapping, address: int, dtype: torch.dtype, *, into: Tensor) -> bool:
    """Reads the numbers that are mapped at an address from the file; False if it is not there any more.

    Numbers pass through a small buffer: buffers of the tensors' sizes would leave the heap full of holes.
    """
    try:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset + address - place.start)
            for part in into.split(_BUFFER_LENGTH):
                buffer = torch.empty(part.shape, dtype=dtype)
                if file.readinto(buffer.view(torch.uint8).numpy().data) < buffer.nbytes:
                    raise WeightsError(
                        f"{place.path} was cut short while it was read",
                        hint="let nothing write to it, and try again",
                    )
                part.copy_(buffer)
    except OSError:
        return False
    return True
