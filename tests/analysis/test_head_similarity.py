import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdkit.analysis.head_similarity import (
    HeadSimilarityConfig,
    analyze,
    draw,
    head_similarity,
    mean_of_pairs,
    scalars,
    summary,
)
from fdkit.analysis.observe import Attention
from fdkit.errors import ConfigError, DataError
from tests.attention_cases import (
    global_attention,
    layers_of,
    observed,
    random_attention,
    tiny,
    tiny_swin,
    windows,
)


def by_pairs(attention: Attention, *, patches_alone: bool) -> np.ndarray:
    """The definition: an image and a pair of heads at a time, with numpy in float64."""
    weights, kept = attention.weights.double().numpy(), (attention.places >= 0).numpy()
    num_images, _, num_heads = weights.shape[:3]
    result = np.zeros((num_heads, num_heads))
    for image, one, other in itertools.product(range(num_images), range(num_heads), range(num_heads)):
        vectors = []
        for head in (one, other):
            parts = [
                part[np.ix_(keep, keep)] if patches_alone else part
                for part, keep in zip(weights[image, :, head], kept, strict=True)
            ]
            vectors.append(np.concatenate([part.ravel() for part in parts]))
        first, second = vectors
        result[one, other] += first @ second / np.linalg.norm(first) / np.linalg.norm(second) / num_images
    return result


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_equals_the_definition_with_and_without_prefix_tokens(num_prefix_tokens):
    attention = random_attention(num_prefix_tokens)
    whole, patches = head_similarity(attention)
    np.testing.assert_allclose(whole, by_pairs(attention, patches_alone=False), atol=1e-5)
    np.testing.assert_allclose(patches, by_pairs(attention, patches_alone=True), atol=1e-5)
    assert np.allclose(whole, patches, atol=1e-3) == (num_prefix_tokens == 0)


@pytest.mark.parametrize("layer", range(4))
def test_equals_the_definition_in_padded_and_shifted_windows(layer):
    attention = windows()[layer]
    whole, patches = head_similarity(attention)
    np.testing.assert_allclose(whole, by_pairs(attention, patches_alone=False), atol=1e-5)
    np.testing.assert_allclose(patches, by_pairs(attention, patches_alone=True), atol=1e-5)


def test_is_not_the_cosine_of_means_nor_the_mean_cosine_of_rows():
    attention = random_attention(0)
    expected = by_pairs(attention, patches_alone=False)
    of_means = by_pairs(
        attention._replace(weights=attention.weights.mean(0, keepdim=True)), patches_alone=False
    )
    rows = torch.nn.functional.normalize(attention.weights[:, 0].double(), dim=-1)
    of_rows = torch.einsum("bhqk,bgqk->bhgq", rows, rows).mean((0, 3)).numpy()
    for wrong in (of_means, of_rows):
        assert np.abs(wrong - expected).max() > 0.01


def test_a_large_share_on_the_class_token_costs_no_accuracy():
    attention = random_attention(1)
    weights = attention.weights * 1e-4
    weights[..., 0] = 1 - weights[..., 1:].sum(-1)
    attention = attention._replace(weights=weights)
    whole, patches = head_similarity(attention)
    assert mean_of_pairs(whole) > 0.999
    np.testing.assert_allclose(patches, by_pairs(attention, patches_alone=True), atol=1e-5)


def test_equal_heads_are_1_and_heads_on_different_tokens_0():
    row = random_attention(1, num_heads=1).weights
    same, _ = head_similarity(random_attention(1)._replace(weights=row.expand(-1, -1, 3, -1, -1)))
    assert mean_of_pairs(same) == pytest.approx(1, abs=1e-6)
    shifted = torch.stack([torch.eye(15).roll(by, dims=1) for by in range(3)])
    apart, _ = head_similarity(global_attention(shifted[None]))
    assert mean_of_pairs(apart) == 0


def test_by_hand():
    # Two tokens: (1, 0; 0, 1) and (1/2, 1/2; 1/2, 1/2): 1 / (sqrt 2 * 1)
    heads = torch.stack([torch.eye(2), torch.full((2, 2), 0.5)])
    matrix, _ = head_similarity(global_attention(heads[None], grid=(1, 2)))
    assert mean_of_pairs(matrix) == pytest.approx(1 / np.sqrt(2))


def test_the_mean_takes_each_pair_once_and_no_head_with_itself():
    matrix = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1, 0.9], [0.4, 0.9, 1]])
    assert mean_of_pairs(matrix) == pytest.approx(0.5)
    assert mean_of_pairs(torch.ones(1, 1)) is None


