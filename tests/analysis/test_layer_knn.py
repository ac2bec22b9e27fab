import json
import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fdkit.analysis.layer_knn import LayerKnnConfig, analyze, draw, predict, scalars, summary, wilson_interval
from fdkit.analysis.observe import Images, Observed, observe_layers
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_timm


def images(count: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def batches(pixels: Tensor, labels: list[int] | None, sizes: int | list[int] = 8) -> list[Images]:
    if labels is None:
        return [Images(part) for part in pixels.split(sizes)]
    parts = torch.tensor(labels).split(sizes)
    return [Images(part, own) for part, own in zip(pixels.split(sizes), parts, strict=True)]


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 24, **args}).eval()


def clouds(count: int, num_classes: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Points about one centre a class, classes of unequal size."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (count,), generator=generator).clamp_min(
        torch.randint(2, (count,), generator=generator)
    )
    centres = torch.randn(num_classes, 6, generator=generator)
    return centres[labels] + spread * torch.randn(count, 6, generator=generator), labels


def by_loops(features: Tensor, labels: Tensor, k: int, temperature: float) -> list[int]:
    """The vote of one image after another, of Python numbers."""
    points, predicted = features.double().tolist(), []
    for query, one in enumerate(points):
        found = []
        for place, other in enumerate(points):
            if place != query:
                dot = sum(a * b for a, b in zip(one, other, strict=True))
                found.append((dot / (math.hypot(*one) * math.hypot(*other)), place))
        votes: dict[int, float] = {}
        for similarity, place in sorted(found, key=lambda each: (-each[0], each[1]))[:k]:
            label = int(labels[place])
            votes[label] = votes.get(label, 0) + math.exp(similarity / temperature)
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (9, 0.5), (59, 0.07)])
def test_equals_the_vote_by_loops(monkeypatch, k, temperature):
    features, labels = clouds(60, 4)
    config = LayerKnnConfig(k=k, temperature=temperature)
    expected = by_loops(features, labels, k, temperature)
    assert predict(features, labels, config).tolist() == expected
    monkeypatch.setattr("fdkit.analysis.layer_knn.BLOCK", 7)
    assert predict(features, labels, config).tolist() == expected
    assert 0.2 < (torch.tensor(expected) == labels).float().mean() < 0.98


def test_one_neighbour_equals_scikit_learn_which_leaves_each_image_out_in_turn():
    features, labels = clouds(40, 3)
    expected = []
    for query in range(40):
        others = torch.arange(40) != query
        classifier = KNeighborsClassifier(1, metric="cosine").fit(features[others], labels[others])
        expected.append(int(classifier.predict(features[query : query + 1])[0]))
    found = predict(features, labels, LayerKnnConfig(k=1))
    assert found.tolist() == expected
    assert found.tolist() != labels.tolist()  # as it would be if an image were its own neighbour


