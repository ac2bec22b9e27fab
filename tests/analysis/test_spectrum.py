import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from fdkit.analysis._features import final_features, layer_features
from fdkit.analysis._moments import Moments
from fdkit.analysis._views import ViewConfig, draw_views
from fdkit.analysis.observe import Images, Observed, observe_layers, observe_tokens
from fdkit.analysis.spectrum import (
    Scatter,
    SpectrumConfig,
    analyze,
    draw,
    effective_rank,
    explained_variance,
    lidar,
    participation_ratio,
    rankme,
    scalars,
    summary,
)
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models import representation
from fdkit.models.libraries import build_timm


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Features of unequal spread along unequal directions, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(count, width, generator=generator) @ mixing + 5


def moments_of(features: Tensor, sizes: list[int] | None = None) -> Moments:
    moments = Moments(features.shape[1])
    for part in features.split(sizes or [len(features)]):
        moments.add(part)
    return moments


@pytest.mark.parametrize("sizes", [[40], [1, 3, 36], [13, 13, 14]])
def test_moments_are_those_of_all_rows_however_they_come(sizes):
    features = rows(40, 7) + 1e6  # a mean that would cancel in the mean of squares
    moments = moments_of(features, sizes)
    exact = features.double()
    torch.testing.assert_close(moments.covariance(), exact.T.cov(correction=0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(moments.second_moment(), exact.T @ exact / 40, rtol=1e-12, atol=0)
    assert moments.count == 40


@pytest.mark.parametrize("count", [50, 7])
def test_spectrum_and_ranks_equal_the_singular_values_of_the_features(count):
    features = rows(count, 12)
    moments = moments_of(features)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    sigma = np.linalg.svd(centred, compute_uv=False)[: min(count - 1, 12)]
    shares = explained_variance(moments.covariance(), count)
    np.testing.assert_allclose(shares.numpy(), sigma**2 / (sigma**2).sum(), rtol=1e-6, atol=1e-12)
    p = sigma / sigma.sum()
    assert effective_rank(shares) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert participation_ratio(shares) == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum(), rel=1e-6)
    # Entropy of variances in place of singular values, or features that are not centred, would be another number.
    wrong = sigma**2 / (sigma**2).sum()
    assert effective_rank(shares) != pytest.approx(math.exp(-(wrong * np.log(wrong)).sum()), rel=0.05)


@pytest.mark.parametrize("count", [50, 7])
def test_rankme_is_that_of_the_features_as_they_are(count):
    features = rows(count, 12)
    sigma = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    found = rankme(moments_of(features).second_moment(), count)
    assert found == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert found == pytest.approx(representation.effective_rank(features).item(), rel=1e-4)
    assert found != pytest.approx(rankme(moments_of(features).covariance(), count), rel=0.05)  # centred


def test_ranks_by_hand():
    equal = torch.eye(4, dtype=torch.float64) / 4
    shares = explained_variance(equal, 100)
    assert shares.tolist() == pytest.approx([0.25] * 4)
    assert (effective_rank(shares), participation_ratio(shares)) == (pytest.approx(4), pytest.approx(4))
    # Variances 9 and 1: singular values as 3 to 1, shares 3/4 and 1/4; 100 / 82 for the participation ratio
    shares = explained_variance(torch.diag(torch.tensor([1.0, 9, 0], dtype=torch.float64)), 100)
    assert shares.tolist() == pytest.approx([0.9, 0.1, 0])
    assert effective_rank(shares) == pytest.approx(4 / 3**0.75)
    assert participation_ratio(shares) == pytest.approx(100 / 82)
    collapsed = explained_variance(torch.zeros(3, 3, dtype=torch.float64), 100)
    assert (effective_rank(collapsed), participation_ratio(collapsed)) == (1, 1)


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_ranks_are_bounded_and_blind_to_rotation_and_scale(scale, seed):
    features = rows(9, 5, seed).double()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.manual_seed(seed))).Q
    for other in (features @ turn, scale * features):
        one, two = (explained_variance(moments_of(each).covariance(), 9) for each in (features, other))
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
        assert 1 <= participation_ratio(two) <= effective_rank(two) <= 5 + 1e-9


def lidar_by_loops(features: Tensor, delta: float) -> float:
    """The definition: (n, q, d), one image and one view at a time, with the root of W."""
    points = features.double().numpy()
    count, num_views, width = points.shape
    means = points.mean(1)
    between, within = np.zeros((width, width)), np.zeros((width, width))
    for image in range(count):
        gap = means[image] - means.mean(0)
        between += np.outer(gap, gap) / count
        for view in range(num_views):
            gap = points[image, view] - means[image]
            within += np.outer(gap, gap) / (count * num_views)
    values, vectors = np.linalg.eigh(within + delta * np.eye(width))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("delta", [1e-4, 0.3])
