import numpy as np
import pytest

from fdkit.report.figures import Curve, accuracy_bars, training_curves


def rows(count: int = 30) -> list[dict[str, float]]:
    return [{"step": 10 * i, "loss": 1 / (i + 1), "explained_variance": i / count} for i in range(count)]


def test_curves_show_every_finite_value_at_its_step():
    holes = rows()
    holes[3]["loss"] = float("nan")
    del holes[4]["loss"]
    holes.append({"step": 999, "knn": 0.5})
    figure = training_curves(holes)
    loss, variance = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [
        row["step"] for i, row in enumerate(rows()) if i not in (3, 4)
    ]
    assert variance.lines[0].get_ydata().tolist() == pytest.approx([i / 30 for i in range(30)])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "explained variance"]
    assert loss.get_xlabel() == "step"


def test_a_long_curve_has_its_running_mean_at_the_end_of_each_window():
    long = rows(500)
    (axes,) = training_curves(long, curves=[Curve("loss", "loss")]).axes
    smooth = axes.lines[1]
    values = [row["loss"] for row in long]
    assert smooth.get_xdata()[7] == 10 * (9 + 7)
    assert smooth.get_ydata()[7] == pytest.approx(np.mean(values[7:17]))


def test_a_curve_without_values_is_refused():
    with pytest.raises(ValueError, match="finite 'accuracy'"):
        training_curves(rows(), curves=[Curve("accuracy", "accuracy")])


def test_bars_are_percentages_in_the_order_given():
    accuracies = {"kNN": [0.884, 0.25], "linear": [0.909, 0.5]}
    figure = accuracy_bars(["teacher", "student"], accuracies, chance=0.1)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([88.4, 25, 90.9, 50])
    assert [text.get_text() for text in axes.texts] == ["88.4", "25.0", "90.9", "50.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["teacher", "student"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kNN", "linear", "chance"]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert np.round(centres[0::2]).tolist() == [0, 0]
    assert np.round(centres[1::2]).tolist() == [1, 1]
    assert axes.yaxis_inverted()


def test_bars_need_a_number_a_model():
    with pytest.raises(ValueError, match="kNN has 1 accuracies for 2 models"):
        accuracy_bars(["a", "b"], {"kNN": [0.5]})
