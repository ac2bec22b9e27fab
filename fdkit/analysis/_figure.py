"""How every figure looks, and how it becomes a file: one style, two widths, no global drawing state."""

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import partial, wraps
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from fdkit.data.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 7.2
"""Inches: a column of text on a desktop."""
NARROW = 3.7
"""Inches: a phone held upright. Text keeps its size, panels stand below each other."""

# Colours people with any colour vision tell apart. Source: Okabe and Ito 2008, "Color Universal Design".
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#aa5a8c", "#56b4e9"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY)
GREY = "#767676"
INK = "#222222"

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
    "font.size": 9.5,
    "axes.facecolor": "none",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.columnspacing": 1.4,
    "legend.handlelength": 1.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "path",
    "svg.hashsalt": "fdkit",  # the same figure gives the same bytes
}

P = ParamSpec("P")
R = TypeVar("R")


def in_style(draw: Callable[P, R]) -> Callable[P, R]:
    """The same function, run with the figures' style and matplotlib's own settings untouched afterwards."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure that keeps its parts from overlapping; inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(
    count: int, *, width: float, height: float = 2.7, share_y: bool = False
) -> tuple["Figure", "list[Axes]"]:
    """A figure with `count` panels in as many columns as fit the width; height: inches a row."""
    columns = max(1, min(count, int(width // 2.2)))
    rows = ceil(count / columns)
    figure = new_figure(width, height * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def columns_of(figure: "Figure") -> int:
    """How many panels stand side by side."""
    place = figure.axes[0].get_subplotspec()
    assert place is not None, "the figure was not made by `panels`"
    return int(place.get_gridspec().ncols)


def wrapped(title: str, figure: "Figure") -> str:
    """A panel's title, broken into lines that fit above the panel."""
    return textwrap.fill(title, width=round(9.5 * figure.get_figwidth() / columns_of(figure)))


def legend_columns(names: Sequence[str], width: float) -> int:
    """How many of these names fit beside each other in a legend under the figure; width: inches."""
    longest = 0.5 + 0.085 * max(map(len, names), default=0)
    return max(1, min(len(names), int(width / longest)))


_OPTIONS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 200, "metadata": {"Software": None}},
    "webp": {"dpi": 144, "pil_kwargs": {"quality": 85, "method": 1}},
}
"""Of each kind of file; nothing in them changes from one day to the next."""


@in_style
def figure_bytes(figure: "Figure", kind: str = "svg", *, transparent: bool = False) -> bytes:
    """The figure as a file's content, the same bytes each time.

    kind: "svg", "png" (200 dots an inch) or "webp" (144; it loses a little and is far smaller); transparent: without
    the white background. The figure keeps the layout that it gets here.
    """
    _show_names_as_they_are(figure)
    buffer = io.BytesIO()
    engine = figure.get_layout_engine()
    if engine is not None:
        # Once, and not by savefig, which would draw everything twice.
        engine.execute(figure)
        figure.set_layout_engine("none")
    background = "none" if transparent else "white"
    figure.savefig(buffer, format=kind, facecolor=background, **_OPTIONS[kind])
    return buffer.getvalue()


def _show_names_as_they_are(figure: "Figure") -> None:
    """Take no name for mathematics, such as a folder called a$b$, and show its control characters in words.

    Numbers at logarithmic axes are mathematics.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter, LogFormatter

    powers: set[int] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for formatter, is_minor in ((axis.get_major_formatter(), False), (axis.get_minor_formatter(), True)):
            if isinstance(formatter, FuncFormatter):  # what set_yticks(labels=...) sets
                formatter.func = partial(_shown_by, formatter.func)
            labels = axis.get_ticklabels(minor=is_minor)
            powers |= {id(label) for label in labels if isinstance(formatter, LogFormatter)}
    for text in figure.findobj(Text):
        if id(text) not in powers:
            text.set_parse_math(False)
            text.set_text(_shown(text.get_text()))


def _shown_by(label_of: Callable[..., str], value: float, place: int | None = None) -> str:
    return _shown(label_of(value, place))


def _shown(text: str) -> str:
    """The text with control characters escaped, its lines kept."""
    return "\n".join(printable(line) for line in text.split("\n"))


def save_figure(figure: "Figure", stem: Path) -> list[Path]:
    """Writes stem.svg and stem.png, and returns their paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for path in paths:
        path.write_bytes(figure_bytes(figure, path.suffix[1:]))
    return paths
