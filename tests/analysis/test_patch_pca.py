import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from fdkit.analysis._pictures import exact_to_text, image_from_text
from fdkit.analysis.observe import Images, Observed, observe_layers, observe_tokens
from fdkit.analysis.patch_pca import (
    BACKGROUND,
    GAP,
    TILE,
    PatchPcaConfig,
    analyze,
    colours,
    draw,
    principal_components,
    scalars,
    summary,
)
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.libraries import build_timm


def tiny(name="vit_tiny_patch16_224", **args):
    return build_timm(name, {"depth": 2, "img_size": 64, "embed_dim": 24, **args}).eval()


def batches(images: Tensor, sizes: int | list[int] = 4) -> list[Images]:
    return [Images(part) for part in images.split(sizes)]


def by_sklearn(rows: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, directions and shares; the largest entry of a direction is positive."""
    exact = rows.double().numpy()
    pca = PCA(n_components=3, svd_solver="full").fit(exact)
    largest = np.abs(pca.components_).argmax(1)
    directions = pca.components_ * np.sign(pca.components_[range(3), largest])[:, None]
    return (exact - exact.mean(0)) @ directions.T, directions, pca.explained_variance_ratio_


def test_components_are_those_of_scikit_learn():
    # Uncentred components, or a share of three components instead of all, would differ.
    rows = torch.randn(50, 6) * torch.tensor([3, 1, 0.5, 4, 2, 0.1]) + 10
    scores, directions, shares = by_sklearn(rows)
    found = principal_components(rows)
    np.testing.assert_allclose(found.directions, directions, atol=1e-9)
    np.testing.assert_allclose(found.explained_variance, shares, rtol=1e-9)
    np.testing.assert_allclose(found.scores(rows), scores, atol=1e-9)
    assert found.explained_variance == sorted(found.explained_variance, reverse=True)
    assert sum(found.explained_variance) < 1


def test_colours_spread_from_the_first_to_the_99th_percentile():
    patches = torch.randn(2, 3, 5, 4) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    scores, _, shares = by_sklearn(patches.flatten(0, 2))
    low, high = np.quantile(scores, [0.01, 0.99], axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1).reshape(2, 3, 5, 3)
    found = colours(patches, foreground=False)
    np.testing.assert_allclose(found.pictures, 255 * expected, atol=0.51)
    assert found.pictures.min() == 0
    assert found.pictures.max() == 255
    assert found.components.explained_variance == pytest.approx(list(shares))


@given(seed=st.integers(0, 50), shift=st.floats(-100, 100))
def test_colours_follow_their_patches_and_no_shift(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 3, 5, 4, generator=generator).double() * torch.tensor([4, 2, 1, 0.5])
    found = colours(patches, foreground=False).pictures.astype(int)
    turned = colours(patches.flip(0, 2) + shift, foreground=False).pictures.astype(int)
    assert np.abs(turned[::-1, :, ::-1] - found).max() <= 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_stands_in_the_middle_whichever_sign_it_has(sign):
    # A fixed sign would take the background for one of the two.
    is_middle = torch.zeros(2, 5, 6, dtype=torch.bool)
    is_middle[:, 1:4, 2:5] = True
    is_middle[0, 3, 4] = False
    patches = 0.1 * torch.randn(2, 5, 6, 4)
    patches[..., 0] += sign * 5.0 * is_middle
    found = colours(patches, foreground=True)
    assert torch.equal(found.is_foreground, is_middle)
    assert (found.pictures[~is_middle.numpy()] == BACKGROUND).all()
    _, _, shares = by_sklearn(patches[is_middle])
    assert found.components.explained_variance == pytest.approx(list(shares))
    own = patches[is_middle]
    scores, *_ = by_sklearn(own)
    low, high = np.quantile(scores, [0.01, 0.99], axis=0)
    expected = 255 * np.clip((scores - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found.pictures[is_middle.numpy()], expected, atol=0.51)


@pytest.mark.parametrize("layer", [None, 0, -1])
def test_pictures_show_the_tokens_asked_for(layer):
    model, images = tiny(reg_tokens=2), torch.rand(3, 3, 64, 64)
    observed = [Observed("m", model, batches(images, [2, 1]), (), lambda index: f"<{index}>")]
    numbers = analyze(observed, PatchPcaConfig(layer=layer, num_images=3)).numbers
    tokens = observe_tokens(model, images) if layer is None else observe_layers(model, images)[layer]
    expected = colours(tokens.patches.unflatten(1, (4, 4)), foreground=False)
    found = numbers["models"][0]
    for text, picture in zip(found["pictures"], expected.pictures, strict=True):
        assert np.abs(image_from_text(text).astype(int) - picture).max() <= 1
    assert found["explained_variance"] == pytest.approx(expected.components.explained_variance, rel=1e-4)
    assert (found["grid"], found["num_images"], found["foreground_share"]) == ([4, 4], 3, None)
    assert [one["description"] for one in numbers["images"]] == ["<0>", "<1>", "<2>"]
    assert image_from_text(numbers["images"][0]["picture"]).shape == (64, 64, 3)


def test_pictures_of_patches_keep_every_pixel():
    picture = torch.randint(256, (3, 5, 3), dtype=torch.uint8).numpy()
    assert np.array_equal(image_from_text(exact_to_text(picture)), picture)


def two_models(**fields) -> dict:
    images = torch.rand(5, 3, 64, 64)
    observed = [
        Observed("small_model", tiny(), batches(images)),
        Observed("b", tiny(patch_size=8), batches(images)),
    ]
    return analyze(observed, PatchPcaConfig(num_images=3, **fields)).numbers


def test_numbers_are_plain_and_the_figure_shows_them():
    numbers = two_models()
    assert json.loads(json.dumps(numbers)) == numbers
    figure = draw(numbers)
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    first = numbers["models"][0]
    share = f"{100 * sum(first['explained_variance']):.0f} %"
    assert labels[:2] == ["image", f"small_model\n{share}"]
    canvas = np.asarray(axes.images[0].get_array())
    for column, model in enumerate(numbers["models"], start=1):
        rows, columns = model["grid"]
        for row, text in enumerate(model["pictures"]):
            top, left = row * (TILE + GAP), column * (TILE + GAP)
            tile = canvas[top : top + TILE, left : left + TILE]
            middle = TILE // rows // 2, TILE // columns // 2
            shown = tile[middle[0] :: TILE // rows, middle[1] :: TILE // columns][:rows, :columns]
            assert np.array_equal(shown, image_from_text(text))
    title, table = summary(numbers)
    assert "final patch tokens" in title
    assert [row[:2] for row in table[1:]] == [["small_model", "4x4"], ["b", "8x8"]]
    assert scalars(first) == {}


def test_columns_that_do_not_fit_stand_below_and_few_stand_beside():
    numbers = two_models()
    four = numbers | {"models": numbers["models"] * 2}
    narrow = draw(four, width=3.7)
    assert [len(axes.get_xticks()) for axes in narrow.axes] == [3, 3]
    assert narrow.axes[0].get_position().y0 > narrow.axes[1].get_position().y0
    alone = draw(numbers | {"models": numbers["models"][:1]})
    assert [label.get_text() for label in alone.axes[0].get_xticklabels()][::2] == ["image", "image"]
    canvas = np.asarray(alone.axes[0].images[0].get_array())
    assert canvas.shape == (2 * TILE + GAP, 4 * TILE + 3 * GAP, 3)
    assert (canvas[TILE + GAP :, 2 * (TILE + GAP) :] == 255).all()  # three images leave a fourth place empty


def test_the_share_of_the_foreground_stands_in_the_numbers():
    numbers = two_models(foreground=True)
    for model in numbers["models"]:
        shown = [image_from_text(text) for text in model["pictures"]]
        is_background = np.stack([(picture == BACKGROUND).all(-1) for picture in shown])
        assert model["foreground_share"] == pytest.approx(1 - is_background.mean())
        assert 0 < model["foreground_share"] < 1
    assert "foreground" in summary(numbers)[0]


def test_bad_input_is_refused():
    images = torch.rand(4, 3, 64, 64)
    with pytest.raises(ConfigError, match="patch-pca needs a model"):
        analyze([], PatchPcaConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([Observed("m", tiny(), [])], PatchPcaConfig())
    with pytest.raises(ConfigError, match="layer 2: VisionTransformer has 2 layers"):
        analyze([Observed("m", tiny(), batches(images))], PatchPcaConfig(layer=2))
    single = Observed("m", tiny(patch_size=64), batches(images[:1]))
    with pytest.raises(ConfigError, match="m: 1 patches of 24 channels have no 3 principal components"):
        analyze([single], PatchPcaConfig())
    with pytest.raises(DataError, match="a and b were given different images"):
        analyze(
            [Observed("a", tiny(), batches(images)), Observed("b", tiny(), batches(images[:2]))],
            PatchPcaConfig(),
        )
    with pytest.raises(NumericsError, match="all alike"):
        principal_components(torch.full((9, 4), 1e3))
    one_outlier = torch.zeros(1, 4, 4, 5)
    one_outlier[0, 2, 1] = 5
    with pytest.raises(DataError, match="only 1 patches are foreground"):
        colours(one_outlier, foreground=True)
    broken = tiny()
    with torch.no_grad():
        broken.network.cls_token.fill_(float("nan"))
    with pytest.raises(NumericsError, match="tokens of layer 1 of m are not finite"):
        analyze([Observed("m", broken, batches(images))], PatchPcaConfig(layer=1))
