"""What an analysis is: one file in this folder, whose name is its name on the command line.

The file holds a Config of its own and

- `analyze(observed, config) -> Analysis`;
- `draw(numbers, width)`: the figure, from the saved numbers alone, so that a report can draw it again;
- `summary(numbers)`: the title and the rows, header first, of a table for people;
- `scalars(model)`: of one model's table of numbers, the few that say it shortly, name with unit -> value, by which
  models are compared and a run is followed along its checkpoints; {} where a picture alone says it;
- `READING`: one sentence that says how to read the figure;
- `KEEPS_COLOURS = True` where the figure holds photos or colour maps, which a dark page must not turn around;
- `NEEDS_HEAD = True` where the model's own classifier is read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Analysis(NamedTuple):
    """What an analysis found."""

    numbers: dict[str, Any]
    """Plain data for JSON; "analysis" names the analysis, "models" holds one table a model, each with its "name"."""
    figure: Callable[..., Any]
    """The matplotlib Figure that shows the numbers; takes `width` in inches, see `fdkit.analysis._figure`."""
