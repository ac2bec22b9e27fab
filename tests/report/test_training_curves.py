from typing import Any

import numpy as np
import pytest

from fdkit.analysis._figure import NARROW, figure_bytes
from fdkit.report.training_curves import training_figure
from fdkit.training.health import SPIKE_HISTORY


def logged(count: int = 40, per_epoch: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "step": 10 * i,
            "epoch": 10 * i / per_epoch,
            "loss": 1 / i,
            "grad_norm_max": 2.0,
            "first_layer_grad_norm_max": 0.1,
        }
        for i in range(1, count + 1)
    ]


def found(step: int, **values: float) -> dict[str, Any]:
    return {"step": step} | {f"monitor/{name}": value for name, value in values.items()}


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def rings(axes: Any) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_linestyle() == "None"]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_everything_stands_over_the_epochs() -> None:
    rows = [found(0, knn_top1=0.1), *logged(), found(400, channel_std_ratio=0.9, effective_rank=41.0)]
    figure = training_figure(rows)
    assert titles(figure) == [
        "loss",
        "largest gradient norm",
        "kNN accuracy (%)",
        "spread of features (0: collapse)",
        "effective rank (1: collapse)",
    ]
    loss, gradient, accuracy, spread, rank = figure.axes
    assert loss.lines[0].get_xdata() == pytest.approx([i / 2 for i in range(1, 41)])
    assert loss.lines[0].get_ydata() == pytest.approx([1 / i for i in range(1, 41)])
    assert gradient.get_yscale() == "log"
    assert [text.get_text() for text in gradient.get_legend().get_texts()] == ["all layers", "first layer"]
    assert (accuracy.lines[0].get_xdata()[0], accuracy.lines[0].get_ydata()[0]) == (0, 10)
    assert accuracy.get_legend() is None
    assert (spread.lines[0].get_xdata()[0], spread.lines[0].get_ydata()[0]) == (20, 0.9)
    assert rank.lines[0].get_ydata()[0] == 41
    assert figure.axes[-1].get_xlabel() == "epoch"


def test_panels_share_their_epochs() -> None:
    figure = training_figure([*logged(), found(800, knn_top1=0.4)])
    limits = [axes.get_xlim() for axes in figure.axes]
    assert limits == [limits[0]] * 3
    assert limits[0][1] >= 40


def test_only_what_was_measured_has_a_panel() -> None:
    rows = [{"step": 10, "epoch": 1.0, "loss": 2.0}, {"step": 20, "epoch": 2.0, "loss": None}]
    figure = training_figure(rows)
    assert titles(figure) == ["loss"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1.0]


def test_spikes_are_marked_on_the_first_layer() -> None:
    rows = logged()
    rows[29]["first_layer_grad_norm_max"] = 4.0
    rows[35]["grad_norm_max"] = 90.0
    assert rings(training_figure(rows).axes[1]) == [(15.0, 4.0)]
    for row in rows:
        del row["first_layer_grad_norm_max"]
    assert rings(training_figure(rows).axes[1]) == [(18.0, 90.0)]


def test_dips_are_marked_where_they_last() -> None:
    accuracies = {100: 0.3, 200: 0.5, 300: 0.44, 340: 0.42, 400: 0.48}
    rows = [*logged(), *(found(step, knn_top1=value) for step, value in accuracies.items())]
    marked = rings(training_figure(rows).axes[2])
    assert np.array(marked) == pytest.approx(np.array([(15.0, 44.0), (17.0, 42.0)]))


def test_it_fits_a_phone_and_comes_out_the_same(tmp_path: Any) -> None:
    rows = [*logged(SPIKE_HISTORY + 30), found(400, knn_top1=0.2)]
    rows[60]["first_layer_grad_norm_max"] = 4.0
    figure = training_figure(rows, NARROW)
    assert figure_bytes(figure) == figure_bytes(training_figure(rows, NARROW))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for part in [axes.title, axes._left_title, *([axes.get_legend()] if axes.get_legend() else [])]:
            box = part.get_window_extent()
            assert box.x1 <= figure.bbox.x1
        legend = axes.get_legend()
        if legend is not None:
            assert not legend.get_window_extent().overlaps(axes._left_title.get_window_extent())


@pytest.mark.parametrize("rows", [[], [{"step": 0, "monitor/knn_top1": 0.1}], [{"step": 3, "epoch": 1.0}]])
def test_a_run_without_a_loss_has_no_figure(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no row of metrics has a step, its epoch and a finite loss"):
        training_figure(rows)


def test_a_gradient_of_zero_leaves_the_others_to_be_drawn() -> None:
    rows = logged()
    for row in rows:
        row["first_layer_grad_norm_max"] = 0.0
    assert figure_bytes(training_figure(rows), "png")
