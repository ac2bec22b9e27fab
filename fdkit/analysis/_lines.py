"""How one model's line or point looks beside those of others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdkit.analysis._figure import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v")


def colour_of(number: int) -> str:
    """The colour of the model of this number, from 0."""
    return PALETTE[number % len(PALETTE)]


def line_of(number: int) -> dict[str, Any]:
    """The line of the model of this number, from 0; dashes tell models apart where colours come again."""
    return {"color": colour_of(number), "linestyle": _DASHES[number // len(PALETTE) % len(_DASHES)]}


def marker_of(number: int) -> str:
    """The marker of the model of this number, from 0: a sign beside the colour, another where that comes again."""
    return _MARKERS[(number + number // len(PALETTE)) % len(_MARKERS)]


def draw_over_depth(
    axes: "Axes",
    number: int,
    values: Sequence[float],
    *,
    label: str,
    band: Sequence[Sequence[float]] | None = None,
) -> None:
    """The line of the model of this number over its relative depth, so that models of other depths compare.

    values: one a layer, at 1 / L to 1; band: [low, high] a layer, shaded.
    """
    depths = [(layer + 1) / len(values) for layer in range(len(values))]
    axes.plot(depths, values, marker=marker_of(number), markersize=4, label=label, **line_of(number))
    if band is not None:
        lows, highs = zip(*band, strict=True)
        axes.fill_between(depths, lows, highs, color=colour_of(number), alpha=0.18, linewidth=0)
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("relative depth (1: last layer)")
