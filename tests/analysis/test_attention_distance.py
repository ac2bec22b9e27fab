import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fdkit.analysis.attention_distance import (
    AttentionDistanceConfig,
    DistanceStatistic,
    analyze,
    attention_distance,
    draw,
    patch_distances,
    scalars,
    summary,
    token_distances,
    uniform_distance,
)
from fdkit.analysis.observe import Attention, Images, Observed, observe_attention
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_timm
from tests.attention_cases import windows

GRID = (3, 5)
PATCH = 14


def random_attention(num_prefix_tokens: int, *, sharpness: float = 3.0) -> Tensor:
    num_tokens = num_prefix_tokens + GRID[0] * GRID[1]
    return (sharpness * torch.randn(2, 4, num_tokens, num_tokens)).softmax(-1)


def by_loops(attention: Tensor, num_prefix_tokens: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The definition, one query and one key at a time."""
    num_images, num_heads, num_tokens, _ = attention.shape
    distance, prefix = torch.zeros(num_heads).double(), torch.zeros(num_heads).double()
    num_queries = num_images * (num_tokens - num_prefix_tokens)
    for image in range(num_images):
        for head in range(num_heads):
            for query in range(num_prefix_tokens, num_tokens):
                row = attention[image, head, query].tolist()
                q = divmod(query - num_prefix_tokens, GRID[1])
                far = sum(
                    row[key] * PATCH * math.dist(q, divmod(key - num_prefix_tokens, GRID[1]))
                    for key in range(num_prefix_tokens, num_tokens)
                )
                on_prefix = sum(row[:num_prefix_tokens])
                distance[head] += far / (1 - on_prefix if renormalise else 1) / num_queries
                prefix[head] += on_prefix / num_queries
    return distance, prefix


def seen(attention: Tensor, num_prefix_tokens: int = 0) -> Attention:
    """Global attention (B, H, N, N) as it is observed."""
    prefix = torch.full((num_prefix_tokens,), -1)
    places = torch.cat([prefix, torch.arange(attention.shape[-1] - num_prefix_tokens)])
    return Attention(attention[:, None], places[None], GRID, PATCH)


def measured(attention: Tensor, num_prefix_tokens: int = 0, *, renormalise: bool = True) -> Tensor:
    found = attention_distance(seen(attention, num_prefix_tokens))
    return found.renormalised if renormalise else found.as_attended


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_the_definition_on_an_unequal_grid(num_prefix_tokens, renormalise):
    attention = random_attention(num_prefix_tokens)
    distance, prefix = by_loops(attention, num_prefix_tokens, renormalise)
    torch.testing.assert_close(
        measured(attention, num_prefix_tokens, renormalise=renormalise), distance, rtol=1e-5, atol=1e-6
    )
    on_prefix = attention_distance(seen(attention, num_prefix_tokens)).on_prefix
    torch.testing.assert_close(on_prefix, prefix, rtol=1e-5, atol=1e-6)


def test_patch_distances_by_hand():
    distances = patch_distances((2, 3), 16)
    assert distances.shape == (6, 6)
    assert distances[0].tolist() == pytest.approx([0, 16, 32, 16, 16 * math.sqrt(2), 16 * math.sqrt(5)])
    assert torch.equal(distances, distances.T)


def test_a_grid_on_its_side_gives_other_distances():
    attention = random_attention(0)
    swapped = attention_distance(seen(attention)._replace(grid=GRID[::-1])).renormalised
    assert not torch.allclose(measured(attention), swapped, rtol=1e-2)


def test_windows_count_the_distance_in_the_image_not_in_the_window():
    # Two windows of 2x2 on a 2x4 map, the second with padding for its last column.
    places = torch.tensor([[0, 1, 4, 5], [2, -1, 6, -1]])
    weights = torch.zeros(1, 2, 1, 4, 4)
    weights[0, 0, 0, :, 3] = 1  # all of the first window look at place 5: sqrt 2, 1, 1 and 0 strides
    weights[0, 1, 0, :, 0] = 0.5  # the second half at place 2, half at padding
    weights[0, 1, 0, :, 1] = 0.5
    found = attention_distance(Attention(weights, places, (2, 4), 10))
    assert found.renormalised.item() == pytest.approx(10 * (math.sqrt(2) + 1 + 1 + 0 + 0 + 1) / 6)
    assert found.as_attended.item() == pytest.approx(10 * (math.sqrt(2) + 1 + 1 + 0 + 0 + 0.5) / 6)
    assert found.on_prefix.item() == pytest.approx(0.5 * 2 / 6)


def test_uniform_distance_leaves_out_what_a_shift_joins():
    beside = torch.tensor([[0, 1, 4, 5]])
    assert uniform_distance(beside, (2, 4), 10) == pytest.approx(10 * (0 + 1 + 1 + math.sqrt(2)) / 4)
    joined = torch.tensor([[3, 0, 7, 4], [1, 2, 5, 6]])  # columns 3 and 0 are neighbours in the window alone
    separate = 10 * (0 + 1) / 2
    together = 10 * (0 + 1 + 1 + math.sqrt(2)) / 4
    column = torch.tensor([0, 1, 0, 1])
    visible = torch.stack([column[:, None] == column, torch.ones(4, 4, dtype=torch.bool)])
    assert uniform_distance(joined, (2, 4), 10, visible) == pytest.approx((separate + together) / 2)
    everything = 10 * (0 + 3 + 1 + math.hypot(3, 1)) / 4
    assert uniform_distance(joined, (2, 4), 10) == pytest.approx((everything + together) / 2)


def test_uniform_attention_gives_the_mean_distance_of_all_pairs():
    num_patches = GRID[0] * GRID[1]
    uniform = torch.full((1, 2, num_patches, num_patches), 1 / num_patches)
    expected = patch_distances(GRID, PATCH).double().mean()
    torch.testing.assert_close(measured(uniform), expected.expand(2), rtol=1e-6, atol=0)


def test_the_stated_uniform_distance_is_what_uniform_attention_in_windows_gives():
    for attention in windows():
        sees = (attention.sees() & attention.is_patch[:, None]).float()
        uniform = (sees / sees.sum(-1, keepdim=True).clamp_min(1))[None, :, None]
        gathered = DistanceStatistic()
        gathered.begin(Images(torch.rand(1, 3, 8, 8)))
        gathered.add(0, attention._replace(weights=uniform))
        numbers = gathered.numbers()
        assert numbers["distance_renormalised"][0] == pytest.approx(numbers["uniform_distance"], rel=1e-5)


def test_looking_at_itself_is_distance_zero():
    assert measured(torch.eye(15).expand(2, 3, 15, 15)).tolist() == [0, 0, 0]


def test_looking_at_the_patch_beside_is_one_patch_size():
    neighbour = torch.zeros(15, 15)
    for query in range(15):
        column = query % GRID[1]
        neighbour[query, query + (1 if column < GRID[1] - 1 else -1)] = 1
    assert measured(neighbour.expand(2, 1, 15, 15)).tolist() == pytest.approx([PATCH])


def test_half_the_attention_on_the_class_token_halves_the_distance_unless_renormalised():
    attention = torch.zeros(1, 1, 16, 16)
    attention[..., 0] = 0.5
    attention[..., 1:] = 0.5 / 15
    uniform = patch_distances(GRID, PATCH).double().mean().item()
    found = attention_distance(seen(attention, 1))
    assert found.as_attended.item() == pytest.approx(uniform / 2)
    assert found.on_prefix.item() == pytest.approx(0.5)
    assert measured(attention, 1, renormalise=True).item() == pytest.approx(uniform)


def test_a_query_that_looks_at_no_patch_counts_zero():
    attention = torch.zeros(1, 1, 16, 16)
    attention[..., 0] = 1
    assert measured(attention, 1).tolist() == [0]


@given(shift=st.integers(1, 4), sharpness=st.floats(0, 30))
def test_bounded_by_the_diagonal_and_blind_to_mirroring(shift, sharpness):
    attention = random_attention(0, sharpness=sharpness).roll(shift, dims=1)
    value = measured(attention)
    diagonal = PATCH * math.hypot(GRID[0] - 1, GRID[1] - 1)
    assert torch.all((value >= 0) & (value <= diagonal * (1 + 1e-5)))
    torch.testing.assert_close(measured(attention.flip(-2, -1)), value, rtol=1e-5, atol=1e-6)


def test_distances_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"distances are \(15, 15\), but there are 1 windows of 16 tokens"):
        attention_distance(seen(random_attention(1), 1), patch_distances(GRID, PATCH))


def test_distances_between_tokens_are_those_between_their_patches():
    places = torch.tensor([[-1, *range(15)]])
    found = token_distances(places, GRID, PATCH)
    assert torch.equal(found[0, 1:, 1:], patch_distances(GRID, PATCH))
    assert not found[0, 0].any()
    assert not found[0, :, 0].any()


def batches(images: Tensor, sizes: int | list[int] = 8) -> list[Images]:
    return [Images(part) for part in images.split(sizes)]


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "embed_dim": 48, **args}).eval()


def test_numbers_equal_the_mean_over_images_however_they_are_batched():
    backbone, images = tiny(), torch.rand(5, 3, 64, 64)
    expected: list[Tensor] = []

    def visit(layer: int, attention: Attention) -> None:
        expected.append(attention_distance(attention).renormalised)

    observe_attention(backbone, images, visit)
    for sizes in ([5], [2, 2, 1], [4, 1]):
        found = analyze(
            [Observed("vit", backbone, batches(images, sizes))], AttentionDistanceConfig()
        ).numbers
        model = found["models"][0]
        torch.testing.assert_close(
            torch.tensor(model["distance"]).double(), torch.stack(expected), rtol=1e-5, atol=1e-5
        )
        assert model["num_images"] == 5


def test_numbers_are_plain_and_complete():
    models = [
        Observed("a", tiny(), batches(torch.rand(2, 3, 64, 64))),
        Observed("b", tiny(depth=3), batches(torch.rand(2, 3, 64, 64))),
    ]
    numbers = analyze(models, AttentionDistanceConfig(renormalise=False)).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    assert (numbers["analysis"], numbers["unit"], numbers["renormalised"]) == (
        "attention-distance",
        "pixel",
        False,
    )
    assert [model["name"] for model in numbers["models"]] == ["a", "b"]
    for model, depth in zip(numbers["models"], (2, 3), strict=True):
        assert [len(heads) for heads in model["distance"]] == [3] * depth
        assert model["mean"] == pytest.approx([sum(heads) / 3 for heads in model["distance"]])
        assert model["head_std"] == pytest.approx(
            [torch.tensor(h).std(correction=0).item() for h in model["distance"]], rel=1e-3
        )
        assert (model["patch_size"], model["image_size"]) == (16, 64)


def test_registers_without_class_token_are_dropped_too():
    args = {"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 3}
    backbone = build_timm("vit_little_patch16_reg1_gap_256", args)
    numbers = analyze(
        [Observed("m", backbone, batches(torch.rand(1, 3, 64, 64)))], AttentionDistanceConfig()
    ).numbers
    assert all(0 < value < 1 for heads in numbers["models"][0]["prefix_attention"] for value in heads)


def test_stops_after_the_images_asked_for():
    images = torch.rand(6, 3, 64, 64)
    backbone = tiny()
    few = analyze([Observed("m", backbone, batches(images, 2))], AttentionDistanceConfig(num_images=3))
    same = analyze([Observed("m", backbone, batches(images[:3]))], AttentionDistanceConfig())
    assert few.numbers["models"][0]["num_images"] == 3
    for one, other in zip(few.numbers["models"][0]["mean"], same.numbers["models"][0]["mean"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_nothing_to_observe_is_refused():
    with pytest.raises(DataError, match="no images to observe clip on"):
        analyze([Observed("clip", tiny(), [])], AttentionDistanceConfig())
    with pytest.raises(ConfigError, match="attention-distance needs a model"):
        analyze([], AttentionDistanceConfig())


def test_figure_shows_every_head_of_every_model_on_one_axis():
    models = [
        Observed("a", tiny(), batches(torch.rand(2, 3, 64, 64))),
        Observed("b", tiny(depth=3), batches(torch.rand(2, 3, 64, 64))),
    ]
    analysis = analyze(models, AttentionDistanceConfig())
    figure = analysis.figure()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes] == [6, 9]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_ylabel() == "attention distance (pixels)"
    all_heads = [value for heads in analysis.numbers["models"][0]["distance"] for value in heads]
    dots = figure.axes[0].collections[0].get_offsets()
    assert sorted(dots[:, 1]) == pytest.approx(sorted(all_heads))
    assert set(dots[:, 0]) == {1, 2}
    narrow = draw(analysis.numbers, width=3.7)
    bottoms = [axes.get_position().y0 for axes in narrow.axes]
    assert bottoms[0] > bottoms[1]


def test_other_units_and_the_refusal_of_pixels_of_different_sizes():
    models = [
        Observed("a", tiny(), batches(torch.rand(2, 3, 64, 64))),
        Observed("b", tiny(img_size=96), batches(torch.rand(2, 3, 96, 96))),
    ]
    with pytest.raises(ConfigError, match=r"pixels of different input sizes .* a 64, b 96"):
        analyze(models, AttentionDistanceConfig())
    analysis = analyze(models, AttentionDistanceConfig(unit="image"))
    model = analysis.numbers["models"][1]
    title, rows = summary(analysis.numbers)
    assert "% of the image's side" in title
    assert rows[1][2].startswith(f"{100 * model['mean'][0] / 96:.1f} ± ")
    assert analysis.figure().axes[0].get_ylabel() == "attention distance (% of the image's side)"
    patches = model["distance_in_patches"]
    torch.testing.assert_close(torch.tensor(patches) * 16, torch.tensor(model["distance"]))


def test_both_ways_of_treating_the_class_token_stand_in_the_numbers():
    observed = [Observed("a", tiny(), batches(torch.rand(2, 3, 64, 64)))]
    kept = analyze(observed, AttentionDistanceConfig(renormalise=False)).numbers["models"][0]
    scaled = analyze(observed, AttentionDistanceConfig()).numbers["models"][0]
    assert kept["distance"] == kept["distance_as_attended"] == scaled["distance_as_attended"]
    assert scaled["distance"] == scaled["distance_renormalised"] == kept["distance_renormalised"]
    assert kept["distance"] != scaled["distance"]
    assert scalars(scaled)["mean distance (pixels)"] == pytest.approx(sum(scaled["mean"]) / 2)
