"""One figure of how a run went: loss, gradients and what monitors found, over the epochs."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from fdkit.analysis._figure import BLUE, GREEN, GREY, ORANGE, PURPLE, WIDE, in_style, new_figure
from fdkit.training.health import GRADIENTS, Dips, Spikes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 1.75
"""Inches a panel."""
FIRST_LAYER, WHOLE = GRADIENTS


class Points(NamedTuple):
    """One quantity of a run."""

    epochs: list[float]
    steps: list[int]
    values: list[float]


@in_style
def training_figure(rows: Sequence[Mapping[str, Any]], width: float = WIDE) -> "Figure":
    """Panels below each other that share the epochs: loss, explained variance, gradient norm, kNN accuracy, spread and
    rank of features.

    rows: the lines of metrics.jsonl, in order; a quantity that no line holds has no panel, a value that is missing or
    not finite no point. Rings mark the gradient spikes and the kNN dips that the health of a run tells of.
    Raises ValueError without a line that holds a step, its epoch and a loss.
    """
    per_epoch = next((row["step"] / row["epoch"] for row in rows if row.get("epoch")), None)
    if per_epoch is None or not _points(rows, "loss", per_epoch).values:
        raise ValueError("no row of metrics has a step, its epoch and a finite loss")

    def points(key: str) -> Points:
        return _points(rows, key, per_epoch)

    panels: list[tuple[str, Callable[[Axes], None]]] = [("loss", lambda axes: _line(axes, points("loss")))]
    explained = points("explained_variance")
    if explained.values:
        panels.append(("explained variance of the targets (%)", lambda axes: _explained(axes, explained)))
    gradients = {key: points(key) for key in (WHOLE, FIRST_LAYER) if points(key).values}
    if gradients:
        panels.append(("largest gradient norm", lambda axes: _gradients(axes, gradients)))
    if points("monitor/knn_top1").values:
        panels.append(("kNN accuracy (%)", lambda axes: _accuracy(axes, points("monitor/knn_top1"))))
    spread, rank = points("monitor/channel_std_ratio"), points("monitor/effective_rank")
    if spread.values:
        panels.append(("spread of features (0: collapse)", lambda axes: _spread(axes, spread)))
    if rank.values:
        panels.append(("effective rank (1: collapse)", lambda axes: _rank(axes, rank)))
    return _stacked(panels, width)


def _stacked(panels: "Sequence[tuple[str, Callable[[Axes], None]]]", width: float) -> "Figure":
    figure = new_figure(width, HEIGHT * len(panels) + 0.3)
    places = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, draw) in zip(places, panels, strict=True):
        draw(axes)
        axes.set_title(title, pad=20 if _legend(axes) else 6)
        axes.margins(x=0.02)
    places[-1].set_xlabel("epoch")
    figure.align_ylabels()
    return figure


def _line(axes: "Axes", points: Points, *, color: str = BLUE, label: str | None = None) -> None:
    marker = "o" if len(points.values) < 30 else None
    axes.plot(
        points.epochs, points.values, color=color, linewidth=1.6, marker=marker, markersize=3, label=label
    )


def _explained(axes: "Axes", points: Points) -> None:
    """From 0 %, what a constant reaches, even if the first steps lie far below."""
    _line(axes, points._replace(values=[100 * value for value in points.values]))
    lowest, highest = min(points.values), max(points.values)
    if lowest < 0 < highest:
        axes.set_ylim(bottom=max(100 * lowest, -20 * highest))


def _gradients(axes: "Axes", gradients: Mapping[str, Points]) -> None:
    """Both norms on a log scale, with the spikes of the one that warnings are about."""
    for key, color, label in ((WHOLE, GREY, "all layers"), (FIRST_LAYER, BLUE, "first layer")):
        if key in gradients:
            _line(axes, gradients[key], color=color, label=label)
    watched = gradients.get(FIRST_LAYER) or gradients[WHOLE]
    spikes = Spikes()
    _rings(axes, watched, [spikes.add(value) is not None for value in watched.values], "spike")
    axes.set_yscale("log")


def _accuracy(axes: "Axes", points: Points) -> None:
    dips = Dips()
    is_dip = [dips.add(step, value) for step, value in zip(points.steps, points.values, strict=True)]
    percentages = points._replace(values=[100 * value for value in points.values])
    _line(axes, percentages, color=GREEN, label="kNN")
    _rings(axes, percentages, is_dip, "dip")


def _spread(axes: "Axes", points: Points) -> None:
    _line(axes, points, color=PURPLE)
    axes.set_ylim(0, max(1.0, *points.values) * 1.05)


def _rank(axes: "Axes", points: Points) -> None:
    _line(axes, points, color=PURPLE)
    axes.set_ylim(0, max(points.values) * 1.1)


def _rings(axes: "Axes", points: Points, chosen: Sequence[bool], label: str) -> None:
    places = [place for place, is_chosen in enumerate(chosen) if is_chosen]
    if not places:
        return
    axes.plot(
        [points.epochs[place] for place in places],
        [points.values[place] for place in places],
        linestyle="none",
        marker="o",
        markersize=7,
        markerfacecolor="none",
        markeredgecolor=ORANGE,
        markeredgewidth=1.6,
        label=label,
    )


def _legend(axes: "Axes") -> bool:
    """Name the curves between title and panel, if there are several; whether that was so."""
    is_needed = len(axes.get_legend_handles_labels()[1]) > 1
    if is_needed:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, borderpad=0)
    return is_needed


def _points(rows: Sequence[Mapping[str, Any]], key: str, per_epoch: float) -> Points:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None and isfinite(row[key])]
    steps, values = [step for step, _ in found], [value for _, value in found]
    return Points([step / per_epoch for step in steps], steps, values)
