import copy
import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.data.views import TwoViews, TwoViewsConfig
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.methods._network import NetworkConfig
from fdkit.methods.fast_moco import DEFAULTS, FastMoCo, FastMoCoConfig, build, divide
from fdkit.models.backbone import Backbone, Preprocessing
from fdkit.models.batch_norm import synchronise_batch_norm
from fdkit.models.tokens import map_tokens

SIZE = 12
HEADS = {"hidden_dim": 7, "output_dim": 5, "predictor_dim": 6}


def convolutions(num_divisions: int = 2, seed: int = 0) -> Backbone:
    """A small convolutional network that takes views and tiles, and keeps [0, 1] as it is."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    backbone = Backbone(
        synchronise_batch_norm(network),
        lambda network, images: map_tokens(network, network(images)),
        embed_dim=4,
        patch_size=2,
        num_prefix_tokens=0,
        preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), SIZE),
        recipe={"architecture": "convolutions"},
    )
    backbone.sizes = (SIZE // num_divisions,)
    return backbone


def tiny(seed: int = 0, **fields: Any) -> FastMoCo:
    """Fast-MoCo in double precision, with batch norms that do more than normalise."""
    config = FastMoCoConfig(**{**HEADS, **fields})
    student = convolutions(config.num_divisions, seed)
    other = None if config.momentum is None else convolutions(config.num_divisions, seed + 100)
    views = SimpleNamespace(num_views=2, image_size=SIZE)
    method = FastMoCo(student, views, config, momentum_student=other, seed=seed).double()
    generator = torch.Generator().manual_seed(5)
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.data += torch.rand(module.weight.shape, generator=generator, dtype=torch.float64)
            module.bias.data += torch.rand(module.bias.shape, generator=generator, dtype=torch.float64)
    return method.train()


def two_views(batch: int = 5, size: int = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the equation, in loops


def normalised(rows: list[Tensor], norm: Any) -> list[Tensor]:
    mean = sum(rows) / len(rows)
    variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias for row in rows]


def head_by_hand(rows: list[Tensor], head: nn.Module) -> list[Tensor]:
    for layer in head.children():
        if isinstance(layer, nn.Linear):
            rows = [layer.weight @ row + layer.bias for row in rows]
        elif isinstance(layer, nn.ReLU):
            rows = [row.clamp(min=0) for row in rows]
        else:
            rows = normalised(rows, layer)
    return rows


def encode_by_hand(images: list[Tensor], student: Backbone) -> list[Tensor]:
    """The mean over the map, of equally large images that share one batch norm."""
    network: Any = student.network.train()
    return list(network(torch.stack(images)).mean(dim=(2, 3)))


def combined_by_hand(parts: list[Tensor], config: FastMoCoConfig) -> Tensor:
    if config.combination == "max":
        return torch.stack([max(values) for values in zip(*parts, strict=True)])
    if config.combination == "weighted":
        assert config.gamma is not None
        return config.gamma * parts[0] + (1 - config.gamma) * parts[1]
    return sum(parts) / len(parts)  # type: ignore[return-value]


def queries_by_hand(method: FastMoCo, view: Tensor) -> list[list[Tensor]]:
    """Queries of each subset of tiles, one an image."""
    m, side = method.config.num_divisions, SIZE // method.config.num_divisions
    tiles = [
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for column in range(m)
        for row in range(m)
        for image in view
    ]
    features = encode_by_hand(tiles, method.student)
    batch = len(view)
    rows = [
        combined_by_hand([features[tile * batch + image] for tile in subset], method.config)
        for subset in combinations(range(m * m), method.config.num_combined)
        for image in range(batch)
    ]
    queries = head_by_hand(head_by_hand(rows, method.projector), method.predictor)
    return [queries[start : start + batch] for start in range(0, len(queries), batch)]


def info_nce_by_hand(queries: list[Tensor], keys: list[Tensor], temperature: float) -> Tensor:
    losses = []
    for i, query in enumerate(queries):
        scores = [query @ key / query.norm() / key.norm() / temperature for key in keys]
        losses.append(-(scores[i].exp() / sum(score.exp() for score in scores)).log())
    return sum(losses) / len(losses)  # type: ignore[return-value]


def loss_by_hand(method: FastMoCo, views: list[Tensor], *, momentum: float | None = None) -> Tensor:
    """The loss of one step; momentum: of the update before the targets, which is made in place, None for none."""
    queries = [queries_by_hand(method, view) for view in views]
    target, projector = method.momentum_student, method.momentum_projector
    if target is None or projector is None:
        target, projector = method.student, method.projector
    elif momentum is not None:
        for old, new in ((target, method.student), (projector, method.projector)):
            for old_p, new_p in zip(old.parameters(), new.parameters(), strict=True):
                old_p.data = momentum * old_p.data + (1 - momentum) * new_p.data
    with torch.no_grad():
        keys = [head_by_hand(encode_by_hand(list(view), target), projector) for view in views]
    temperature = method.config.temperature
    terms = [info_nce_by_hand(rows, keys[1], temperature) for rows in queries[0]]
    terms += [info_nce_by_hand(rows, keys[0], temperature) for rows in queries[1]]
    return sum(terms) / len(terms)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.3},
        {"num_combined": 1},
        {"num_combined": 3},
        {"num_combined": 4},
        {"num_divisions": 3, "num_combined": 8},
        {"combination": "weighted", "gamma": 0.2},
        {"combination": "max", "num_combined": 3},
        {"target": "shared", "momentum": None},
        {"num_divisions": 1, "num_combined": 1},
    ],
)
def test_a_step_is_the_equation_in_loops(fields: dict[str, Any]) -> None:
    method = tiny(**fields)
    expected_method = copy.deepcopy(method)
    loss, expected = (
        method(two_views(), 0.0)["loss"],
        loss_by_hand(expected_method, two_views(), momentum=0.99),
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10, check_dtype=False)


@pytest.mark.parametrize("fields", [{}, {"target": "shared", "momentum": None}])
def test_gradients_are_those_of_the_equation_in_loops(fields: dict[str, Any]) -> None:
    """The target has none, not even where it comes from the same network."""
    method = tiny(**fields)
    by_hand = copy.deepcopy(method)
    loss_by_hand(by_hand, two_views(), momentum=0.99).backward()
    method(two_views(), 0.0)["loss"].backward()
    expected = grads(by_hand)
    assert expected.keys() == grads(method).keys()
    for name, gradient in grads(method).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-12, msg=name)


# --- the card's facts


def test_six_pairs_of_four_tiles_use_each_tile_three_times() -> None:
    subsets = tiny().subsets
    assert len(subsets) == 6
    assert all(sum(tile in subset for subset in subsets) == 3 for tile in range(4))


def test_tiles_are_cut_down_the_columns() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tiles = divide(images, 2)
    assert tiles.shape == (8, 3, 2, 3)
    assert torch.equal(tiles[2:4], images[:, :, 2:, :3])  # below the first
    assert torch.equal(tiles[4:6], images[:, :, :2, 3:])  # right of it


def test_the_mean_colour_of_all_combinations_is_that_of_the_view() -> None:
    method = tiny()
    view = two_views()[0]
    colours = divide(view, 2).mean(dim=(2, 3))
    combined = method._combine(colours)
    assert combined.shape == (6 * 5, 3)
    torch.testing.assert_close(combined.unflatten(0, (6, 5)).mean(dim=0), view.mean(dim=(2, 3)))


def test_uniform_logits_cost_ln_n_whatever_the_temperature() -> None:
    for temperature in (1.0, 0.2):
        method = tiny(temperature=temperature)
        with torch.no_grad():
            method.predictor[-1].weight.zero_()
            method.predictor[-1].bias.fill_(1.0)
            last = method.momentum_projector[-1]  # type: ignore[index]
            for norm in (last, method.projector[-1]):
                norm.weight.zero_()
                norm.bias.fill_(1.0)
        assert method(two_views(8), 0.0)["loss"].item() == pytest.approx(math.log(8))


def sizes_seen(backbone: Backbone) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    backbone.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def test_the_student_sees_tiles_and_the_target_whole_views() -> None:
    method = tiny()
    assert method.momentum_student is not None
    tiles, views = sizes_seen(method.student), sizes_seen(method.momentum_student)
    method(two_views(), 0.0)
    assert tiles == [(20, 3, 6, 6)] * 2
    assert views == [(5, 3, 12, 12)] * 2


def test_plausible_mistakes_give_another_loss() -> None:
    loss = tiny()(two_views(), 0.0)["loss"].item()
    views = two_views()
    stale = loss_by_hand(tiny(), views).item()  # targets before the momentum update
    same_view = loss_by_hand_of_same_view(tiny(), views)
    late = loss_of_combined_projections(tiny(), views)
    for wrong in (stale, same_view, late, 2 * loss):
        assert abs(wrong - loss) > 1e-4


def loss_by_hand_of_same_view(method: FastMoCo, views: list[Tensor]) -> float:
    return (
        loss_by_hand(method, [views[0]] * 2, momentum=0.99)
        + loss_by_hand(method, [views[1]] * 2, momentum=0.99)
    ).item() / 2


def loss_of_combined_projections(method: FastMoCo, views: list[Tensor]) -> float:
    """Tiles are projected first and combined afterwards."""
    projector, combine = method.projector, method._combine
    method.projector = nn.Identity()  # type: ignore[assignment]
    method._combine = lambda rows: combine(projector(rows))  # type: ignore[method-assign]
    method._is_momentum_due = False
    return method(views, 0.0)["loss"].item()


def test_swapping_the_views_and_turning_the_tiles_leaves_the_loss() -> None:
    loss = tiny()(two_views(), 0.0)["loss"]
    torch.testing.assert_close(tiny()(two_views()[::-1], 0.0)["loss"], loss)
    method = tiny()
    method.subsets = [(3 - first, 3 - second) for first, second in method.subsets]
    torch.testing.assert_close(method(two_views(), 0.0)["loss"], loss)


# --- training


@pytest.mark.parametrize("target", ["independent", "shared"])
def test_gradients_reach_everything_that_trains_and_nothing_else(target: str) -> None:
    method = tiny(target=target, momentum=None if target == "shared" else 0.9)
    method(two_views(), 0.0)["loss"].backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trained
    assert not any(name.startswith("momentum_") for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"student", "projector", "predictor"}


def test_the_momentum_encoder_moves_once_an_optimiser_step_by_a_constant_share() -> None:
    method = tiny(momentum=0.75)
    assert method.momentum_student is not None
    old, new = method.momentum_student.network[0].weight, method.student.network[0].weight
    start = old.clone()
    method(two_views(), 0.5)
    expected = 0.75 * start + 0.25 * new
    torch.testing.assert_close(old, expected.detach())
    method(two_views(), 0.5)  # the second part of the same step
    torch.testing.assert_close(old, expected.detach())
    method.after_step(0.5)
    method(two_views(), 0.6)
    assert not torch.allclose(old, expected)


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_leaves_the_momentum_encoder_alone(how: str) -> None:
    method = tiny().train(how != "eval")
    assert method.momentum_student is not None
    start = method.momentum_student.network[0].weight.clone()
    with torch.set_grad_enabled(how != "no_grad"):
        assert method(two_views(), 0.1)["loss"].isfinite()
    assert torch.equal(start, method.momentum_student.network[0].weight)


# --- building


def network(**fields: Any) -> NetworkConfig:
    return NetworkConfig(architecture="resnet10t", pooling="patches", **fields)


def small(target: str, image_size: int = 64, **fields: Any) -> FastMoCo:
    momentum = None if target == "shared" else 0.99
    config = FastMoCoConfig(**{**HEADS, "target": target, "momentum": momentum})
    return build(config, TwoViewsConfig(image_size=image_size), network(**fields), seed=3)


def test_the_momentum_encoder_starts_where_it_is_told_to() -> None:
    for target, is_equal in (("independent", False), ("copy", True)):
        method = small(target)
        for part in ("student", "projector"):
            state = getattr(method, part).state_dict()
            old_state = getattr(method, f"momentum_{part}").state_dict()
            matrices = [key for key, value in state.items() if value.ndim > 1]
            assert state.keys() == old_state.keys()
            assert all(torch.equal(state[key], old_state[key]) == is_equal for key in matrices)
    assert small("shared").momentum_student is None
    for part in ("student", "projector", "predictor"):  # the target does not change the other draws
        states = [getattr(small(target), part).state_dict() for target in ("independent", "shared")]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_heads_are_those_of_the_paper() -> None:
    method = small("independent")
    kinds = ["Linear", "BatchNorm", "ReLU"]
    assert [type(layer).__name__ for layer in method.projector] == [*kinds, *kinds, "Linear", "BatchNorm"]
    assert [type(layer).__name__ for layer in method.predictor] == [*kinds, "Linear"]
    layers = [*method.projector, *method.predictor]
    assert all(layer.bias is not None for layer in layers if not isinstance(layer, nn.ReLU))
    default = FastMoCoConfig()
    assert (default.hidden_dim, default.output_dim, default.predictor_dim) == (2048, 2048, 512)


def test_the_defaults_are_the_published_ones() -> None:
    views = TwoViews(TwoViewsConfig(**DEFAULTS["views"]))
    assert (views.config.min_scale, views.config.interpolation) == (0.2, "bicubic")
    for strengths in views.strengths:
        assert (strengths.brightness, strengths.contrast, strengths.saturation, strengths.hue) == (
            0.4,
            0.4,
            0.4,
            0.1,
        )
        assert (strengths.blur_probability, strengths.solarize_probability) == (0.5, 0.0)
    assert DEFAULTS["network"] == {"architecture": "resnet50", "pooling": "patches"}


def test_a_vision_transformer_takes_tiles_as_small_images() -> None:
    vit = NetworkConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    )
    method = build(FastMoCoConfig(**HEADS), TwoViewsConfig(image_size=16), vit, seed=0)
    assert method.student(torch.rand(2, 3, 8, 8)).grid == (2, 2)
    assert method.student(torch.rand(2, 3, 16, 16)).grid == (4, 4)
    method([torch.rand(3, 3, 16, 16) for _ in range(2)], 0.0)["loss"].backward()
    assert grads(method).keys() == {name for name, p in method.named_parameters() if p.requires_grad}


# --- wrong input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_combined": 5}, "num_combined 5: 2 divisions a side make 4 tiles"),
        ({"combination": "weighted", "gamma": 0.5, "num_combined": 3}, "weighs 2 tiles, not 3"),
        ({"combination": "weighted"}, "weighted and fast_moco.gamma None do not go together"),
        ({"gamma": 0.5}, "mean and fast_moco.gamma 0.5 do not go together"),
        ({"target": "shared"}, "shared and fast_moco.momentum 0.99 do not go together"),
        ({"momentum": None}, "independent and fast_moco.momentum None do not go together"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FastMoCoConfig(**fields)


def test_views_that_tiles_do_not_fill_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_divisions 2 does not divide the 33 pixels of a view"):
        small("independent", image_size=33)


def test_a_network_that_would_resize_tiles_is_refused() -> None:
    student = convolutions()
    student.sizes = ()
    views = SimpleNamespace(num_views=2, image_size=SIZE)
    with pytest.raises(ConfigError, match="would resize tiles of 6 pixels"):
        FastMoCo(student, views, FastMoCoConfig(**HEADS), momentum_student=convolutions(), seed=0)


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot normalise a single image"):
        tiny().begin(Duration(num_steps=10, batch_size=1, part_size=1))


def test_other_than_two_views_are_refused() -> None:
    views = SimpleNamespace(num_views=1, image_size=SIZE)
    with pytest.raises(ConfigError, match="the views make 1"):
        FastMoCo(convolutions(), views, FastMoCoConfig(**HEADS), momentum_student=convolutions(), seed=0)


# --- two processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    method = tiny()
    parallel = DistributedDataParallel(method)
    scalars = parallel([view.chunk(2)[rank] for view in two_views(6)], 0.0)
    scalars["loss"].backward()
    result = {"loss": scalars["loss"].detach(), "grads": grads(method), "state": method.state_dict()}
    torch.save(result, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    method = tiny()
    loss = method(two_views(6), 0.0)["loss"]
    loss.backward()
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach())
    for result in ranks:
        for key, gradient in grads(method).items():
            torch.testing.assert_close(result["grads"][key], gradient, rtol=1e-6, atol=1e-9, msg=key)
        for key, value in method.state_dict().items():
            torch.testing.assert_close(result["state"][key], value, msg=key)