def test_lidar_equals_its_definition(delta):
    means, noise = rows(11, 6), rows(11 * 3, 6, seed=1).reshape(11, 3, 6)
    features = means[:, None] + 0.3 * noise
    scatter = Scatter(6)
    for part in features.split([4, 1, 6]):
        scatter.add(part)
    found = lidar(scatter.images.covariance(), scatter.within(), delta=delta)
    assert found == pytest.approx(lidar_by_loops(features, delta), rel=1e-6)
    swapped = lidar(scatter.within(), scatter.images.covariance(), delta=delta)
    assert found != pytest.approx(swapped, rel=0.01)


def test_lidar_discounts_directions_in_which_views_differ_as_images_do():
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(400, 4)
    means[:, :2] = torch.randn(400, 2, generator=generator)  # two directions tell images apart
    features = means[:, None] + 0.01 * torch.randn(400, 8, 4, generator=generator)
    features[..., 2:] += torch.randn(400, 8, 2, generator=generator)  # two are noise of views
    scatter = Scatter(4)
    scatter.add(features)
    assert lidar(scatter.images.covariance(), scatter.within()) == pytest.approx(2, abs=0.1)
    shares = explained_variance(moments_of(features[:, 0]).covariance(), 400)
    assert effective_rank(shares) > 3.9


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 24, **args}).eval()


def batches(images: Tensor, sizes: int | list[int] = 8) -> list[Images]:
    return [Images(part) for part in images.split(sizes)]


def images(count: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def test_views_are_a_function_of_seed_image_and_view_and_leave_generators_alone():
    pixels, config = images(5), ViewConfig()
    before = torch.get_rng_state()
    whole = draw_views(pixels, first=0, view=1, config=config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    parts = [draw_views(pixels[:2], first=0, view=1, config=config)]
    parts.append(draw_views(pixels[2:], first=2, view=1, config=config))
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == pixels.shape
    assert 0 <= whole.min() < whole.max() <= 1
    for other in (
        draw_views(pixels, first=0, view=2, config=config),
        draw_views(pixels, first=1, view=1, config=config),
        draw_views(pixels, first=0, view=1, config=ViewConfig(view_seed=1)),
    ):
        assert all(not torch.equal(one, two) for one, two in zip(whole, other, strict=True))


def test_views_of_another_size_show_the_same_part():
    small = torch.nn.functional.interpolate(images(6, 8), size=64, mode="bicubic").clamp(0, 1)
    large = torch.nn.functional.interpolate(small, size=192, mode="bilinear")
    config = ViewConfig()
    one = draw_views(small, first=0, view=0, config=config)
    two = torch.nn.functional.interpolate(
        draw_views(large, first=0, view=0, config=config), size=64, mode="area"
    )
    assert (one - two).abs().mean() < 0.02
    assert (one - draw_views(small, first=0, view=1, config=config)).abs().mean() > 0.1


def test_crops_of_all_of_the_image_change_colours_or_mirror_alone():
    grey = torch.full((8, 3, 32, 32), 0.5)
    views = draw_views(grey, first=0, view=0, config=ViewConfig(crop_area=1))
    assert views.amax((1, 2, 3)).tolist() == pytest.approx(views.amin((1, 2, 3)).tolist(), abs=1e-5)
    assert len({round(value, 3) for value in views[:, 0, 0, 0].tolist()}) > 3


@pytest.mark.parametrize("pooling", ["patches", "cls"])
def test_features_are_those_the_model_gives(pooling):
    backbone, pixels = tiny(), images(3)
    observed = Observed("m", backbone, [])
    tokens = observe_tokens(backbone, pixels)
    expected = tokens.patches.mean(1) if pooling == "patches" else tokens.prefix[:, 0]
    torch.testing.assert_close(final_features(observed, pixels, pooling), expected)
    for found, layer in zip(
        layer_features(observed, pixels, pooling), observe_layers(backbone, pixels), strict=True
    ):
        expected = layer.patches.mean(1) if pooling == "patches" else layer.prefix[:, 0]
        torch.testing.assert_close(found, expected)


def test_numbers_are_those_of_all_features_however_they_are_batched():
    backbone, pixels = tiny(), images(30)
    features = observe_tokens(backbone, pixels).patches.mean(1)
    config = SpectrumConfig(num_views=3, view_images=5)
    found = [
        analyze([Observed("m", backbone, batches(pixels, sizes))], config).numbers["models"][0]
        for sizes in ([30], [4, 4, 22])
    ]
    one, two = found
    sigma = torch.linalg.svdvals(features.double() - features.double().mean(0)).square()
    assert one["explained_variance"] == pytest.approx((sigma / sigma.sum()).tolist(), rel=1e-4, abs=1e-8)
    assert one["variance"] == pytest.approx(features.var(0, correction=0).sum().item(), rel=1e-4)
    assert one["rankme"] == pytest.approx(representation.effective_rank(features).item(), rel=1e-3)
    config_views = [draw_views(pixels[:5], first=0, view=view, config=config) for view in range(3)]
    views = torch.stack([observe_tokens(backbone, view).patches.mean(1) for view in config_views], dim=1)
    assert one["lidar"] == pytest.approx(lidar_by_loops(views, 1e-4), rel=1e-3)
    assert (one["lidar_images"], one["lidar_views"]) == (5, 3)
    for key in ("effective_rank", "participation_ratio", "rankme", "lidar"):
        assert one[key] == pytest.approx(two[key], rel=1e-3)


def test_numbers_are_plain_and_say_where_images_bound_the_ranks():
    models = [
        Observed("few", tiny(), batches(images(9))),
        Observed("many", tiny(embed_dim=6, num_heads=2), batches(images(9))),
    ]
    analysis = analyze(models, SpectrumConfig(num_views=0, pooling="cls"))
    numbers = analysis.numbers
    assert json.loads(json.dumps(numbers)) == numbers
    few, many = numbers["models"]
    assert (few["num_images"], few["width"], few["rank_bound"]) == (9, 24, 8)
    assert (few["is_bounded_by_images"], many["is_bounded_by_images"]) == (True, False)
    assert (few["lidar"], few["lidar_images"]) == (None, 0)
    title, table = summary(numbers)
    assert "class token" in title
    assert "too few images, which bound the ranks of few 8" in title
    assert table[1][:3] == ["few", "9", "24"]
    assert table[1][-1] == "–"
    assert table[2][3] == f"{many['effective_rank']:.1f} of 6"
    assert set(scalars(few)) == {"effective rank", "participation ratio", "RankMe"}


def test_stops_after_the_images_asked_for():
    backbone, pixels = tiny(), images(12)
    config = SpectrumConfig(num_images=7, num_views=0)
    few = analyze([Observed("m", backbone, batches(pixels, 5))], config).numbers["models"][0]
    same = analyze([Observed("m", backbone, batches(pixels[:7]))], config).numbers["models"][0]
    assert few["num_images"] == 7
    assert few["effective_rank"] == pytest.approx(same["effective_rank"], rel=1e-4)


def test_the_model_is_left_as_it_was_found():
    backbone = tiny().train()
    state = torch.get_rng_state()
    analyze([Observed("m", backbone, batches(images(4)))], SpectrumConfig(num_views=2))
    assert all(module.training for module in backbone.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="spectrum needs a model"):
        analyze([], SpectrumConfig())
    with pytest.raises(DataError, match="1 images are too few to observe m on: 2 are needed"):
        analyze([Observed("m", tiny(), batches(images(1)))], SpectrumConfig())
    with pytest.raises(ConfigError, match="two models are called m"):
        analyze([Observed("m", tiny(), []), Observed("m", tiny(), [])], SpectrumConfig())
    gap = build_timm("resnet18", {})
    with pytest.raises(ConfigError, match="gap: pooling cls: this model has no class token"):
        analyze([Observed("gap", gap, batches(images(2)))], SpectrumConfig(pooling="cls"))
    with pytest.raises(ValidationError, match="give 2 or more, or 0"):
        SpectrumConfig(num_views=1)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_features_that_are_equal_but_for_rounding_fill_no_direction(monkeypatch, noise):
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(24, generator=generator)

    def features(observed: Observed, pixels: Tensor, pooling: str) -> Tensor:
        return constant * (1 + noise * torch.randn(len(pixels), 24, generator=generator))

    monkeypatch.setattr("fdkit.analysis.spectrum.final_features", features)
    analysis = analyze([Observed("m", tiny(), batches(images(40)))], SpectrumConfig(num_views=2))
    (model,) = analysis.numbers["models"]
    assert (model["variance"], set(model["explained_variance"])) == (0, {0})
    assert (model["effective_rank"], model["participation_ratio"]) == (1, 1)
    assert (model["rankme"], model["lidar"]) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))
    assert analysis.figure().axes


