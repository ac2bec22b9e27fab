import subprocess
import sys

import matplotlib

from fdkit.analysis._figure import figure_bytes, in_style, new_figure, panels, save_figure


@in_style
def simple():
    figure = new_figure(3, 2)
    figure.subplots().plot([1, 2], [3, 5])
    return figure


def test_the_same_figure_gives_the_same_bytes():
    assert figure_bytes(simple()) == figure_bytes(simple())
    assert figure_bytes(simple(), "png") == figure_bytes(simple(), "png")
    assert figure_bytes(simple()) != figure_bytes(simple(), transparent=True)


def test_both_formats_are_written(tmp_path):
    paths = save_figure(simple(), tmp_path / "distance.v2")
    assert [path.name for path in paths] == ["distance.v2.svg", "distance.v2.png"]
    assert paths[0].read_bytes().startswith(b"<?xml")
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_matplotlib_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    figure_bytes(simple())
    assert dict(matplotlib.rcParams) == before


def test_panels_stand_side_by_side_only_where_they_fit():
    rows_and_columns = []
    for width in (7.2, 3.7):
        _, axes = panels(3, width=width)
        grid = axes[0].get_subplotspec().get_gridspec()
        rows_and_columns.append((grid.nrows, grid.ncols))
    assert rows_and_columns == [(1, 3), (3, 1)]


def test_importing_and_drawing_leave_pyplot_alone():
    code = (
        "import sys; import fdkit.analysis.attention_distance, fdkit.report.figures, fdkit.report.page; "
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules; "
        "from fdkit.analysis._figure import *; figure_bytes(in_style(new_figure)(2, 2), 'png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
