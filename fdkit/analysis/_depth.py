"""How a number of each layer, or of each head of each layer, is drawn over the depth of a model."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from fdkit.analysis._figure import BLUE, GREY, ORANGE, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHED = (0, (4, 3))
_LINES = (("-", "o"), (DASHED, "s"), ((0, (1, 1.5)), "^"))


def draw_heads(
    axes: "Axes",
    values: Sequence[Sequence[float]],
    uniform: Sequence[float],
    *,
    label: str = "uniform attention",
) -> None:
    """A dot a head, a line for their mean, and a grey line of what uniform attention would give.

    values: [[a number a head] a layer]; uniform: a number a layer; label: what the legend calls it.
    """
    layers = range(1, len(values) + 1)
    depths = [layer for layer, heads in zip(layers, values, strict=True) for _ in heads]
    edges = [0.5, *(layer + 0.5 for layer in layers)]
    axes.step(edges, [uniform[0], *uniform], color=GREY, linestyle=DASHED, linewidth=1, label=label)
    dots = [value for heads in values for value in heads]
    axes.scatter(depths, dots, s=20, color=BLUE, alpha=0.55, linewidths=0, zorder=2, label="a head")
    means = [sum(heads) / len(heads) for heads in values]
    axes.plot(layers, means, color=ORANGE, linewidth=2, zorder=3, label="mean of heads")
    label_layers(axes, len(values))


def draw_models(
    axes: "Axes",
    values: Mapping[str, Sequence[float | None]],
    references: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """A line a model over its layers, gaps where there is None, and thin dashed ones of the same colour as reference.

    values, references: a number a layer, by the model's name. Models beyond the palette differ by line and mark.
    """
    styles = [(colour, *line) for line, colour in product(_LINES, PALETTE)]
    for number, (name, numbers) in enumerate(values.items()):
        colour, line, mark = styles[number % len(styles)]
        layers = range(1, len(numbers) + 1)
        shown = np.array(numbers, dtype=float)
        axes.plot(layers, shown, color=colour, linestyle=line, marker=mark, markersize=4, label=name)
        if references is not None:
            axes.plot(layers, references[name], color=colour, linestyle=DASHED, linewidth=0.9)
    label_layers(axes, max(len(numbers) for numbers in values.values()))


def label_layers(axes: "Axes", num_layers: int) -> None:
    """The axis of depth: layers from 1, whole numbers alone."""
    axes.set_xlabel("layer")
    axes.set_xlim(0.4, num_layers + 0.6)
    axes.locator_params(axis="x", integer=True)
