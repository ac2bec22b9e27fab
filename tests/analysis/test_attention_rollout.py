import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fdkit.analysis._pictures import image_from_text, map_from_text
from fdkit.analysis.attention_rollout import (
    AttentionRolloutConfig,
    analyze,
    draw,
    fused,
    scalars,
    spread,
    summary,
    with_residual,
)
from fdkit.analysis.observe import Images
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_timm
from tests.attention_cases import global_attention, layers_of, observed, random_attention, tiny, tiny_swin


def gap():
    args = {"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 3}
    model = build_timm("vit_little_patch16_reg1_gap_256", args).eval()
    for block in model.network.blocks:
        block.attn.qkv.weight.data.mul_(8)
    return model


def by_products(layers: list, config: AttentionRolloutConfig) -> np.ndarray:
    """(B, N, N): explicit products of matrices in float64, an image at a time; the last layer stands leftmost."""
    fuse = {"mean": np.mean, "max": np.max, "min": np.min}[config.fusion]
    products = []
    for image in range(len(layers[0].weights)):
        product = None
        for layer in layers:
            heads = layer.weights[image, 0].double().numpy()
            one = fuse(heads, axis=0)
            one = one / one.sum(1, keepdims=True)
            mixed = config.residual_ratio * np.eye(len(one)) + (1 - config.residual_ratio) * one
            product = mixed if product is None else mixed @ product
        products.append(product)
    return np.stack(products)


@pytest.mark.parametrize(
    "fields",
    [{}, {"fusion": "max"}, {"fusion": "min"}, {"residual_ratio": 0.0}, {"residual_ratio": 0.8}],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda: tiny(depth=3, reg_tokens=2), gap])
def test_equals_explicit_products_however_images_are_batched(make, fields):
    model, config = make(), AttentionRolloutConfig(**fields)
    products = by_products(layers_of(observed(model=model, count=5)), config)
    has_class = model.num_prefix_tokens > 0
    num_prefix = 3 if has_class else 1
    rows = products[:, 0] if has_class else products[:, num_prefix:].mean(1)
    among = scipy.stats.entropy(rows[:, num_prefix:], axis=-1) / math.log(16)
    for sizes in ([5], [2, 2, 1]):
        found = analyze([observed(model=model, count=5, sizes=sizes)], config).numbers["models"][0]
        assert found["query"] == ("class" if has_class else "mean")
        assert found["entropy"] == pytest.approx(among.mean(), abs=1e-5)
        assert found["on_prefix"] == pytest.approx(rows[:, :num_prefix].sum(1).mean(), abs=1e-5)
        assert len(found["pictures"]) == 5
        for picture, row in zip(found["pictures"], rows, strict=True):
            np.testing.assert_allclose(
                map_from_text(picture["rollout"], (4, 4)).ravel(), row[num_prefix:], rtol=2e-3, atol=1e-6
            )


def test_the_order_of_layers_matters_and_is_right():
    model = tiny(depth=3)
    layers = layers_of(observed(model=model))
    config = AttentionRolloutConfig()
    right, reverse = by_products(layers, config), by_products(layers[::-1], config)
    assert np.abs(right[:, 0] - reverse[:, 0]).max() > 1e-3
    without = by_products(layers, AttentionRolloutConfig(residual_ratio=0))
    assert np.abs(right[:, 0] - without[:, 0]).max() > 1e-3


def test_by_hand():
    # Two layers of a class token and one patch. Layer 1: all look at the patch; layer 2: all at the class token.
    patch, token = torch.tensor([0.0, 1.0]).expand(1, 2, 2), torch.tensor([1.0, 0.0]).expand(1, 2, 2)
    first, second = with_residual(patch, 0.5), with_residual(token, 0.5)
    assert first.tolist() == [[[0.5, 0.5], [0, 1]]]
    assert second.tolist() == [[[1, 0], [0.5, 0.5]]]
    # The class token of layer 2 stays the one of layer 1, which is half the patch.
    assert (second @ first)[0, 0].tolist() == [0.5, 0.5]
    assert (first @ second)[0, 0].tolist() == [0.75, 0.25]


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("residual_ratio", [0.0, 0.5, 0.9])
def test_rows_sum_to_1(fusion, residual_ratio):
    mixed = with_residual(fused(random_attention(1), fusion), residual_ratio)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 16))
    assert torch.all(mixed >= 0)
    assert torch.all(mixed.diagonal(dim1=1, dim2=2) >= residual_ratio - 1e-6)


