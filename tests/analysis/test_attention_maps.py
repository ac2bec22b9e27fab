import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdkit.analysis._pictures import map_from_text
from fdkit.analysis.attention_maps import (
    AttentionMapsConfig,
    Shares,
    analyze,
    area_shares,
    attention_shares,
    column_share,
    draw,
    neighbours,
    scalars,
    stored_map,
    summary,
    uniform_shares,
)
from fdkit.analysis.observe import Attention
from fdkit.errors import ConfigError, DataError
from tests.attention_cases import (
    GRID,
    global_attention,
    layers_of,
    observed,
    random_attention,
    tiny,
    tiny_swin,
    windows,
)


def by_queries(attention: Attention) -> Shares:
    """The definitions, one query and one key at a time; total variation is half the sum of absolute differences."""
    weights, places = attention.weights.double().numpy(), attention.places.tolist()
    num_images, num_windows, num_heads, num_tokens, _ = weights.shape
    columns = attention.grid[1]
    sums, num_queries = np.zeros((6, num_heads)), 0
    for image, window, head in itertools.product(range(num_images), range(num_windows), range(num_heads)):
        table, of_window = weights[image, window, head], places[window]
        patches = [token for token in range(num_tokens) if of_window[token] >= 0]
        scaled = {query: table[query, patches] / table[query, patches].sum() for query in patches}
        seen = {
            query: tuple(np.flatnonzero(weights[:, window, :, query].max((0, 1)) > 1e-30))
            for query in patches
        }
        for query in patches:
            num_queries += head == 0
            q = divmod(of_window[query], columns)
            near = itself = 0.0
            for key in patches:
                k = divmod(of_window[key], columns)
                near += table[query, key] * (max(abs(q[0] - k[0]), abs(q[1] - k[1])) <= 1)
                itself += table[query, key] * (q == k)
            mass = table[query, patches].sum()
            mean = np.mean([scaled[other] for other in patches if seen[other] == seen[query]], axis=0)
            column = 1 - np.abs(scaled[query] - mean).sum() / 2
            sums[:, head] += near / mass, itself / mass, column, near, itself, 1 - mass
    return Shares(*torch.from_numpy(sums / num_queries))


