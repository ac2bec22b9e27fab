"""Which columns of the features a classifier reads, by name."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.evaluation._reading import TOKENS, Part

Columns = slice | Tensor
"""Of (N, D) features: a slice, or positions (W,) int64."""

ALL, GRID = "all", "grid"


def resolve_inputs(names: Sequence[str], parts: Sequence[Part], like: Tensor) -> dict[str, Columns]:
    """The columns of every input named, in the order asked; "grid" becomes the names of four.

    "all": every column. Otherwise kinds of tokens with + between, each of the last layer or, as in "cls:4", of the last
    four side by side. "grid": "cls", "cls:L", "cls+patches" and "cls:L+patches" of the L layers read, which are the
    inputs DINOv2's linear evaluation tries for L = 4 (facebookresearch/dinov2 dinov2/eval/linear.py); two if L is 1.
    parts: of the features; like: of their device. Raises ConfigError for a name that is no input, for one named twice,
    and for tokens or layers that were not extracted.
    """
    wanted = [name for asked in names for name in (_grid(parts) if asked == GRID else [asked])]
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"inputs {', '.join(names)} name an input twice", "name each once")
    return {name: slice(None) if name == ALL else _columns(name, parts, like) for name in wanted}


def width_of(columns: Columns, like: Tensor) -> int:
    """How many of the columns of features (N, D) these are."""
    return len(columns) if isinstance(columns, Tensor) else len(range(*columns.indices(like.shape[1])))


def _grid(parts: Sequence[Part]) -> list[str]:
    deepest = -min((part.layer for part in parts), default=-1)
    classes = ["cls"] if deepest == 1 else ["cls", f"cls:{deepest}"]
    return classes + [f"{name}+patches" for name in classes]


def _columns(name: str, parts: Sequence[Part], like: Tensor) -> Columns:
    found = [part for word in name.split("+") for part in _parts(name, word, parts)]
    if len(set(found)) < len(found):
        raise ConfigError(f"inputs {name} reads {found[0].token} twice", "name each kind of token once")
    if all(before.stop == part.start for before, part in pairwise(found)):
        return slice(found[0].start, found[-1].stop)
    return torch.cat([torch.arange(part.start, part.stop, device=like.device) for part in found])


def _parts(name: str, word: str, parts: Sequence[Part]) -> list[Part]:
    """The parts that one word of an input's name means, layer by layer, deepest last."""
    token, colon, number = word.partition(":")
    if token not in TOKENS or (colon and not (number.isdecimal() and int(number) > 0)):
        raise ConfigError(
            f"inputs {name}: {word!r} is no input",
            "name all, grid, or tokens such as cls, cls:4 and cls+patches, with spaces between inputs",
        )
    layers = range(-int(number or 1), 0)
    by_place = {(part.layer, part.token): part for part in parts}
    missing = [f"{token} of layer {layer}" for layer in layers if (layer, token) not in by_place]
    if missing:
        known = ", ".join(part.name for part in parts) or "one vector an image, of no named token"
        raise ConfigError(
            f"inputs {name} reads {missing[0]}, which was not extracted; there is {known}",
            "extract more with --pooling cls+patches --layers 4, or name fewer with --inputs",
        )
    return [part for (layer, kind), part in by_place.items() if kind == token and layer in layers]