def test_features_that_are_not_finite_are_refused():
    backbone = tiny()
    norm = backbone.network.norm
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():
        norm.weight[0] = torch.inf
    with pytest.raises(NumericsError, match="the final features of m are not finite"):
        analyze([Observed("m", backbone, batches(images(3)))], SpectrumConfig())


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_shows_the_numbers(width):
    models = [
        Observed("few", tiny(), batches(images(9))),
        Observed("many", tiny(embed_dim=6, num_heads=2), batches(images(9))),
    ]
    numbers = analyze(models, SpectrumConfig(num_views=2)).numbers
    figure = draw(json.loads(json.dumps(numbers)), width)
    shares, cumulated = figure.axes
    for number, model in enumerate(numbers["models"]):
        expected = [100 * share for share in model["explained_variance"] if share > 0]
        assert list(shares.lines[number].get_ydata()) == pytest.approx(expected)
        assert cumulated.lines[number].get_ydata()[-1] == pytest.approx(100)
        assert list(cumulated.lines[number].get_xdata()) == list(range(1, model["rank_bound"] + 1))
    assert shares.get_yscale() == "log"
    texts = [text.get_text() for part in figure.subfigs for text in part.texts]
    assert f"{numbers['models'][0]['lidar']:.1f} of 8" in texts
    assert {"few", "many", "RankMe", "LiDAR"} <= set(texts)
