import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fdkit.analysis.cka import CkaConfig, analyze, draw, scalars, summary
from fdkit.analysis.observe import Images, Observed, observe_layers
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_timm


def images(count: int, size: int = 32, seed: int = 3) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(pixels: Tensor, sizes: int | list[int] = 8, *, first: int | None = None) -> list[Images]:
    numbers = None if first is None else torch.arange(first, first + len(pixels))
    parts = pixels.split(sizes)
    if numbers is None:
        return [Images(part) for part in parts]
    return [Images(part, None, own) for part, own in zip(parts, numbers.split(sizes), strict=True)]


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 24, **args}).eval()


def hsic_by_loops(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate as sums over distinct images i, j, q, r (Song et al. 2012, theorem 5's U-statistic)."""
    k, m = (first @ first.T).tolist(), (second @ second.T).tolist()
    n = len(k)
    pairs = triples = quadruples = 0.0
    for i in range(n):
        for j in range(n):
            if j == i:
                continue
            pairs += k[i][j] * m[i][j]
            for q in range(n):
                if q in (i, j):
                    continue
                triples += k[i][j] * m[i][q]
                for r in range(n):
                    if r not in (i, j, q):
                        quadruples += k[i][j] * m[q][r]
    falling = [math.perm(n, size) for size in (2, 3, 4)]
    return pairs / falling[0] - 2 * triples / falling[1] + quadruples / falling[2]


def cka_by_loops(first: list[Tensor], second: list[Tensor]) -> float:
    """Of the minibatches of two layers: means of HSIC over minibatches, and only then their ratio."""
    sums = [0.0, 0.0, 0.0]
    for one, two in zip(first, second, strict=True):
        for place, (left, right) in enumerate([(one, two), (one, one), (two, two)]):
            sums[place] += len(one) * hsic_by_loops(left.double(), right.double())
    return sums[0] / math.sqrt(sums[1] * sums[2])


def biased(first: Tensor, second: Tensor) -> float:
    """The usual CKA of centred Gram matrices, which few images and wide layers lift."""
    first, second = (part.double() - part.double().mean(0) for part in (first, second))
    return ((first.T @ second).norm() ** 2 / ((first.T @ first).norm() * (second.T @ second).norm())).item()


def test_equals_the_sums_over_distinct_images_however_the_images_come():
    models = {"a": tiny(), "b": tiny(depth=3, embed_dim=12, img_size=48)}
    small, large = images(11), images(11, 48)
    config = CkaConfig(batch_size=6)
    expected = {}
    layers = {
        "a": [layer.patches.mean(1) for layer in observe_layers(models["a"], small)],
        "b": [layer.patches.mean(1) for layer in observe_layers(models["b"], large)],
    }
    for one, two in (("a", "a"), ("b", "a"), ("b", "b")):
        expected[one, two] = [
            [cka_by_loops(list(x.split(6)), list(y.split(6))) for y in layers[two]] for x in layers[one]
        ]
    for sizes_a, sizes_b in (([11], [11]), ([6, 5], [1, 4, 6])):
        observed = [
            Observed("a", models["a"], batches(small, sizes_a, first=0)),
            Observed("b", models["b"], batches(large, sizes_b, first=0)),
        ]
        a, b = analyze(observed, config).numbers["models"]
        for found, key in ((a["cka"], "aa"), (b["cka_with"]["a"], "ba"), (b["cka"], "bb")):
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(expected[key[0], key[1]]), rtol=1e-3, atol=1e-4
            )
        assert (a["num_images"], a["num_layers"], b["num_layers"]) == (11, 2, 3)
        assert a["cka_with"] == {}


def mapped(monkeypatch: pytest.MonkeyPatch, maps: dict[str, list[Tensor]]) -> None:
    """Models by their names, whose layers are linear maps of the pixels."""

    def features(observed: Observed, pixels: Tensor, pooling: str) -> list[Tensor]:
        return [pixels.flatten(1).double() @ one for one in maps[observed.name]]

    monkeypatch.setattr("fdkit.analysis.cka.layer_features", features)


def test_blind_to_rotation_and_scale_but_not_to_other_maps(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    stretch = torch.diag(torch.logspace(0, 3, 12, dtype=torch.float64))
    mapped(monkeypatch, {"m": [torch.eye(12, dtype=torch.float64), turn, 7 * turn, stretch]})
    numbers = analyze([Observed("m", tiny(), batches(images(40, 2)))], CkaConfig(batch_size=20)).numbers
    rows = numbers["models"][0]["cka"]
    assert rows[0][:3] == pytest.approx([1, 1, 1], abs=1e-9)
    assert rows[0][3] < 0.7
    assert rows[3][0] == pytest.approx(rows[0][3])


def test_independent_wide_layers_of_few_images_are_independent(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(320, 3, 8, 8, generator=generator)
    halves = torch.eye(192, dtype=torch.float64).split(96, dim=1)
    mapped(monkeypatch, {"m": list(halves)})
    numbers = analyze([Observed("m", tiny(), batches(pixels))], CkaConfig(batch_size=16)).numbers
    assert abs(numbers["models"][0]["cka"][0][1]) < 0.05
    first, second = (pixels[:16].flatten(1).double() @ half for half in halves)
    assert biased(first, second) > 0.8


def test_numbers_are_plain_and_symmetric_with_a_summary_of_models_and_pairs():
    pixels = images(9)
    models = [
        Observed(name, tiny(depth=depth), batches(pixels)) for name, depth in (("a", 2), ("b", 3), ("c", 2))
    ]
    numbers = analyze(models, CkaConfig(pooling="cls")).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    assert (numbers["analysis"], numbers["pooling"]) == ("cka", "cls")
    for model, depth in zip(numbers["models"], (2, 3, 2), strict=True):
        table = torch.tensor(model["cka"])
        assert table.shape == (depth, depth)
        torch.testing.assert_close(table, table.T)
        torch.testing.assert_close(table.diag(), torch.ones(depth))
    a, _, c = numbers["models"]
    assert list(c["cka_with"]) == ["a", "b"]
    assert torch.tensor(c["cka_with"]["b"]).shape == (2, 3)
    assert scalars(a) == {"CKA of first and last layer": a["cka"][0][1]}
    assert scalars(c)["CKA of the last layer with that of the first model"] == c["cka_with"]["a"][1][1]
    title, rows = summary(numbers)
    assert "class token" in title
    assert [row[0] for row in rows[1:]] == ["a", "b", "c", "b and a", "c and a", "c and b"]
    assert rows[-1][3] == f"{c['cka_with']['b'][1][2]:.3f}"


def test_a_model_compared_with_itself_is_like_itself():
    backbone, pixels = tiny(), images(8)
    observed = [Observed("a", backbone, batches(pixels)), Observed("same", backbone, batches(pixels))]
    one, two = analyze(observed, CkaConfig()).numbers["models"]
    torch.testing.assert_close(torch.tensor(two["cka_with"]["a"]), torch.tensor(one["cka"]))


def test_the_last_minibatch_counts_from_four_images():
    backbone, pixels = tiny(), images(12)
    counts = [
        analyze([Observed("m", backbone, batches(pixels[:count], 3))], CkaConfig(batch_size=8)).numbers[
            "models"
        ]
        for count in (8, 11, 12)
    ]
    assert [models[0]["num_images"] for models in counts] == [8, 8, 12]
    few = analyze([Observed("m", backbone, batches(pixels))], CkaConfig(num_images=9)).numbers["models"][0]
    assert few["num_images"] == 9


def test_a_layer_that_says_nothing_has_no_number(monkeypatch):
    mapped(monkeypatch, {"m": [torch.eye(12, dtype=torch.float64), torch.zeros(12, 3, dtype=torch.float64)]})
    analysis = analyze([Observed("m", tiny(), batches(images(8, 2)))], CkaConfig())
    (model,) = analysis.numbers["models"]
    assert model["cka"][0] == [pytest.approx(1), None]
    assert model["cka"][1] == [None, None]
    assert scalars(model) == {}
    assert summary(analysis.numbers)[1][1][1:] == ["–", "–", ""]
    assert analysis.figure().axes


def test_models_that_read_different_images_are_refused():
    a, b = tiny(), tiny()
    one = batches(images(8), [8], first=0)
    two = [Images(one[0].pixels, None, torch.tensor([0, 1, 2, 3, 5, 4, 6, 7]))]
    with pytest.raises(DataError, match="different images: a 4, b 5, where"):
        analyze([Observed("a", a, one), Observed("b", b, two)], CkaConfig())
    with pytest.raises(DataError, match="different numbers of images, in one minibatch a 8, b 6"):
        analyze([Observed("a", a, batches(images(8))), Observed("b", b, batches(images(6)))], CkaConfig())
    with pytest.raises(DataError, match="in one minibatch a 4, b 0"):
        analyze(
            [Observed("a", a, batches(images(8))), Observed("b", b, batches(images(4)))],
            CkaConfig(batch_size=4),
        )


def test_too_few_images_and_models_are_refused():
    with pytest.raises(DataError, match="3 images are too few to observe m on: 4 are needed"):
        analyze([Observed("m", tiny(), batches(images(3)))], CkaConfig())
    with pytest.raises(ValidationError, match="greater than or equal to 4"):
        CkaConfig(batch_size=3)
    with pytest.raises(ConfigError, match="cka needs a model"):
        analyze([], CkaConfig())
    with pytest.raises(ConfigError, match="the layers of VGG are not known"):
        analyze([Observed("m", build_timm("vgg11", {}), batches(images(4)))], CkaConfig())


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_shows_every_map_on_one_scale(width):
    pixels = images(9)
    models = [Observed("a", tiny(), batches(pixels)), Observed("b", tiny(depth=3), batches(pixels))]
    numbers = analyze(models, CkaConfig()).numbers
    figure = draw(json.loads(json.dumps(numbers)), width)
    maps = [axes for axes in figure.axes if axes.images]
    a, b = numbers["models"]
    for axes, table in zip(maps, (a["cka"], b["cka"], b["cka_with"]["a"]), strict=True):
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array().tolist()), torch.tensor(table))
        assert axes.images[0].get_clim() == (0, 1)
    assert maps[2].get_xlabel() == "layer of a"
    assert maps[2].get_ylabel() == "layer of b"
    assert maps[2].get_xlim() == (0.5, 2.5)
    assert maps[2].get_ylim() == (0.5, 3.5)