@given(sharpness=st.floats(0, 30), order=st.permutations(range(4)))
def test_between_0_and_1_and_blind_to_the_order_of_heads_and_tokens(sharpness, order):
    attention = random_attention(0, sharpness=sharpness)
    value = mean_of_pairs(head_similarity(attention)[0])
    assert 0 <= value <= 1
    other = attention._replace(weights=attention.weights[:, :, order].flip(-1).roll(2, -2))
    assert mean_of_pairs(head_similarity(other)[0]) == pytest.approx(value, abs=1e-5)


def test_a_head_that_attends_to_no_patch_is_like_no_other():
    weights = random_attention(1).weights.clone()
    weights[:, :, 0] = 0
    weights[:, :, 0, :, 0] = 1
    _, patches = head_similarity(random_attention(1)._replace(weights=weights))
    assert patches[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("make", [tiny, tiny_swin])
def test_numbers_equal_the_mean_over_images_however_they_are_batched(make):
    model = make()
    expected = [by_pairs(one, patches_alone=False) for one in layers_of(observed(model=model, count=5))]
    for sizes in ([5], [2, 2, 1]):
        found = analyze([observed(model=model, count=5, sizes=sizes)], HeadSimilarityConfig()).numbers[
            "models"
        ][0]
        for matrix, other in zip(found["pairs_of_all_tokens"], expected, strict=True):
            np.testing.assert_allclose(matrix, other, atol=1e-4)
        means = [mean_of_pairs(torch.from_numpy(one)) for one in expected]
        assert found["similarity"] == pytest.approx(means, abs=1e-5)
        assert found["num_images"] == 5


def test_numbers_are_plain_and_name_both_ways():
    numbers = {
        kept: analyze([observed("a"), observed("b")], HeadSimilarityConfig(prefix_tokens=kept)).numbers
        for kept in (True, False)
    }
    for kept, name in ((True, "similarity_of_all_tokens"), (False, "similarity_among_patches")):
        one = numbers[kept]
        assert json.loads(json.dumps(one)) == one
        assert one["analysis"] == "head-similarity"
        assert one["prefix_tokens"] == kept
        assert [model["similarity"] for model in one["models"]] == [model[name] for model in one["models"]]
    assert numbers[True]["models"][0]["similarity"] != numbers[False]["models"][0]["similarity"]
    assert "all tokens" in summary(numbers[True])[0]
    assert "patches alone" in summary(numbers[False])[0]


def test_a_layer_of_one_head_has_no_similarity():
    analysis = analyze(
        [observed("one", tiny(num_heads=1)), observed("three", tiny(depth=3))], HeadSimilarityConfig()
    )
    one, three = analysis.numbers["models"]
    assert one["similarity"] == [None, None]
    assert scalars(one) == {}
    deep = three["similarity"][1:]
    assert scalars(three) == {
        "similarity of heads": pytest.approx(sum(three["similarity"]) / 3),
        "similarity of heads in deep layers": pytest.approx(sum(deep) / 2),
    }
    rows = summary(analysis.numbers)[1]
    assert rows[1] == ["1", "one head", f"{three['similarity'][0]:.3f}"]
    assert rows[3] == ["3", "", f"{three['similarity'][2]:.3f}"]
    figure = analysis.figure()
    assert [line.get_label() for line in figure.axes[0].lines] == ["one", "three"]


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_has_a_line_a_model(width):
    numbers = analyze([observed("a"), observed("b", tiny(depth=3))], HeadSimilarityConfig()).numbers
    figure = draw(numbers, width=width)
    (axes,) = figure.axes
    for line, model in zip(axes.lines, numbers["models"], strict=True):
        assert line.get_xdata().tolist() == list(range(1, len(model["similarity"]) + 1))
        assert line.get_ydata().tolist() == model["similarity"]
    assert axes.get_ylabel() == "similarity of heads (cosine)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_each_of_many_models_has_a_line_of_its_own():
    table = {"similarity": [0.1, None, 0.3]}
    numbers = {"models": [{"name": f"a rather long name, number {one}", **table} for one in range(11)]}
    figure = draw(numbers, width=3.7)
    styles = {
        (line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in figure.axes[0].lines
    }
    assert len(styles) == 11
    assert np.isnan(figure.axes[0].lines[0].get_ydata()[1])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 11
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width


def test_nothing_to_observe_is_refused():
    with pytest.raises(ConfigError, match="head-similarity needs a model"):
        analyze([], HeadSimilarityConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([observed()._replace(batches=[])], HeadSimilarityConfig())
