import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fdkit.report.segmentation_figure import (
    COLOURS,
    OTHER,
    SegmentedImage,
    _painted,
    class_colours,
    segmentation_figure,
)

# Machado et al. 2009, full deficiency, on linear RGB: normal, protan, deutan.
VISIONS = np.array([
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
])  # fmt: skip


def seen(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour (D65), as this vision sees it."""
    encoded = np.array(to_rgb(colour))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = np.clip(vision @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def image(seed: int, num_classes: int = 4) -> SegmentedImage:
    random = np.random.default_rng(seed)
    truth = random.integers(0, num_classes, (6, 9))
    truth[0, 0] = 255
    return SegmentedImage(
        random.integers(0, 256, (6, 9, 3), dtype=np.uint8), truth, random.integers(0, num_classes, (6, 9))
    )


def test_rows_of_image_truth_and_prediction_with_a_legend_of_what_is_shown() -> None:
    figure = segmentation_figure(
        [image(0), image(1)], ["sky", "road", "tree", "car", "never"], "val: mIoU 41.0 %"
    )
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "prediction", "", "", ""]
    assert np.array_equal(figure.axes[3].images[0].get_array(), image(1).pixels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sky", "road", "tree", "car", "ignored"]
    assert figure.get_suptitle() == "val: mIoU 41.0 %"


def test_a_class_has_its_colour_darker_at_borders() -> None:
    mask = np.array([[0, 0, 1, 1], [0, 0, 1, 255]])
    painted = _painted(mask, {0: "#ff0000", 1: "#0000ff"})
    assert painted[0, 0].tolist() == [255, 0, 0]
    assert painted[0, 2].tolist() == [0, 0, 255]
    assert painted[1, 3].tolist() == [255, 255, 255], "what is ignored is white"
    assert 0 < painted[0, 1][0] < 255, "the last pixel before another class is darker"
    assert 0 < painted[0, 3][2] < 255, "above another class too"


def test_the_most_frequent_classes_have_the_first_colours_and_the_rarest_share_one() -> None:
    mask = np.zeros((10, 10), dtype=int)
    mask[0, :3], mask[1, 0] = 2, 1
    figure = segmentation_figure(
        [SegmentedImage(np.zeros((10, 10, 3), np.uint8), mask, mask)], ["a", "b", "c"]
    )
    faces = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    assert faces == [to_rgb(COLOURS[0]), to_rgb(COLOURS[2]), to_rgb(COLOURS[1])]
    many = class_colours(range(40))
    assert len(set(many.values())) == len(COLOURS) + 1
    assert many[39] == OTHER
    crowded = segmentation_figure(
        [image(0, 40)._replace(truth=np.arange(54).reshape(6, 9) % 40)], [str(i) for i in range(40)]
    )
    assert [text.get_text() for text in crowded.legends[0].get_texts()][-1] == "other"


def test_colours_are_told_apart_without_red_or_green_cones() -> None:
    """Differences in CIE L*a*b*, of which 2.3 is just noticed side by side; dark borders help besides."""
    for vision in VISIONS:
        places = [seen(colour, vision) for colour in COLOURS]
        distances = {
            (i, j): float(np.linalg.norm(places[i] - places[j]))
            for i, j in itertools.combinations(range(16), 2)
        }
        assert min(distances.values()) > 9
        assert min(value for (_, j), value in distances.items() if j < 8) > 18


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        segmentation_figure([], ["a", "b"])
