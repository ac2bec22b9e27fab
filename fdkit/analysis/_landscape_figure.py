"""The figure of a loss landscape: lines over a line, or a map a model over a plane."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdkit.analysis._figure import INK, ORANGE, WIDE, columns_of, in_style, legend_columns, panels, wrapped
from fdkit.analysis._lines import line_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_LEVELS = 10
CLIPPED = 95
"""Percentile of all losses that the map's colours end at: a few high walls would leave one colour for all else."""


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Loss and accuracy over the step, a line a model; or over a plane a map a model, with one scale for all.

    A trajectory's map has the path, a dot a checkpoint and a star at the end. numbers: as `analyze` gives them;
    width: inches.
    """
    if numbers["dimensions"] == 1:
        return _draw_lines(numbers["models"], width)
    return _draw_maps(numbers, width)


def _draw_lines(models: Sequence[dict[str, Any]], width: float) -> "Figure":
    figure, (loss, accuracy) = panels(2, width=width)
    for number, model in enumerate(models):
        loss.plot(model["x"], _floats(model["loss"]), linewidth=2, label=model["name"], **line_of(number))
        accuracy.plot(model["x"], 100 * _floats(model["accuracy"]), linewidth=2, **line_of(number))
    loss.set_ylabel("loss (nats)")
    loss.set_ylim(bottom=0)
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_ylim(0, 102)
    for place in (loss, accuracy):
        place.set_xlabel("step (of each filter's length)")
        place.margins(x=0.01)
    if len(models) > 1:
        names = [model["name"] for model in models]
        figure.legend(loc="outside lower center", ncols=legend_columns(names, width))
    else:
        loss.set_title(wrapped(models[0]["name"], figure))
    return figure


def _draw_maps(numbers: dict[str, Any], width: float) -> "Figure":
    models, is_path = numbers["models"], numbers["directions"] == "trajectory"
    beside = max(1, min(len(models), int(width // 2.2)))
    height = 3.0 if is_path else min(3.3, 0.75 * width / beside + 0.9)
    figure, axes = panels(len(models), width=width, height=height, share_y=not is_path)
    levels, is_clipped = _levels(models)
    for place, model in zip(axes, models, strict=True):
        filled = place.contourf(
            model["x"],
            model["y"],
            np.ma.masked_invalid(_floats(model["loss"])),
            levels=levels,
            cmap="Blues",
            extend="max" if is_clipped else "neither",
        )
        place.contour(filled, colors=INK, linewidths=0.4, alpha=0.5)
        place.set_title(wrapped(model["name"], figure))
        place.grid(visible=False)
        if is_path:
            _draw_path(place, model["path"])
        else:
            place.plot(0, 0, marker="+", color=ORANGE, markersize=9, markeredgewidth=2)
            place.set_box_aspect(1)
            place.locator_params(axis="x", nbins=3)
            place.locator_params(axis="y", nbins=5)
            place.set_xlabel("first direction")
    if not is_path:
        for place in axes[:: columns_of(figure)]:
            place.set_ylabel("second direction")
    words = "loss (nats)" if is_path else "loss (nats); steps in each filter's length"
    figure.colorbar(
        filled,
        ax=figure.axes,
        location="bottom",
        label=words,
        fraction=0.16 / figure.get_figheight(),
        pad=0.12 / figure.get_figheight(),
        aspect=6 * width,
        ticks=levels[:: _ticks_apart(levels, width)],
        format="%.6g",
    )
    return figure


def _ticks_apart(levels: np.ndarray, width: float) -> int:
    """How many levels lie between two whose numbers fit beside each other under the bar; width: inches."""
    longest = max(len(f"{level:.6g}") for level in levels)
    return math.ceil(len(levels) * 0.085 * (longest + 1.5) / (0.6 * width))


def _draw_path(axes: "Axes", path: dict[str, Any]) -> None:
    axes.plot([*path["x"], 0], [*path["y"], 0], color=ORANGE, linewidth=1.5, zorder=3)
    axes.scatter(path["x"], path["y"], s=16, color=ORANGE, edgecolors="white", linewidths=0.7, zorder=4)
    axes.plot(0, 0, marker="*", color=ORANGE, markersize=13, markeredgecolor="white", zorder=5)
    is_above = len(path["y"]) < 2 or path["y"][0] >= path["y"][1]  # on the side that the path does not go
    axes.annotate(
        f"step {path['steps'][0]}",
        (path["x"][0], path["y"][0]),
        xytext=(0, 7 if is_above else -7),
        textcoords="offset points",
        ha="center",
        va="bottom" if is_above else "top",
        fontsize=8.5,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
        zorder=6,
    )
    first, second = (100 * share for share in path["explained"])
    axes.set_xlabel(f"first component ({first:.0f} % of variance)")
    axes.set_ylabel(f"second component ({second:.0f} %)")


def _levels(models: Sequence[dict[str, Any]]) -> tuple[np.ndarray, bool]:
    """The same contour levels for all models, and whether there are losses above the last."""
    from matplotlib.ticker import MaxNLocator

    losses = np.concatenate([_floats(model["loss"]).ravel() for model in models])
    finite = losses[np.isfinite(losses)]
    low, high = float(finite.min()), float(np.percentile(finite, CLIPPED))
    levels = np.asarray(MaxNLocator(NUM_LEVELS).tick_values(low, max(high, low + 1e-6)))
    return levels, bool(finite.max() > levels[-1])


def _floats(values: Sequence[Any]) -> np.ndarray:
    """Numbers, or rows of them, as an array in which null is NaN."""
    if isinstance(values[0], list):
        return np.stack([_floats(row) for row in values])
    return np.array([math.nan if value is None else value for value in values], dtype=float)