def test_weights_decide_between_one_near_and_two_far_neighbours():
    features = torch.tensor([[1.0, 0], [0.99, 0.1], [0, 1], [-0.1, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    near = predict(features, labels, LayerKnnConfig(k=3))
    assert near.tolist() == [0, 0, 1, 1]
    majority = predict(features, labels, LayerKnnConfig(k=3, temperature=1e6))
    assert majority.tolist() == [1, 1, 0, 0]


def test_ties_go_to_the_earlier_image_and_the_lower_class():
    same = torch.ones(5, 2)
    labels = torch.tensor([2, 1, 1, 2, 0])
    assert predict(same, labels, LayerKnnConfig(k=1)).tolist() == [1, 2, 2, 2, 2]
    assert predict(same, labels, LayerKnnConfig(k=2)).tolist() == [1, 1, 1, 1, 1]


def test_low_temperatures_do_not_overflow():
    features, labels = clouds(30, 3)
    assert torch.equal(
        predict(features, labels, LayerKnnConfig(k=5, temperature=1e-6)),
        predict(features, labels, LayerKnnConfig(k=1)),
    )


@pytest.mark.parametrize(("hits", "count"), [(0, 9), (4, 9), (90, 100), (9, 9)])
def test_wilson_interval_solves_its_equation(hits, count):
    low, high = wilson_interval(hits, count)
    share, z = hits / count, 1.959964
    for bound in (low, high):
        # Where the share lies z deviations off: (share - p)^2 = z^2 p (1 - p) / n
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / count, abs=1e-6)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_numbers_are_those_of_every_layer_and_leave_out_what_has_no_label():
    backbone, pixels = tiny(), images(17)
    labels = [-1, *[place % 3 for place in range(14)], -1, 0]
    config = LayerKnnConfig(k=4, pooling="cls")
    kept = torch.tensor(labels) >= 0
    truth = torch.tensor(labels)[kept]
    expected = []
    for layer in observe_layers(backbone, pixels[kept]):
        predicted = torch.tensor(by_loops(layer.prefix[:, 0], truth, 4, 0.07))
        expected.append((predicted == truth).double().mean().item())
    for sizes in ([17], [1, 8, 7, 1]):
        observed = Observed("m", backbone, batches(pixels, labels, sizes), ("a", "b", "c", "d"))
        numbers = analyze([observed], config).numbers
        (model,) = numbers["models"]
        assert json.loads(json.dumps(numbers)) == numbers
        assert model["accuracy"] == pytest.approx(expected)
        assert (model["num_images"], model["num_unlabelled"]) == (15, 2)
        assert (model["num_classes"], model["num_classes_of_data"]) == (3, 4)
        assert model["chance"] == pytest.approx(6 / 15)
        hits = [round(15 * accuracy) for accuracy in model["accuracy"]]
        assert model["interval"] == [wilson_interval(one, 15) for one in hits]
    title, rows = summary(numbers)
    assert "class token, 15 images of 3 of 4 classes" in title
    low, high = model["interval"][1]
    assert rows[2] == ["2", f"{100 * expected[1]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
    assert list(scalars(model).values()) == pytest.approx(
        [100 * expected[1], 100 * (max(expected) - expected[1])]
    )


def test_stops_after_the_images_asked_for():
    labels = [place % 2 for place in range(12)]
    observed = [Observed("m", tiny(), batches(images(12), labels, 5))]
    assert analyze(observed, LayerKnnConfig(num_images=7, k=3)).numbers["models"][0]["num_images"] == 7


def test_what_cannot_be_measured_is_refused():
    pixels = images(6)
    with pytest.raises(ConfigError, match="layer-knn needs a model"):
        analyze([], LayerKnnConfig())
    with pytest.raises(DataError, match="needs labels, and the images given to m have none"):
        analyze([Observed("m", tiny(), batches(pixels, None))], LayerKnnConfig())
    with pytest.raises(DataError, match=r"5 labelled images are too few for a vote of k 5 others \(m\)"):
        analyze([Observed("m", tiny(), batches(pixels, [0, 1, 0, 1, 0, -1]))], LayerKnnConfig(k=5))
    with pytest.raises(DataError, match="0 labelled images are too few"):
        analyze([Observed("m", tiny(), batches(pixels, [-1] * 6))], LayerKnnConfig(k=5))
    with pytest.raises(DataError, match="the 6 labelled images are all of one class"):
        analyze([Observed("m", tiny(), batches(pixels, [3] * 6))], LayerKnnConfig(k=5))
    with pytest.raises(DataError, match="the only one of its class, so that no vote can be right"):
        analyze([Observed("m", tiny(), batches(pixels, [0, 1, 2, 3, 4, 5]))], LayerKnnConfig(k=5))
    one, two = batches(pixels, [0, 1, 0, 1, 0, 1]), batches(pixels, [0, 1, 0, 1, 1, 0])
    with pytest.raises(DataError, match="a and b read images with different labels"):
        analyze([Observed("a", tiny(), one), Observed("b", tiny(), two)], LayerKnnConfig(k=5))


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_shows_every_layer_its_interval_and_chance(width):
    pixels, labels = images(9), [place % 2 for place in range(9)]
    models = [
        Observed("a", tiny(), batches(pixels, labels)),
        Observed("b", tiny(depth=3), batches(pixels, labels)),
    ]
    numbers = analyze(models, LayerKnnConfig(k=3)).numbers
    figure = draw(json.loads(json.dumps(numbers)), width)
    (axes,) = figure.axes
    assert len(axes.lines) == 3
    for line, band, model in zip(axes.lines, axes.collections, numbers["models"], strict=False):
        assert line.get_ydata().tolist() == pytest.approx([100 * one for one in model["accuracy"]])
        depth = len(model["accuracy"])
        assert line.get_xdata().tolist() == pytest.approx([(layer + 1) / depth for layer in range(depth)])
        edges = band.get_paths()[0].vertices[:, 1]
        assert {round(100 * one, 6) for pair in model["interval"] for one in pair} == {
            round(one, 6) for one in edges.tolist()
        }
    assert axes.lines[2].get_ydata()[0] == pytest.approx(100 * 5 / 9)
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b", "most frequent class"]
    bottom, top = axes.get_ylim()
    assert bottom < 100 * 5 / 9 < top
