import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor, nn

from fdkit.analysis._directions import (
    axis,
    filter_normalised,
    is_table,
    principal_path,
    random_direction,
    span,
    walk,
)
from fdkit.errors import DataError
from fdkit.models.libraries import build_open_clip, build_timm

ARGS = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def parameters(name: str = "vit_tiny_patch16_224", **args) -> dict[str, Tensor]:
    return dict(build_timm(name, {**ARGS, **args}).network.named_parameters())


def norms_by_loops(weights: Tensor) -> list[float]:
    """The length of each output's weights, one number at a time."""
    return [math.sqrt(sum(value**2 for value in row.flatten().tolist())) for row in weights]


def test_every_filter_is_moved_by_its_own_length() -> None:
    weights = parameters()
    direction = random_direction(weights, seed=3, number=0)
    for name in (
        "patch_embed.proj.weight",
        "blocks.1.attn.qkv.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    ):
        assert norms_by_loops(direction[name]) == pytest.approx(norms_by_loops(weights[name]), rel=1e-4)
    # Scaling the layer as a whole, the easy mistake, keeps the layer's norm and not the filters'.
    name = "patch_embed.proj.weight"
    drawn = torch.randn(weights[name].shape)
    layer_wise = drawn * (weights[name].norm() / drawn.norm())
    assert layer_wise.norm().item() == pytest.approx(weights[name].norm().item(), rel=1e-4)
    assert norms_by_loops(layer_wise) != pytest.approx(norms_by_loops(weights[name]), rel=1e-2)


def test_a_filter_by_hand_and_one_of_norm_zero() -> None:
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
    drawn = torch.tensor([[1.0, 0.0], [5.0, 5.0], [1.0, 1.0]])
    expected = torch.tensor([[5.0, 0.0], [0.0, 0.0], [math.sqrt(2), math.sqrt(2)]])
    torch.testing.assert_close(filter_normalised("fc.weight", drawn, weights), expected)
    assert not filter_normalised("fc.weight", torch.zeros(3, 2), weights).any()


def test_norms_biases_tokens_and_tables_stay() -> None:
    weights = parameters()
    direction = random_direction(weights, seed=0, number=0)
    assert all(weights[name].ndim >= 2 for name in direction)
    assert {"cls_token", "pos_embed"} <= weights.keys() - direction.keys()
    moved = random_direction(weights, seed=0, number=0, tables=True)
    assert moved.keys() - direction.keys() == {"cls_token", "pos_embed"}
    rows = moved["pos_embed"].norm(dim=-1)
    torch.testing.assert_close(rows, weights["pos_embed"].detach().norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(moved[name], direction[name]) for name in direction)


@pytest.mark.parametrize(
    ("name", "args", "tables"),
    [
        (
            "beit_base_patch16_224",
            {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "global_pool": "token"},
            {"cls_token", "rel_pos_bias.relative_position_bias_table"},
        ),
        ("resnet10t", None, set()),
        (
            "swinv2_tiny_window8_256",
            {
                "img_size": 32,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": (1, 1),
                "num_heads": (1, 2),
                "window_size": 4,
            },
            {f"layers.{i}.blocks.0.attn.logit_scale" for i in range(2)},
        ),
    ],
)
def test_tables_are_told_from_weights(name: str, args: dict | None, tables: set[str]) -> None:
    weights = (
        parameters(name, **args)
        if args and name.startswith("beit")
        else dict(build_timm(name, args or {}).network.named_parameters())
    )
    assert {key for key, value in weights.items() if is_table(key, value)} == tables
    direction = random_direction(weights, seed=0, number=0)
    assert direction.keys() == {key for key, value in weights.items() if value.ndim > 1} - tables


def test_the_projection_of_open_clip_has_its_outputs_in_columns() -> None:
    network = build_open_clip("ViT-S-32", {"image_size": 32}).network
    weights = {
        name: value for name, value in network.named_parameters() if name in ("proj", "positional_embedding")
    }
    direction = random_direction(weights, seed=0, number=0)
    assert direction.keys() == {"proj"}
    torch.testing.assert_close(direction["proj"].norm(dim=0), weights["proj"].detach().norm(dim=0))


def test_two_models_of_one_architecture_are_moved_alike() -> None:
    first, second = parameters(), parameters()
    one, other = (
        random_direction(weights, seed=7, number=1) for weights in (first, dict(reversed(second.items())))
    )
    for name, moved in one.items():
        cosines = torch.cosine_similarity(moved.flatten(1), other[name].flatten(1))
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-5, atol=0)
        assert not torch.equal(first[name], second[name])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = random_direction(first, seed=7, number=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(again[name], one[name]) for name in one)
    for changed in (random_direction(first, seed=8, number=1), random_direction(first, seed=7, number=0)):
        for name in ("head.weight", "blocks.0.mlp.fc1.weight"):
            assert torch.cosine_similarity(changed[name].flatten(), one[name].flatten(), dim=0).abs() < 0.4
    twins = torch.cosine_similarity(
        one["blocks.0.mlp.fc1.weight"].flatten(), one["blocks.1.mlp.fc1.weight"].flatten(), dim=0
    )
    assert twins.abs() < 0.2  # two layers of one shape are not moved alike


