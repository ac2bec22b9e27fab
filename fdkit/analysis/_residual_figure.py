"""How the residual of a student is shown: curves over channels, maps over places, and strips of images."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdkit.analysis._figure import GREY, NARROW, new_figure
from fdkit.analysis._lines import line_of
from fdkit.analysis._pictures import image_from_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MAP_COLUMNS = 2


def percent(value: float | None) -> str:
    """Such as "93.2 %"; "-" for what has no value."""
    return "-" if value is None else f"{100 * value:.1f} %"


def draw_residual(numbers: dict[str, Any], width: float) -> "Figure":
    """The figure of `distillation_residual.draw`."""
    models = numbers["models"]
    is_wide = width > NARROW
    halves = 2 if is_wide else 1
    strips = [(model, part) for model in models for part in ("worst", "best")]
    tops = [2.7 + 0.2 * len(models), _map_height(len(models), width / halves)]
    tops = [max(tops)] if is_wide else tops
    strip_rows = math.ceil(len(strips) / halves)
    heights = [*tops, *[_strip_height(models, width / halves)] * strip_rows]
    figure = new_figure(width, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curve, maps = parts[0].subfigures(1, 2) if is_wide else parts[:2]
    _draw_channels(curve, models)
    _draw_maps(maps, models)
    places = [place for part in parts[len(tops) :] for place in part.subfigures(1, halves, squeeze=False)[0]]
    largest = _far(value for model, part in strips for entry in model[part] for value in entry["residual"])
    for place, (model, part) in zip(places, strips, strict=True):
        _draw_strip(place, model, part, largest)
    return figure


def _map_height(count: int, width: float) -> float:
    """Inches that the maps of this many students need."""
    columns = min(count, MAP_COLUMNS)
    return math.ceil(count / columns) * ((width - 1.0) / columns + 0.35) + 0.2


def _strip_height(models: Sequence[dict[str, Any]], width: float) -> float:
    """Inches that a strip of images of this width needs."""
    most = max(len(model["worst"]) for model in models)
    return 2 * (width - 0.85) / most + 0.68


def _far(rows: Iterable[Sequence[float]]) -> float:
    """A value that few exceed: single bright patches must not darken all others."""
    return float(np.percentile([value for row in rows for value in row], 99))


def _draw_channels(place: "SubFigure", models: Sequence[dict[str, Any]]) -> None:
    axes = place.subplots()
    lowest = 0.0
    for number, model in enumerate(models):
        values = sorted((100 * one for one in model["by_channel"] if one is not None), reverse=True)
        share = [100 * (rank + 0.5) / len(values) for rank in range(len(values))]
        label = textwrap.fill(f"{model['name']}: {percent(model['explained_variance'])}", width=40)
        axes.plot(share, values, linewidth=2, label=label, **line_of(number))
        lowest = min([lowest, *values])
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_ylim(max(-100, 1.05 * lowest), 100)
    axes.set_xlim(0, 100)
    axes.set_xlabel("channels, best explained first (%)")
    axes.set_ylabel("explained variance (%)")
    axes.set_title("by channel")
    place.legend(loc="outside lower center", ncols=1)


def _draw_maps(place: "SubFigure", models: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    tables = np.array([model["by_position"] for model in models], dtype=float) * 100  # None becomes NaN
    # A few places, such as the corners of some models, lie so far off that they would hide all else.
    low, high = np.nanpercentile(tables, [5, 95])
    columns = min(len(models), MAP_COLUMNS)
    axes = list(place.subplots(math.ceil(len(models) / columns), columns, squeeze=False).flat)
    for unused in axes[len(models) :]:
        unused.set_axis_off()
    for one, model, table in zip(axes, models, tables, strict=False):
        shown = one.imshow(table, cmap="cividis", vmin=low, vmax=max(high, low + 1e-6), aspect="equal")
        _bare(one)
        one.set_title("by place" if len(models) == 1 else _short(model["name"], 26 // columns))
    bar = place.colorbar(shown, ax=axes, shrink=0.8, label="explained variance (%)", extend="both")
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)


def _draw_strip(place: "SubFigure", model: dict[str, Any], part: str, largest: float) -> None:
    entries = model[part]
    place.suptitle(
        f"{_short(model['name'], 20)}: {part} explained", x=0.01, ha="left", fontsize=10.5, fontweight="bold"
    )
    axes = place.subplots(2, max(len(entries), 1), squeeze=False)
    for column, entry in enumerate(entries):
        picture, residual = axes[:, column]
        picture.imshow(image_from_text(entry["picture"]), aspect="equal")
        picture.set_title(percent(entry["explained_variance"]), fontsize=9, fontweight="normal", loc="center")
        shown = residual.imshow(entry["residual"], cmap="inferno", vmin=0, vmax=largest, aspect="equal")
        _bare(picture)
        _bare(residual)
    bar = place.colorbar(
        shown, ax=list(axes.flat), label="unexplained", fraction=0.05, shrink=0.6, extend="max"
    )
    bar.outline.set_visible(False)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _bare(axes: "Axes") -> None:
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
