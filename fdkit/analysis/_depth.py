"""How a number of each layer, or of each head of each layer, is drawn over the depth of a model."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fdkit.analysis._figure import BLUE, GREY, NARROW, ORANGE, columns_of, panels, wrapped
from fdkit.analysis._lines import colour_of, line_of, marker_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHED = (0, (4, 3))


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


def draw_heads_of(
    models: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[float]]], unit: str, *, width: float
) -> "Figure":
    """A panel a model, with one axis for all: its name, and the values and the uniform ones of `draw_heads`.

    unit: what the values are, with their unit; width: inches.
    """
    figure, axes = panels(len(models), width=width, share_y=True)
    highest = 0.0
    for place, (name, values, uniform) in zip(axes, models, strict=True):
        draw_heads(place, values, uniform)
        place.set_title(wrapped(name, figure))
        highest = max(highest, *uniform, *(value for heads in values for value in heads))
    axes[0].set_ylim(0, 1.08 * highest)
    for place in axes[:: columns_of(figure)]:
        place.set_ylabel(unit)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if width > NARROW else 2)
    return figure


def draw_models(
    axes: "Axes",
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    references: Sequence[Sequence[float]] | None = None,
) -> None:
    """A line a model over its layers, with gaps where there is None.

    values: [[a number a layer] a model]; references: the same, drawn thin and dashed in the colour of the model.
    Models beyond the palette differ by line and mark.
    """
    for number, (name, numbers) in enumerate(zip(names, values, strict=True)):
        layers = range(1, len(numbers) + 1)
        shown = np.array(numbers, dtype=float)
        axes.plot(
            layers,
            shown,
            linewidth=1.8,
            marker=marker_of(number),
            markersize=4,
            label=name,
            **line_of(number),
        )
        if references is not None:
            axes.plot(layers, references[number], color=colour_of(number), linestyle=DASHED, linewidth=0.9)
    label_layers(axes, max(len(numbers) for numbers in values))


def model_legend(figure: "Figure", axes: "Axes", note: str = "") -> None:
    """A legend of the lines of `draw_models` below the figure, in as many columns as its names let stand.

    note: what the thin dashed lines are.
    """
    from matplotlib.lines import Line2D

    width = figure.get_figwidth()
    handles, names = axes.get_legend_handles_labels()
    if note:
        handles, names = (
            [*handles, Line2D([], [], color=GREY, linestyle=DASHED, linewidth=0.9)],
            [*names, note],
        )
    names = [textwrap.fill(name, width=round(11 * width)) for name in names]
    longest = max(len(line) for name in names for line in name.splitlines())
    columns = max(1, min(len(names), int(13 * width // (longest + 6))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def label_layers(axes: "Axes", num_layers: int) -> None:
    """The axis of depth: layers from 1, whole numbers alone."""
    axes.set_xlabel("layer")
    axes.set_xlim(0.4, num_layers + 0.6)
    axes.locator_params(axis="x", integer=True)
