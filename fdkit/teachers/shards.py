"""Named tensors of a checkpoint, whole or by rows, whether they lie in one file or in a part a process.

A group of tensors, such as "model", is one file GROUP.safetensors, or parts GROUP-0000I-of-0000N.safetensors with
shards.json, which says which rows of each cut tensor each part holds; what is not cut is in the first part. The format
is this project's own: torch's distributed checkpoints keep that in a pickle, which is code to whoever reads it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from fdkit.data.json_file import read_object
from fdkit.errors import WeightsError

SHARDS_FILE = "shards.json"


class Rows(NamedTuple):
    """Which rows of a tensor are meant: start to stop of its first dimension."""

    start: int
    stop: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


def part_name(group: str, number: int, count: int) -> str:
    """The file of one part of a group; number counts from 0."""
    return f"{group}-{number + 1:05d}-of-{count:05d}.safetensors"


def group_files(names: Iterable[str], group: str) -> list[str]:
    """Those of a checkpoint's files that hold a group, and what says how they go together; [] if it has none."""
    known = sorted(names)
    if f"{group}.safetensors" in known:
        return [f"{group}.safetensors"]
    parts = [name for name in known if name.startswith(f"{group}-0") and name.endswith(".safetensors")]
    return [*parts, SHARDS_FILE] if parts else []


def read_group(path: Path, group: str, wanted: Mapping[str, Rows] | None = None) -> dict[str, Tensor]:
    """The tensors of a group in a sound checkpoint; of those that `wanted` names too these rows alone, else all.

    Raises WeightsError for a tensor of another shape than wanted, for a group that is not there, and for files that
    do not hold what they should, whatever their checksums say.
    """
    files = group_files((file.name for file in path.iterdir()), group)
    if not files:
        raise WeightsError(f"the checkpoint {path} holds no {group}")
    try:
        cuts: dict[str, list[int]] = {}
        if files[-1] == SHARDS_FILE:
            files = files[:-1]
            cuts = _cuts(path / SHARDS_FILE, group, len(files))
        return _join(path, files, cuts, wanted or {})
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"the checkpoint {path} is not what it should be: its {group} cannot be read: {error}",
            "copy the run folder again, or take another checkpoint of it",
        ) from error


def _cuts(path: Path, group: str, num_parts: int) -> dict[str, list[int]]:
    """By tensor, the rows where its parts begin and the last one ends. Raises ValueError for anything else."""
    cuts = read_object(path).get(group)
    if not isinstance(cuts, dict):
        raise ValueError(f"{path.name} says nothing of it")
    for key, edges in cuts.items():
        is_list = isinstance(edges, list) and len(edges) == num_parts + 1
        if (
            not is_list
            or any(type(edge) is not int for edge in edges)
            or sorted(edges) != edges
            or edges[0] != 0
        ):
            raise ValueError(f"{path.name} has no rows of {num_parts} parts for {key}")
    return cuts


def _join(
    path: Path, files: list[str], cuts: Mapping[str, list[int]], wanted: Mapping[str, Rows]
) -> dict[str, Tensor]:
    """The tensors of some files; cuts: at which rows those cut among them begin."""
    tensors: dict[str, list[Tensor]] = {}
    for number, name in enumerate(files):
        with safetensors.safe_open(path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # which is no dictionary
                first = 0
                if key in cuts:
                    first, last = cuts[key][number : number + 2]
                    if file.get_slice(key).get_shape()[:1] != [last - first]:
                        raise ValueError(f"{name} holds other rows of {key} than {SHARDS_FILE} says")
                piece = _rows(file.get_slice(key), first, wanted.get(key))
                tensors.setdefault(key, []).append(file.get_tensor(key) if piece is None else piece)
    joined = {key: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for key, pieces in tensors.items()}
    for key in wanted.keys() & joined.keys():
        rows, height = wanted[key], _height(cuts, key, path, files)
        if (height, *joined[key].shape[1:]) != rows.shape:
            raise WeightsError(
                f"{path}: {key} is {(height, *joined[key].shape[1:])}, the run trains one of {rows.shape}",
                "resume with the configuration that the checkpoint was written with",
            )
    return joined


def _height(cuts: Mapping[str, list[int]], key: str, path: Path, files: list[str]) -> int:
    """Rows of the whole tensor."""
    if key in cuts:
        return cuts[key][-1]
    with safetensors.safe_open(path / files[0], "pt") as file:
        return int(file.get_slice(key).get_shape()[0])


def _rows(part: Any, first: int, rows: Rows | None) -> Tensor | None:
    """The wanted rows of a part that begins at row `first` of the whole; None for all of it."""
    if rows is None:
        return None
    height = int(part.get_shape()[0])
    start, stop = (min(max(row - first, 0), height) for row in (rows.start, rows.stop))
    piece: Tensor = part[start:stop]
    return piece
