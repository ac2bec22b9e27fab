"""The figures of a report: training curves and accuracies. Each takes a width in inches."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fdkit.analysis._figure import BLUE, GREY, PALETTE, WIDE, in_style, new_figure, panels, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curve(NamedTuple):
    """One quantity over training steps."""

    key: str
    """Its name in the rows of metrics."""
    label: str
    """Its name and unit in the figure."""


DISTILLATION_CURVES = (Curve("loss", "loss"), Curve("explained_variance", "explained variance"))


@in_style
def training_curves(
    rows: Sequence[Mapping[str, Any]], width: float = WIDE, *, curves: Sequence[Curve] = DISTILLATION_CURVES
) -> "Figure":
    """A panel a curve over steps: the values faint, their running mean on top.

    rows: dictionaries with "step" and the curves' keys, such as the lines of metrics.jsonl; a row without a key, or
    with a value that is not finite, has no point in that curve.
    Raises ValueError if a curve has no point at all.
    """
    figure, axes = panels(len(curves), width=width, height=2.5)
    for place, curve in zip(axes, curves, strict=True):
        _draw_curve(place, rows, curve)
    return figure


def _draw_curve(axes: "Axes", rows: Sequence[Mapping[str, Any]], curve: Curve) -> None:
    points = [(row["step"], row[curve.key]) for row in rows if row.get(curve.key) is not None]
    points = [(step, value) for step, value in points if isfinite(value)]
    if not points:
        raise ValueError(f"no row of metrics has a finite {curve.key!r}")
    steps, values = np.array(points, dtype=float).T
    window = len(values) // 50
    axes.plot(steps, values, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1 if window > 1 else 2)
    if window > 1:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=2)
    axes.set_title(curve.label)
    axes.set_xlabel("step")
    axes.margins(x=0.02)


@in_style
def accuracy_bars(
    models: Sequence[str],
    accuracies: Mapping[str, Sequence[float]],
    width: float = WIDE,
    *,
    chance: float | None = None,
) -> "Figure":
    """A group of bars a model, a colour a protocol, the percentage written at the end of each bar.

    accuracies: for each protocol, one fraction in [0, 1] a model; chance: a fraction marked by a dashed line.
    Raises ValueError if a protocol does not have one number a model.
    """
    for protocol, values in accuracies.items():
        if len(values) != len(models):
            raise ValueError(f"{protocol} has {len(values)} accuracies for {len(models)} models")
    thickness = 0.8 / len(accuracies)
    figure = new_figure(width, 0.95 + len(models) * (0.22 + 0.24 * len(accuracies)))
    axes = figure.subplots()
    handles: list[Any] = []
    for number, (protocol, values) in enumerate(accuracies.items()):
        places = np.arange(len(models)) + (number - (len(accuracies) - 1) / 2) * thickness
        percentages = [100 * value for value in values]
        bars = axes.barh(places, percentages, height=0.9 * thickness, color=PALETTE[number], label=protocol)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        handles.append(bars)
    if chance is not None:
        handles.append(
            axes.axvline(100 * chance, color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="chance")
        )
    axes.set_yticks(np.arange(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("accuracy (%)")
    figure.legend(handles=handles, loc="outside upper left", ncols=len(accuracies) + 1)
    return figure


@in_style
def comparison_intervals(
    rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], width: float = WIDE
) -> "Figure":
    """A panel a measure: a dot and its interval for each candidate, the percentage beside it.

    rows: (candidate, measure -> {"top1": share, "interval": (low, high)}); a candidate may lack a measure.
    """
    measures = list(dict.fromkeys(measure for _, row in rows for measure in row))
    figure, axes = panels(len(measures), width=width, height=0.9 + 0.34 * len(rows))
    for place, measure in zip(axes, measures, strict=True):
        shown = [(name, row[measure]) for name, row in rows if measure in row]
        for number, (_, found) in enumerate(shown):
            low, high = (100 * end for end in found["interval"])
            colour = BLUE if number == 0 else GREY
            place.plot([low, high], [number, number], color=colour, linewidth=2)
            place.plot(100 * found["top1"], number, "o", color=colour)
            place.annotate(
                f"{100 * found['top1']:.1f}",
                (100 * found["top1"], number),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        place.set_yticks(range(len(shown)), [name for name, _ in shown])
        place.set_ylim(len(shown) - 0.5, -0.7)
        place.margins(x=0.12)
        place.set_title(wrapped(measure, figure))
        place.set_xlabel("accuracy (%)")
    return figure
