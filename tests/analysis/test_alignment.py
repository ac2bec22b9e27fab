import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fdkit.analysis._views import draw_views
from fdkit.analysis.alignment import (
    AlignmentConfig,
    alignments,
    analyze,
    draw,
    resample_weights,
    scalars,
    summary,
    uniformities,
)
from fdkit.analysis.observe import Images, Observed, observe_tokens
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_timm


def images(count: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def batches(pixels: Tensor, sizes: int | list[int] = 8) -> list[Images]:
    return [Images(part) for part in pixels.split(sizes)]


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 24, **args}).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(rows: Tensor) -> np.ndarray:
    points = rows.double().numpy()
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def uniformity_by_loops(rows: Tensor, drawn: list[int]) -> float:
    """Log of the mean over pairs of draws of two different images, one pair at a time."""
    points = unit(rows)
    values = [math.exp(-2 * ((points[i] - points[j]) ** 2).sum()) for i in drawn for j in drawn if i != j]
    return math.log(sum(values) / len(values))


def test_resamples_equal_the_definition_on_the_images_drawn():
    first, second = random(7, 5), random(7, 5, seed=1)
    weights = resample_weights(7, 6)
    drawn = [
        [image for image, times in enumerate(row) for _ in range(int(times))] for row in weights.tolist()
    ]
    assert all(len(one) == 7 for one in drawn)
    assert len({tuple(one) for one in drawn}) > 3
    for block in (2, 3, 100):
        found = uniformities(first, weights, block=block)
        assert found.tolist() == pytest.approx([uniformity_by_loops(first, one) for one in drawn], rel=1e-5)
    distances = ((unit(first) - unit(second)) ** 2).sum(1)
    expected = [np.mean([distances[image] for image in one]) for one in drawn]
    assert alignments(first, second, weights).tolist() == pytest.approx(expected, rel=1e-5)


def test_resamples_of_two_images_hold_both():
    assert torch.equal(resample_weights(2, 20), torch.ones(20, 2, dtype=torch.float64))


def test_numbers_are_of_two_views_however_the_images_come():
    backbone, pixels, config = tiny(), images(11), AlignmentConfig()
    views = [
        observe_tokens(backbone, draw_views(pixels, first=0, view=view, config=config)).patches.mean(1)
        for view in (0, 1)
    ]
    one, two = (unit(view) for view in views)
    expected_alignment = ((one - two) ** 2).sum(1).mean()
    expected_uniformity = np.mean([uniformity_by_loops(view, list(range(11))) for view in views])
    for sizes in ([11], [4, 1, 6]):
        (found,) = analyze([Observed("m", backbone, batches(pixels, sizes))], config).numbers["models"]
        assert found["alignment"] == pytest.approx(expected_alignment, rel=1e-3)
        assert found["uniformity"] == pytest.approx(expected_uniformity, rel=1e-3)
        low, high = found["alignment_interval"]
        assert low < found["alignment"] < high
        low, high = found["uniformity_interval"]
        assert low < found["uniformity"] < high
    # Squared distance of vectors that are not scaled, or the distance of different images, is another number.
    assert expected_alignment != pytest.approx((views[0] - views[1]).square().sum(1).mean().item(), rel=0.1)
    assert expected_alignment != pytest.approx(((one - np.roll(two, 1, axis=0)) ** 2).sum(1).mean(), rel=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # Independent images of known mean distance; the interval of a mean of 60 holds it in near 95 % of draws.
    weights, hits = resample_weights(60, 200), 0
    truth = 2.0  # of independent directions
    for seed in range(60):
        values = alignments(random(60, 4, seed=2 * seed), random(60, 4, seed=2 * seed + 1), weights)
        low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        hits += int(low <= truth <= high)
    assert 50 <= hits <= 60


def test_milder_views_align_better():
    backbone, pixels = tiny(), images(8)
    values = [
        analyze([Observed("m", backbone, batches(pixels))], AlignmentConfig(crop_area=area)).numbers[
            "models"
        ][0]
        for area in (0.05, 1.0)
    ]
    assert values[1]["alignment"] < values[0]["alignment"]


def test_numbers_are_plain_with_summary_and_scalars():
    models = [Observed("a", tiny(), batches(images(6))), Observed("b", tiny(depth=3), batches(images(6)))]
    numbers = analyze(models, AlignmentConfig(pooling="cls")).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    a = numbers["models"][0]
    assert (numbers["analysis"], numbers["pooling"], a["num_images"]) == ("alignment", "cls", 6)
    assert scalars(a) == {"alignment": a["alignment"], "uniformity": a["uniformity"]}
    title, rows = summary(numbers)
    assert "class token, 6 images" in title
    low, high = a["alignment_interval"]
    assert rows[1][1] == f"{a['alignment']:.3f} [{low:.3f}, {high:.3f}]"
    few = analyze(models, AlignmentConfig(num_images=4)).numbers["models"][1]
    assert few["num_images"] == 4


def test_models_and_images_are_needed():
    with pytest.raises(ConfigError, match="alignment needs a model"):
        analyze([], AlignmentConfig())
    with pytest.raises(DataError, match="1 images are too few to observe m on: 2 are needed"):
        analyze([Observed("m", tiny(), batches(images(1)))], AlignmentConfig())


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_has_a_point_a_model_at_its_numbers(width):
    models = [
        {
            "name": name,
            "num_images": 9,
            "alignment": 0.2 + place,
            "alignment_interval": [0.1 + place, 0.4 + place],
            "uniformity": -1.0 - place,
            "uniformity_interval": [-1.2 - place, -0.7 - place],
        }
        for place, name in enumerate("abcdef")
    ]
    figure = draw({"analysis": "alignment", "pooling": "patches", "models": models}, width)
    (axes,) = figure.axes
    looks = set()
    for container, model in zip(axes.containers, models, strict=True):
        point, _, (across, up) = container
        assert (*point.get_xdata(), *point.get_ydata()) == (model["uniformity"], model["alignment"])
        assert across.get_segments()[0][:, 0].tolist() == pytest.approx(model["uniformity_interval"])
        assert up.get_segments()[0][:, 1].tolist() == pytest.approx(model["alignment_interval"])
        looks.add((point.get_color(), point.get_marker()))
    assert len(looks) == 6
    assert [text.get_text() for text in figure.legends[0].texts] == list("abcdef")