class Bowl(nn.Module):
    """The loss 3 a² + b² / 2 + a b of two weights, as matrices of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.1]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([[0.3]], dtype=torch.float64))

    def forward(self) -> Tensor:
        return (3 * self.a**2 + self.b**2 / 2 + self.a * self.b).sum()


def test_a_walk_measures_the_exact_quadratic_and_puts_the_weights_back_to_the_bit() -> None:
    bowl = Bowl()
    weights = dict(bowl.named_parameters())
    before = {name: value.detach().clone() for name, value in weights.items()}
    directions = [
        {"a": torch.tensor([[2.0]]).double()},
        {"a": torch.tensor([[1.0]]).double(), "b": torch.tensor([[-1.0]]).double()},
    ]
    steps = [(x, y) for y in axis(1.5, 5) for x in axis(0.3, 3)]
    found = walk(weights, directions, steps, lambda: (bowl().item(), 0.0))
    for (x, y), (loss, _) in zip(steps, found, strict=True):
        a, b = 0.1 + 2 * x + y, 0.3 - y
        assert loss == pytest.approx(3 * a * a + b * b / 2 + a * b, rel=1e-12)
    # Stepping back by subtraction, the easy mistake, leaves rounding behind.
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert found[steps.index((0.0, 0.0))][0] == bowl().item()


def test_weights_are_put_back_after_an_error_too_even_odd_ones() -> None:
    weights = {"w": nn.Parameter(torch.tensor([[0.1, -0.0, 3e-41]])), "still": nn.Parameter(torch.ones(1, 1))}
    bits = weights["w"].detach().view(torch.int32).clone()

    def fail() -> tuple[float, float]:
        assert not torch.equal(weights["w"].detach().view(torch.int32), bits)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        walk(weights, [{"w": torch.ones(1, 3)}], [(0.7,)], fail)
    assert torch.equal(weights["w"].detach().view(torch.int32), bits)
    assert not weights["w"].grad_fn


def made_path(num_stops: int, *, seed: int = 0) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 5), "a.bias": (4,), "conv.weight": (2, 3, 2, 2)}
    end = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    stops = [
        {
            name: value + (num_stops - turn) * torch.randn(value.shape, generator=generator)
            for name, value in end.items()
        }
        for turn in range(num_stops)
    ]
    return stops, end


def flat(weights: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([value.flatten() for value in weights.values()]).double().numpy()


@pytest.mark.parametrize("num_stops", [3, 6])
def test_the_path_has_the_components_that_scikit_learn_finds(num_stops: int) -> None:
    stops, end = made_path(num_stops)
    offsets = np.stack([flat(stop) - flat(end) for stop in stops])
    path = principal_path(stops, end)
    expected = PCA(n_components=2).fit(offsets)
    assert path.explained == pytest.approx(tuple(expected.explained_variance_ratio_), rel=1e-5)
    for number, direction in enumerate(path.directions):
        assert abs(flat(direction) @ expected.components_[number]) == pytest.approx(1, rel=1e-5)
        assert np.linalg.norm(flat(direction)) == pytest.approx(1, rel=1e-5)
        assert path.places[:, number].tolist() == pytest.approx(
            list(offsets @ flat(direction)), rel=1e-4, abs=1e-5
        )
    assert path.distances.tolist() == pytest.approx(list(np.linalg.norm(offsets, axis=1)), rel=1e-5)
    assert (path.places[0] >= 0).all()
    assert "a.bias" in path.directions[0]
    assert path.directions[0]["a.bias"].any()
    # Components of offsets that are not centred, the easy mistake, are others.
    raw = np.linalg.svd(offsets, full_matrices=False)[2][0]
    assert abs(raw @ expected.components_[0]) < 0.999
    assert abs(flat(path.directions[0]) @ raw) < 0.999


def test_a_path_within_a_plane_is_all_in_it() -> None:
    stops, end = made_path(3)
    along = [stops[0], stops[1], end, {n: (stops[0][n] + stops[1][n]) / 2 for n in end}]
    path = principal_path(along, end)
    assert sum(path.explained) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(path.places.norm(dim=1), path.distances, rtol=1e-4, atol=1e-5)
    assert path.distances[2] == 0


@pytest.mark.parametrize("num_stops", [1, 2])
def test_a_line_is_no_plane(num_stops: int) -> None:
    stops, end = made_path(num_stops)
    with pytest.raises(DataError, match=f"the {num_stops} checkpoints lie on one line") as caught:
        principal_path(stops, end)
    assert "--train.keep-checkpoints" in caught.value.hint
    direction = stops[0]
    on_a_line = [{n: end[n] + step * direction[n] for n in end} for step in (4.0, 2.0, 1.0)]
    with pytest.raises(DataError, match="the 3 checkpoints lie on one line"):
        principal_path(on_a_line, end)
    with pytest.raises(DataError, match="on one line"):
        principal_path([end, end, end], end)


@given(extent=st.floats(0.01, 100), half=st.integers(1, 30))
def test_an_odd_axis_has_an_exact_middle_and_equal_steps(extent: float, half: int) -> None:
    steps = axis(extent, 2 * half + 1)
    assert steps[half] == 0
    assert (steps[0], steps[-1]) == (-extent, extent)
    assert np.diff(steps).tolist() == pytest.approx([extent / half] * (2 * half))


def test_a_span_reaches_beyond_the_path_and_its_end() -> None:
    assert span([4.0, 2.0], 3) == [-1.0, 2.0, 5.0]
    assert span([-4.0, -2.0], 5)[0] == -5.0
