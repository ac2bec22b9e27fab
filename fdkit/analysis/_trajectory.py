"""What an analysis says of a model while it was trained: its scalars at each kept checkpoint of a run.

The running stands in `fdkit.commands._trajectory`; here is what shows its numbers: {"analysis": "trajectory", "of": the
analysis followed, "models": a table a run with "name", "steps" (ascending), "scalars" ({label: a value a step}, null
where the analysis gave none), "exported" ({label: value} of what the run handed on, or null where that is its last
step), and "left_out" ({checkpoint: reason})}.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdkit.analysis._figure import WIDE, in_style, legend_columns, panels, wrapped
from fdkit.analysis._lines import colour_of, line_of, marker_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "Each dot is a checkpoint, and a line a training from its first steps on the left to its end on the right: a line "
    "that still moves at the end was not done, and a sudden bend shows when the change came. A star is what the run "
    "handed on, where that is another model than its last checkpoint."
)


def labels_of(models: Sequence[dict[str, Any]]) -> list[str]:
    """The scalars of all runs, in the order in which they first appear."""
    return list(dict.fromkeys(label for model in models for label in model["scalars"]))


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """What each scalar was at the last step at which the analysis gave it."""
    last = {
        label: next((value for value in reversed(values) if value is not None), None)
        for label, values in model["scalars"].items()
    }
    return {label: value for label, value in last.items() if value is not None}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; a row a step of a run."""
    models = numbers["models"]
    labels = labels_of(models)
    rows = [["run", "step", *labels]]
    for model in models:
        for place, step in enumerate(model["steps"]):
            values = [model["scalars"].get(label, [None] * (place + 1))[place] for label in labels]
            rows.append([model["name"], str(step), *map(_number, values)])
        if model["exported"] is not None:
            rows.append(
                [model["name"], "handed on", *(_number(model["exported"].get(label)) for label in labels)]
            )
    left_out = sum(len(model["left_out"]) for model in models)
    note = f", {left_out} checkpoint{'s' if left_out > 1 else ''} left out" if left_out else ""
    return f"{numbers['of']} along {len(models)} run{'s' if len(models) > 1 else ''}{note}", rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """A panel a scalar: its value over the steps of training, a line a run.

    numbers: see the module; width: inches.
    """
    models = numbers["models"]
    labels = labels_of(models)
    figure, axes = panels(len(labels), width=width, height=2.4)
    for place, label in zip(axes, labels, strict=True):
        for number, model in enumerate(models):
            values = model["scalars"].get(label)
            if values is None:
                continue
            shown = np.array([np.nan if value is None else value for value in values], dtype=float)
            style = line_of(number) | {"marker": marker_of(number), "markersize": 4.5, "linewidth": 1.8}
            place.plot(model["steps"], shown, label=model["name"], **style)
            star = (model["exported"] or {}).get(label)
            if star is not None:
                place.plot(
                    model["steps"][-1],
                    star,
                    "*",
                    color=colour_of(number),
                    markersize=11,
                    markeredgecolor="white",
                )
        place.set_title(wrapped(label, figure))
        place.set_xlabel("step")
        place.set_xlim(left=0)
        place.locator_params(axis="x", nbins=5, integer=True)
    if len(models) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names, width))
    return figure
