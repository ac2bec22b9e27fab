import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fdkit.analysis._attention import measure
from fdkit.analysis._pictures import image_from_text, map_from_text
from fdkit.analysis.class_attention import (
    ClassAttentionConfig,
    analyze,
    attention_of_class,
    draw,
    mean_attention,
    scalars,
    spread,
    statistic,
    summary,
)
from fdkit.analysis.observe import Attention, Images, observe_attention, observe_pooling
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_open_clip, build_timm
from tests.attention_cases import layers_of, observed, random_attention, tiny, tiny_swin, windows

SMALL = {"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 3}


def siglip():
    model = build_timm("vit_base_patch16_siglip_224", SMALL).eval()
    torch.nn.init.normal_(model.network.attn_pool.latent, std=4)
    torch.nn.init.normal_(model.network.attn_pool.kv.weight)
    return model


def pe():
    """Has a class token and pools by attention."""
    return build_timm("vit_pe_core_tiny_patch16_384", {**SMALL, "attn_pool_num_heads": 4}).eval()


def gap():
    return build_timm("vit_little_patch16_reg1_gap_256", SMALL).eval()


def test_the_class_token_is_the_first_token():
    attention = random_attention(3)
    patches, others = attention_of_class(attention)
    for image in range(2):
        for head in range(4):
            row = attention.weights[image, 0, head, 0].tolist()
            assert others[image, head].tolist() == row[:3]
            assert patches[image, head].tolist() == row[3:]
    assert not torch.equal(patches, attention.weights[:, 0, :, 3:, 0]), (
        "what others give it is something else"
    )


def mean_by_loops(attention: Attention) -> np.ndarray:
    """(B, H, h*w): what each patch gets of all queries that are patches, one pair at a time."""
    weights, places = attention.weights.double().numpy(), attention.places.tolist()
    num_patches = attention.grid[0] * attention.grid[1]
    result = np.zeros((len(weights), attention.num_heads, num_patches))
    for window, of_window in enumerate(places):
        for query, q in enumerate(of_window):
            for key, k in enumerate(of_window):
                if q >= 0 and k >= 0:
                    result[:, :, k] += weights[:, window, :, query, key] / num_patches
    return result


def test_the_mean_of_patches_equals_a_sum_by_loops_in_windows_too():
    for attention in (random_attention(2), *windows()):
        patches, others = mean_attention(attention)
        np.testing.assert_allclose(patches, mean_by_loops(attention), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(patches.sum(-1) + others.sum(-1), torch.ones(2, attention.num_heads))
        is_patch = attention.is_patch
        sees_others = attention.sees() & is_patch[:, :, None] & ~is_patch[:, None]
        assert bool((others > 1e-4).any()) == bool(sees_others.any())


def test_spread_equals_scipy():
    patches = torch.rand(2, 3, 15) ** 4
    expected = scipy.stats.entropy(patches.double().numpy(), axis=-1) / math.log(15)
    np.testing.assert_allclose(spread(patches), expected, rtol=1e-5)
    assert spread(torch.full((1, 1, 7), 0.1)).item() == pytest.approx(1)
    assert spread(torch.eye(7)[None]).abs().max() == 0
    assert spread(torch.zeros(1, 1, 7)).item() == 0


@pytest.mark.parametrize(("layer", "position"), [(None, 2), (0, 0), (-2, 1)])
def test_numbers_and_pictures_are_those_of_the_layer_however_they_are_batched(layer, position):
    model = tiny(depth=3, reg_tokens=2)
    attention = layers_of(observed(model=model, count=5))[position]
    rows = attention.weights[:, 0, :, 0].double()
    among = scipy.stats.entropy(rows[..., 3:].numpy(), axis=-1) / math.log(16)
    for sizes in ([5], [2, 2, 1]):
        one = observed(model=model, count=5, sizes=sizes)
        numbers = analyze([one], ClassAttentionConfig(layer=layer, num_shown=3)).numbers
        found = numbers["models"][0]
        assert (found["query"], found["layer"], found["grid"]) == ("class", position, [4, 4])
        assert found["entropy"] == pytest.approx(among.mean(0).tolist(), abs=1e-5)
        assert found["mean_entropy"] == pytest.approx(among.mean(), abs=1e-5)
        assert found["on_itself"] == pytest.approx(rows[..., 0].mean(0).tolist(), abs=1e-5)
        assert found["on_prefix"] == pytest.approx(rows[..., :3].sum(-1).mean(0).tolist(), abs=1e-5)
        assert len(found["pictures"]) == 3
        for number, picture in enumerate(found["pictures"]):
            heads = map_from_text(picture["heads"], (3, 4, 4))
            np.testing.assert_allclose(heads, rows[number, :, 3:].unflatten(-1, (4, 4)), rtol=1e-3, atol=1e-6)
            assert picture["index"] is None
            pixels = torch.cat([batch.pixels for batch in one.batches])[number].permute(1, 2, 0)
            assert np.abs(image_from_text(picture["image"]) / 255 - pixels.numpy()).mean() < 0.1


def test_numbers_are_plain_and_pictures_know_their_image():
    one = observed("a", count=3)
    images = [Images(batch.pixels, None, torch.tensor([4, 9, 11])) for batch in one.batches]
    numbers = analyze([one._replace(batches=images)], ClassAttentionConfig(num_shown=2)).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["analysis"] == "class-attention"
    model = numbers["models"][0]
    assert [picture["index"] for picture in model["pictures"]] == [4, 9]
    assert scalars(model) == {
        "entropy of class attention (1 = uniform)": pytest.approx(np.mean(model["entropy"])),
        "class attention on prefix tokens": pytest.approx(np.mean(model["on_prefix"])),
    }
    rows = summary(numbers)[1]
    assert rows[1][:3] == ["a", "class token, layer 2", f"{np.mean(model['entropy']):.2f}"]
    assert rows[1][3:5] == [f"{min(model['entropy']):.2f}", f"{max(model['entropy']):.2f}"]


@pytest.mark.parametrize(("make", "query", "num_others"), [(siglip, "auto", 0), (pe, "pooling", 1)])
def test_a_pooling_query_is_read_where_it_is_all_there_is_or_asked_for(make, query, num_others):
    model = make()
    one = observed("m", model, count=3)
    images = torch.cat([batch.pixels for batch in one.batches])
    pooled = observe_pooling(model, observe_attention(model, images, lambda layer, attention: None)).double()
    for sizes in ([3], [2, 1]):
        found = analyze(
            [observed("m", model, count=3, sizes=sizes)], ClassAttentionConfig(query=query)
        ).numbers["models"][0]
        assert (found["query"], found["layer"], found["on_itself"]) == ("pooling", None, None)
        among = scipy.stats.entropy(pooled[..., num_others:].detach().numpy(), axis=-1) / math.log(16)
        assert found["entropy"] == pytest.approx(among.mean(0).tolist(), abs=1e-4)
        others = pooled[..., :num_others].sum(-1).mean(0)
        assert found["on_prefix"] == pytest.approx(others.tolist(), abs=1e-5)
        heads = map_from_text(found["pictures"][1]["heads"], (found["num_heads"], 16))
        np.testing.assert_allclose(heads, pooled[1, :, num_others:].detach(), rtol=2e-3, atol=1e-5)


def test_a_model_with_both_shows_its_class_token_unless_asked():
    found = analyze([observed("pe", pe())], ClassAttentionConfig()).numbers["models"][0]
    assert (found["query"], found["layer"], found["num_heads"]) == ("class", 1, 3)


@pytest.mark.parametrize("make", [gap, tiny_swin, tiny])
def test_the_mean_of_all_patches_is_there_for_any_model(make):
    model = make()
    found = analyze([observed("m", model)], ClassAttentionConfig(query="mean")).numbers["models"][0]
    last = layers_of(observed("m", model))[-1]
    expected = mean_by_loops(last)
    assert found["grid"] == list(last.grid)
    heads = map_from_text(found["pictures"][0]["heads"], (last.num_heads, expected.shape[-1]))
    np.testing.assert_allclose(heads, expected[0], rtol=2e-3, atol=1e-6)
    assert found["on_itself"] is None
    assert found["on_prefix"] == pytest.approx((1 - expected.sum(-1)).mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (gap, {}, r"m has no class token and no pooling query .*\n.*--query mean.* or attention-rollout"),
        (tiny_swin, {}, "m has no class token and no pooling query"),
        (gap, {"query": "class"}, "m has no class token whose attention could be shown"),
        (tiny, {"query": "pooling"}, "m has no pooling query whose attention could be shown"),
        (siglip, {"layer": 0}, "layer 0: the pooling query of m stands behind all layers"),
        (tiny, {"layer": 2}, "layer 2: m has 2 layers with attention"),
        (tiny, {"layer": -3}, "layer -3: m has 2 layers with attention"),
    ],
)
def test_what_a_model_does_not_have_is_refused(make, fields, message):
    with pytest.raises(ConfigError, match=message):
        analyze([observed("m", make())], ClassAttentionConfig(**fields))


def test_nothing_to_observe_is_refused():
    with pytest.raises(ConfigError, match="class-attention needs a model"):
        analyze([], ClassAttentionConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([observed()._replace(batches=[])], ClassAttentionConfig())


def test_shares_a_pass_with_other_statistics():
    one, config = observed("a", count=3), ClassAttentionConfig()
    both = measure(one, [statistic(one, config), statistic(one, ClassAttentionConfig(layer=0))], config)
    alone = analyze([one], config).numbers["models"][0]
    assert both[0] == alone
    assert both[1]["layer"] == 0


def test_an_open_clip_tower_has_a_class_token():
    model = build_open_clip("ViT-B-32", {"image_size": 64}).eval()
    model.network.transformer.resblocks = model.network.transformer.resblocks[:2]
    found = analyze([observed("clip", model)], ClassAttentionConfig()).numbers["models"][0]
    assert (found["query"], found["num_heads"], found["grid"]) == ("class", 12, [2, 2])


@pytest.mark.parametrize(("width", "num_images"), [(7.2, 3), (3.7, 2)])
def test_figure_shows_image_mean_and_heads(width, num_images):
    models = [observed("a", count=3), observed("b", pe(), count=3)]
    numbers = analyze(models, ClassAttentionConfig(num_shown=3)).numbers
    figure = draw(numbers, width=width)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "a: class token, layer 2",
        "b: class token, layer 2",
    ]
    for axes in figure.axes:
        labels = [text.get_text() for text in axes.texts]
        assert labels == ["image", "mean", "head 1", "head 2", "head 3"] * num_images
        assert len(axes.images) == 1
        assert axes.images[0].get_array().max() == 255
