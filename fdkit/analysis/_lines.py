"""How one model's line or point looks beside those of others."""

from typing import Any

from fdkit.analysis._figure import PALETTE

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v")


def colour_of(number: int) -> str:
    """The colour of the model of this number, from 0."""
    return PALETTE[number % len(PALETTE)]


def line_of(number: int) -> dict[str, Any]:
    """The line of the model of this number, from 0; dashes tell models apart where colours come again."""
    return {"color": colour_of(number), "linestyle": _DASHES[number // len(PALETTE) % len(_DASHES)]}


def marker_of(number: int) -> str:
    """The marker of the model of this number, from 0: a second sign beside the colour, another where that comes again."""
    return _MARKERS[(number + number // len(PALETTE)) % len(_MARKERS)]
