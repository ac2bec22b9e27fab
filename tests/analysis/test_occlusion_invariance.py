import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fdkit.analysis._cka import hsic_unbiased
from fdkit.analysis.observe import Images, Observed, observe_layers
from fdkit.analysis.occlusion_invariance import (
    OcclusionInvarianceConfig,
    analyze,
    draw,
    occlude,
    scalars,
    summary,
)
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.libraries import build_timm
from fdkit.models.masking import num_visible


def tiny(name="vit_tiny_patch16_224", **args):
    return build_timm(name, {"depth": 2, "img_size": 64, "embed_dim": 24, **args}).eval()


def batches(images: Tensor, sizes: int | list[int] = 4) -> list[Images]:
    return [Images(part) for part in images.split(sizes)]


def config(**fields) -> OcclusionInvarianceConfig:
    return OcclusionInvarianceConfig(**{"cells": 4, **fields})


def by_loops(images: Tensor, hidden: Tensor, colour: Tensor) -> Tensor:
    result = images.clone()
    for image in range(len(images)):
        for row in range(images.shape[2]):
            for column in range(images.shape[3]):
                cell = row * hidden.shape[1] // images.shape[2], column * hidden.shape[2] // images.shape[3]
                if hidden[(image, *cell)]:
                    result[image, :, row, column] = colour[image]
    return result


@pytest.mark.parametrize("cells", [(2, 5), (3, 4), (1, 1)])
def test_hidden_cells_take_the_colour_and_the_others_stay(cells):
    images, hidden = torch.rand(3, 3, 7, 10), torch.rand(3, *cells) < 0.5
    colour = torch.rand(3)
    found = occlude(images, hidden, colour[:, None, None])
    assert torch.equal(found, by_loops(images, hidden, colour.expand(3, 3)))


@given(cells=st.integers(2, 7), ratio=st.floats(0.2, 0.8))
def test_cells_are_as_many_as_asked_for_and_even(cells, ratio):
    generator = torch.Generator().manual_seed(cells)
    hidden = torch.rand(1, cells**2, generator=generator).argsort() >= num_visible(cells**2, ratio)
    images = torch.ones(1, 3, 5 * cells, 5 * cells)
    found = occlude(images, hidden.view(1, cells, cells), torch.zeros(1, 3, 1, 1))
    assert (found == 0).sum() == 3 * 25 * hidden.sum()


def hidden_in(images: Tensor, sizes: list[int], **fields) -> list[Tensor]:
    """Which pixels the model is shown changed, at each pass."""
    seen: list[Tensor] = []
    model = tiny()
    forward = model.encode_layers

    def spy(pixels, *args, **kwargs):
        seen.append(pixels.clone())
        return forward(pixels, *args, **kwargs)

    model.encode_layers = spy
    analyze([Observed("m", model, batches(images, sizes))], config(**fields))
    passes = 1 + len(fields["ratios"])
    whole, *changed = (torch.cat(seen[number::passes]) for number in range(passes))
    assert torch.equal(whole, images)
    return changed


def test_masks_are_nested_and_the_same_however_images_are_batched():
    images = torch.rand(10, 3, 64, 64)
    small, large = hidden_in(images, [10], ratios=(0.25, 0.75), batch_size=10)
    again = hidden_in(images, [3, 6, 1], ratios=(0.25, 0.75), batch_size=5)
    assert torch.equal(small, again[0])
    assert torch.equal(large, again[1])
    is_small, is_large = ((one != images).all(1) for one in (small, large))
    assert is_small.float().mean((1, 2)).tolist() == [0.25] * 10
    assert is_large.float().mean((1, 2)).tolist() == [0.75] * 10
    assert torch.all(is_large | ~is_small)
    assert not torch.equal(is_small[0], is_small[1])
    other = hidden_in(images, [10], ratios=(0.25, 0.75), batch_size=10, mask_seed=1)
    assert not torch.equal(other[0], small)


@pytest.mark.parametrize("fill", ["visible", "model"])
def test_hidden_cells_have_the_mean_of_model_or_visible_pixels(fill):
    # The mean of the whole image would tell of what is hidden.
    images = torch.rand(4, 3, 64, 64)
    (changed,) = hidden_in(images, [4], ratios=(0.5,), fill=fill)
    for image, other in zip(images, changed, strict=True):
        is_hidden = (other != image).all(0)
        colour = image[:, ~is_hidden].mean(1) if fill == "visible" else tiny().mean.flatten()
        torch.testing.assert_close(other[:, is_hidden], colour[:, None].expand(-1, int(is_hidden.sum())))


