"""What an analysis is: one file in this folder, whose name is its name on the command line.

The file holds a Config of its own, `analyze(observed, config) -> Analysis`, `draw(numbers, width)`, so that a report
can draw a figure again from the saved numbers alone, and `summary(numbers)`: the title and the rows, header first, of a
table for people.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Analysis(NamedTuple):
    """What an analysis found."""

    numbers: dict[str, Any]
    """Plain data for JSON; "analysis" names the analysis, "models" holds one table a model."""
    figure: Callable[..., Any]
    """The matplotlib Figure that shows the numbers; takes `width` in inches, see `fdkit.analysis._figure`."""