def test_fusion_takes_heads_apart():
    heads = torch.stack([torch.eye(2), torch.full((2, 2), 0.5)])[None]
    attention = global_attention(heads, grid=(1, 2))
    assert fused(attention, "mean")[0].tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert fused(attention, "max")[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert fused(attention, "min")[0, 0].tolist() == [1, 0]


def test_heads_that_share_no_token_leave_the_residual_alone():
    heads = torch.stack([torch.eye(3).roll(1, 1), torch.eye(3).roll(2, 1)])[None]
    one = fused(global_attention(heads, grid=(1, 3)), "min")
    assert one.abs().max() == 0
    assert torch.equal(with_residual(one, 0.5)[0], torch.eye(3))


def test_fusing_keeps_the_attention_as_it_is():
    attention = random_attention(1, num_heads=1)
    before = attention.weights.clone()
    with_residual(fused(attention, "mean"), 0.5)
    assert torch.equal(attention.weights, before)


def test_the_mean_query_is_followed_where_asked():
    model = tiny(depth=2)
    rows = by_products(layers_of(observed(model=model)), AttentionRolloutConfig())[:, 1:].mean(1)
    found = analyze([observed(model=model)], AttentionRolloutConfig(query="mean")).numbers["models"][0]
    assert found["query"] == "mean"
    assert found["on_prefix"] == pytest.approx(rows[:, 0].mean(), abs=1e-5)


def test_spread_equals_scipy():
    patches = torch.rand(4, 15) ** 4
    expected = scipy.stats.entropy(patches.double().numpy(), axis=-1) / math.log(15)
    np.testing.assert_allclose(spread(patches), expected, rtol=1e-5)
    assert spread(torch.full((1, 9), 0.1)).item() == pytest.approx(1)


def test_numbers_are_plain_and_pictures_know_their_image():
    one = observed("a", count=3)
    images = [Images(batch.pixels, None, torch.tensor([4, 9, 11])) for batch in one.batches]
    config = AttentionRolloutConfig(num_shown=2, fusion="max", residual_ratio=0.25)
    numbers = analyze([one._replace(batches=images)], config).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    assert (numbers["analysis"], numbers["fusion"], numbers["residual_ratio"]) == (
        "attention-rollout",
        "max",
        0.25,
    )
    model = numbers["models"][0]
    assert [picture["index"] for picture in model["pictures"]] == [4, 9]
    pixels = torch.cat([batch.pixels for batch in images])[1].permute(1, 2, 0)
    assert np.abs(image_from_text(model["pictures"][1]["image"]) / 255 - pixels.numpy()).mean() < 0.1
    assert scalars(model) == {"entropy of rollout (1 = uniform)": model["entropy"]}
    title, rows = summary(numbers)
    assert "max of heads, residual 0.25" in title
    assert rows[1] == ["a", "class token", f"{model['entropy']:.3f}", f"{100 * model['on_prefix']:.1f} %"]


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_shows_each_image_beside_its_rollout(width):
    numbers = analyze(
        [observed("a", count=3), observed("b", gap(), count=2)], AttentionRolloutConfig()
    ).numbers
    figure = draw(numbers, width=width)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "a: class token",
        "b: mean of all patches",
    ]
    labels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert labels == [["image", "rollout"] * 3, ["image", "rollout"] * 2]


def test_attention_in_windows_is_refused():
    with pytest.raises(ConfigError, match=r"attention in 25 windows cannot be multiplied through layers"):
        analyze([observed("swin", tiny_swin())], AttentionRolloutConfig())


def test_layers_that_merge_patches_are_refused_even_in_one_window():
    args = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "img_size": 32, "window_size": 8}
    swin = build_timm("swin_tiny_patch4_window7_224", args).eval()
    with pytest.raises(ConfigError, match="layer 1 of swin has 4x4 patches and the one before it 8x8"):
        analyze([observed("swin", swin)], AttentionRolloutConfig())


def test_a_class_token_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="gap has no class token to follow back"):
        analyze([observed("gap", gap())], AttentionRolloutConfig(query="class"))


def test_nothing_to_observe_is_refused():
    with pytest.raises(ConfigError, match="attention-rollout needs a model"):
        analyze([], AttentionRolloutConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([observed()._replace(batches=[])], AttentionRolloutConfig())