@pytest.mark.parametrize("pooling", ["patches", "cls"])
def test_numbers_equal_cka_of_each_layer_with_itself(pooling):
    # Fails if layers are compared across, if ratios are mixed up, or if CKA is the biased one.
    model, images = tiny(), torch.rand(9, 3, 64, 64)
    ratios = (0.25, 0.75)
    changed = hidden_in(images, [9], ratios=ratios, batch_size=9)
    found = analyze(
        [Observed("m", model, batches(images))], config(ratios=ratios, batch_size=9, pooling=pooling)
    ).numbers["models"][0]

    def grams(pixels: Tensor) -> list[Tensor]:
        layers = observe_layers(model, pixels)
        pooled = [one.prefix[:, 0] if pooling == "cls" else one.patches.mean(1) for one in layers]
        return [one.double() @ one.double().T for one in pooled]

    whole = grams(images)
    for row, pixels in enumerate(changed):
        for layer, (one, other) in enumerate(zip(whole, grams(pixels), strict=True)):
            expected = (
                hsic_unbiased(one, other) / (hsic_unbiased(one, one) * hsic_unbiased(other, other)) ** 0.5
            )
            assert found["cka"][row][layer] == pytest.approx(expected, abs=1e-4)
    assert (found["num_images"], found["num_layers"]) == (9, 2)


def test_a_last_minibatch_of_fewer_than_four_is_left_out():
    images = torch.rand(11, 3, 64, 64)
    model = tiny()
    many = analyze([Observed("m", model, batches(images))], config(batch_size=8)).numbers["models"][0]
    few = analyze([Observed("m", model, batches(images[:8]))], config(batch_size=8)).numbers["models"][0]
    assert many["num_images"] == 8
    assert many["cka"] == few["cka"]
    assert (
        analyze([Observed("m", model, batches(images))], config(batch_size=7)).numbers["models"][0][
            "num_images"
        ]
        == 11
    )


def test_the_more_is_hidden_the_less_is_alike():
    # Images of one colour a patch: what stays visible tells less and less of the whole.
    coarse = torch.rand(32, 3, 4, 4)
    images = coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)
    found = analyze([Observed("m", tiny(), batches(images))], config(ratios=(0.125, 0.5, 0.875)))
    least, middle, most = (row[0] for row in found.numbers["models"][0]["cka"])
    assert 1 > least > middle > most


def test_a_layer_that_says_the_same_of_all_images_has_no_value():
    model = tiny(depth=1)
    with torch.no_grad():
        model.network.patch_embed.proj.weight.zero_()
    numbers = analyze([Observed("m", model, batches(torch.rand(8, 3, 64, 64)))], config()).numbers
    assert numbers["models"][0]["cka"] == [[None], [None], [None]]
    assert scalars(numbers["models"][0]) == {}
    assert summary(numbers)[1][1] == ["m", "-", "-", "-"]
    draw(numbers)


def two_models() -> dict:
    images = torch.rand(8, 3, 64, 64)
    observed = [
        Observed("a", tiny(), batches(images)),
        Observed("b", tiny(depth=3, img_size=80), batches(torch.rand(8, 3, 80, 80))),
    ]
    return analyze(observed, config(ratios=(0.25, 0.5))).numbers


def test_numbers_are_plain_and_the_figure_shows_them():
    numbers = two_models()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["analysis"] == "occlusion-invariance"
    figure = draw(numbers)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["25 % hidden", "50 % hidden"]
    for row, axes in enumerate(figure.axes):
        for line, model in zip(axes.lines, numbers["models"], strict=True):
            assert list(line.get_ydata()) == model["cka"][row]
            assert list(line.get_xdata())[-1] == 1
            assert line.get_label() == model["name"]
    alone = draw(numbers | {"models": numbers["models"][1:]}, width=3.7)
    assert [line.get_label() for line in alone.axes[0].lines] == ["25 % hidden", "50 % hidden"]
    title, rows = summary(numbers)
    assert "mean of patch tokens" in title
    assert rows[2] == ["b", *(f"{row[-1]:.3f}" for row in numbers["models"][1]["cka"])]
    shown = scalars(numbers["models"][0])
    assert shown["CKA of the last layer, 50 % hidden"] == numbers["models"][0]["cka"][1][-1]


def test_bad_input_is_refused():
    images = torch.rand(8, 3, 64, 64)
    observed = [Observed("m", tiny(), batches(images))]
    with pytest.raises(ConfigError, match="needs a model"):
        analyze([], config())
    with pytest.raises(ConfigError, match=r"a ratio is named twice: 0\.5 0\.5"):
        analyze(observed, config(ratios=(0.5, 0.5)))
    with pytest.raises(ConfigError, match=r"a mask ratio of 0\.99 leaves none visible"):
        analyze(observed, config(ratios=(0.99,)))
    with pytest.raises(ConfigError, match="m sees 64x64 pixels, which 65 cells a side do not fit in"):
        analyze(observed, config(cells=65))
    with pytest.raises(DataError, match="3 images are too few to observe m on: 4 are needed"):
        analyze([Observed("m", tiny(), batches(images[:3]))], config())
    gap = tiny(class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="g: pooling cls: this model has no class token"):
        analyze([Observed("g", gap, batches(images))], config(pooling="cls"))
    broken = tiny()
    with torch.no_grad():
        broken.network.cls_token.fill_(float("nan"))
    with pytest.raises(NumericsError, match="features of layer 1 of m are not finite"):
        analyze([Observed("m", broken, batches(images))], config())