def assert_same(found: Shares, expected: Shares) -> None:
    for name, one, other in zip(Shares._fields, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_equals_the_definitions_on_an_oblong_grid(num_prefix_tokens):
    attention = random_attention(num_prefix_tokens)
    assert_same(attention_shares(attention), by_queries(attention))
    other_way_round = attention_shares(attention._replace(grid=GRID[::-1]))
    assert (other_way_round.diagonal - attention_shares(attention).diagonal).abs().max() > 1e-3


@pytest.mark.parametrize("layer", range(4))
def test_equals_the_definitions_in_padded_and_shifted_windows(layer):
    attention = windows()[layer]
    attention = attention._replace(weights=attention.weights[:1])
    assert_same(attention_shares(attention), by_queries(attention))


def shares_of(table: torch.Tensor, num_prefix_tokens: int = 0) -> dict[str, float]:
    found = attention_shares(global_attention(table.expand(2, 1, *table.shape), num_prefix_tokens))
    return {name: part.item() for name, part in found._asdict().items()}


def test_a_patch_that_looks_at_itself_is_all_diagonal_and_hardly_any_column():
    found = shares_of(torch.eye(15))
    assert (found["diagonal"], found["itself"], found["on_prefix"]) == (1, 1, 0)
    assert found["column"] == pytest.approx(1 / 15)


def test_patches_that_all_look_alike_are_all_column():
    row = torch.zeros(15)
    row[[3, 7]] = torch.tensor([0.25, 0.75])
    found = shares_of(row.expand(15, 15))
    assert found["column"] == pytest.approx(1)
    # Patch 3 is (0, 3), in a corner's reach of 6 patches; patch 7 is (1, 2), of 9: of 15 queries each
    assert found["diagonal"] == pytest.approx((0.25 * 6 + 0.75 * 9) / 15)
    assert found["itself"] == pytest.approx((0.25 + 0.75) / 15)


def test_half_of_each_is_about_half_column():
    row = torch.zeros(15)
    row[7] = 1
    found = shares_of(0.5 * torch.eye(15) + 0.5 * row)
    # m is 1/30 everywhere and 1/2 more at 7: a query other than 7 shares 1/30 of its own and 1/2; query 7 shares 16/30
    assert found["column"] == pytest.approx((14 * (1 / 30 + 1 / 2) + 16 / 30) / 15)


def test_uniform_attention_is_all_column_and_gives_the_stated_diagonal():
    attention = global_attention(torch.full((1, 2, 16, 16), 1 / 16), 1)
    found = attention_shares(attention)
    around, itself = uniform_shares(attention, neighbours(attention.places, GRID))
    # A 3 x 5 grid: 4 corners reach 4, 6 + 2 edges 6, 3 inner patches 9
    assert around == pytest.approx((4 * 4 + 8 * 6 + 3 * 9) / 15 / 15)
    assert found.diagonal.tolist() == pytest.approx([around] * 2)
    assert found.itself.tolist() == pytest.approx([itself] * 2) == [pytest.approx(1 / 15)] * 2
    assert found.column.tolist() == pytest.approx([1, 1])
    assert found.diagonal_as_attended.tolist() == pytest.approx([around * 15 / 16] * 2)


def test_uniform_attention_in_shifted_windows_is_all_column_too():
    for attention in windows():
        sees = attention.sees().float()
        uniform = (sees / sees.sum(-1, keepdim=True))[None, :, None]
        one = attention._replace(weights=uniform)
        found = attention_shares(one)
        around, itself = uniform_shares(attention, neighbours(attention.places, attention.grid))
        assert found.column.item() == pytest.approx(1, abs=1e-5)
        assert found.diagonal.item() == pytest.approx(around, abs=1e-6)
        assert found.itself.item() == pytest.approx(itself, abs=1e-6)


def test_a_query_that_attends_to_no_patch_counts_0():
    weights = torch.zeros(1, 1, 16, 16)
    weights[..., 0] = 1
    for name, part in attention_shares(global_attention(weights, 1))._asdict().items():
        assert part.item() == (1 if name == "on_prefix" else 0)


@given(sharpness=st.floats(0, 30), num_prefix_tokens=st.sampled_from([0, 1, 3]))
def test_shares_are_shares_and_keep_their_order(sharpness, num_prefix_tokens):
    found = attention_shares(random_attention(num_prefix_tokens, sharpness=sharpness))
    for part in found:
        assert torch.all((part >= 0) & (part <= 1 + 1e-5))
    assert torch.all(found.itself <= found.diagonal + 1e-6)
    assert torch.all(found.diagonal_as_attended <= found.diagonal + 1e-6)
    assert torch.all(found.column >= 1 / 15 - 1e-6)  # each p_q is a 15th of the mean


def test_area_shares_by_hand():
    expected = [[1, 0.5, 0], [0, 0.5, 1]]
    assert area_shares(2, 3).tolist() == expected
    assert torch.equal(area_shares(4, 4), torch.eye(4))
    found = area_shares(16, 37)
    torch.testing.assert_close(found.sum(0), torch.ones(37))
    torch.testing.assert_close(found.sum(1), torch.full((16,), 37 / 16))


def read(stored: dict) -> np.ndarray:
    count = stored["prefix"] + stored["grid"][0] * stored["grid"][1]
    return map_from_text(stored["values"], (count, count))


def test_a_small_map_is_kept_as_it_is():
    attention = random_attention(2)
    mean = attention.weights.mean((0, 2))
    stored = stored_map(mean, attention)
    assert (stored["prefix"], stored["grid"], stored["of_grid"]) == (2, [3, 5], [3, 5])
    np.testing.assert_allclose(read(stored), mean[0], rtol=1e-3, atol=1e-6)


def test_a_large_map_is_averaged_over_areas():
    # 32 x 20 patches become 16 x 16 areas of 2 x 1.25 patches; one prefix token stays
    num_patches = 32 * 20
    mean = torch.rand(1, num_patches + 1, num_patches + 1).softmax(-1)
    attention = global_attention(mean[None], 1, grid=(32, 20))
    stored = stored_map(mean, attention)
    assert (stored["prefix"], stored["grid"], stored["of_grid"]) == (1, [16, 16], [32, 20])
    found = read(stored)
    np.testing.assert_allclose(found.sum(1), 1, rtol=2e-3)
    # The first area holds patches (0, 0), (1, 0) whole and (0, 1), (1, 1) by a quarter
    weights = {0: 1, 20: 1, 1: 0.25, 21: 0.25}
    expected = sum(
        q * k * mean[0, 1 + query, 1 + key].item()
        for query, q in weights.items()
        for key, k in weights.items()
    )
    assert found[1, 1] == pytest.approx(expected / 2.5, rel=2e-3)
    assert found[1, 0] == pytest.approx(
        sum(q * mean[0, 1 + query, 0].item() for query, q in weights.items()) / 2.5, rel=2e-3
    )
    assert found[0, 1] == pytest.approx(
        sum(k * mean[0, 0, 1 + key].item() for key, k in weights.items()), rel=2e-3
    )


def test_maps_of_windows_stand_where_they_lie_in_the_image():
    attention = windows()[1]  # 9 x 9, padded and shifted
    stored = stored_map(attention.weights.mean((0, 2)), attention)
    assert (stored["prefix"], stored["grid"]) == (0, [9, 9])
    np.testing.assert_allclose(read(stored), attention.among_patches().mean((0, 1)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [tiny, tiny_swin])
def test_numbers_equal_the_mean_over_images_however_they_are_batched(make):
    model = make()
    layers = layers_of(observed(model=model, count=3))
    expected = [by_queries(one) for one in layers]
    names = {
        "diagonal": "diagonal_share",
        "itself": "self_share",
        "column": "column_share",
        "diagonal_as_attended": "diagonal_share_as_attended",
        "itself_as_attended": "self_share_as_attended",
        "on_prefix": "prefix_attention",
    }
    for sizes in ([3], [2, 1]):
        one = observed(model=model, count=3, sizes=sizes)
        found = analyze([one], AttentionMapsConfig()).numbers["models"][0]
        for field, name in names.items():
            for layer, other in zip(found[name], expected, strict=True):
                assert layer == pytest.approx(getattr(other, field).tolist(), abs=1e-5)
        for stored in found["maps"]:
            attention = layers[stored["layer"]]
            whole = read(stored_map(attention.weights.mean((0, 2)), attention))
            np.testing.assert_allclose(read(stored), whole, rtol=2e-3, atol=1e-5)
        for share, attention in zip(found["column_share_of_mean_map"], layers, strict=True):
            mean = attention._replace(weights=attention.weights.mean((0, 2))[None, :, None])
            assert share == pytest.approx(column_share(mean).item(), abs=1e-5)
            assert share != pytest.approx(column_share(attention).mean().item(), abs=1e-3)


def test_numbers_are_plain_and_small():
    numbers = analyze(
        [observed("a"), observed("b", tiny(depth=6))], AttentionMapsConfig(layers=(0, -1))
    ).numbers
    text = json.dumps(numbers)
    assert json.loads(text) == numbers
    assert numbers["analysis"] == "attention-maps"
    assert [[one["layer"] for one in model["maps"]] for model in numbers["models"]] == [[0, 1], [0, 5]]
    size = 2.7 * (1 + 16 * 16) ** 2  # the largest map of a model with a class token
    assert 12 * size < 3e6
    model = numbers["models"][0]
    assert scalars(model) == {
        "diagonal share": pytest.approx(np.mean(model["diagonal_share"])),
        "column share": pytest.approx(np.mean(model["column_share"])),
    }
    title, rows = summary(numbers)
    assert "among patches" in title
    assert [row[:2] for row in rows] == [
        ["model", "layer"],
        ["a", "1"],
        ["", "2"],
        ["b", "1"],
        *([["", str(layer)] for layer in range(2, 7)]),
    ]
    assert rows[1][2] == f"{100 * np.mean(model['diagonal_share'][0]):.1f} %"
    assert rows[1][4] == f"{100 * np.mean(model['column_share'][0]):.1f} %"


def test_four_layers_spread_over_the_depth_are_shown_unless_others_are_named():
    model = tiny(depth=12)
    found = analyze([observed(model=model)], AttentionMapsConfig()).numbers["models"][0]
    assert [one["layer"] for one in found["maps"]] == [0, 4, 7, 11]
    found = analyze([observed(model=model)], AttentionMapsConfig(layers=(3, -9, 1))).numbers["models"][0]
    assert [one["layer"] for one in found["maps"]] == [3, 1]
    assert len(found["diagonal_share"]) == 12


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_there_is_not_is_refused_at_once(layer):
    one = observed("vit", count=6, sizes=2)
    batches = iter(one.batches)
    with pytest.raises(ConfigError, match=f"layer {layer}: vit has 2 layers with attention"):
        analyze([one._replace(batches=batches)], AttentionMapsConfig(layers=(layer,)))
    assert len(list(batches)) == 2, "refused after the first batch"


@pytest.mark.parametrize(("width", "num_columns"), [(7.2, 4), (3.7, 2)])
def test_figure_shows_maps_and_shares(width, num_columns):
    numbers = analyze(
        [observed("a", tiny(depth=5)), observed("b", tiny_swin())], AttentionMapsConfig()
    ).numbers
    figure = draw(numbers, width=width)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in maps] == [
        f"layer {one['layer'] + 1}" for model in numbers["models"] for one in model["maps"]
    ]
    # 17 tokens get 1/17 each if uniform
    shown = maps[0].images[0].get_array()
    np.testing.assert_allclose(shown, (17 * read(numbers["models"][0]["maps"][0])).clip(0.1), rtol=1e-5)
    assert len({axes.images[0].norm for axes in maps}) == 1, "one scale for all"
    assert len({round(axes.get_position().x0, 2) for axes in maps}) == num_columns
    lines = [axes for axes in figure.axes if len(axes.lines) >= 2]
    diagonal, column = lines
    for number, model in enumerate(numbers["models"]):
        of_model, uniform = diagonal.lines[2 * number : 2 * number + 2]
        assert of_model.get_ydata() == pytest.approx([100 * np.mean(one) for one in model["diagonal_share"]])
        assert uniform.get_ydata() == pytest.approx([100 * one for one in model["uniform_diagonal_share"]])
        assert column.lines[number].get_ydata() == pytest.approx(
            [100 * np.mean(one) for one in model["column_share"]]
        )


def test_nothing_to_observe_is_refused():
    with pytest.raises(ConfigError, match="attention-maps needs a model"):
        analyze([], AttentionMapsConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([observed()._replace(batches=[])], AttentionMapsConfig())
