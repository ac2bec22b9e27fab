import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.commands import pretrain
from fdkit.config import find_recipe, read_yaml, validate
from fdkit.data.views import TwoViewsConfig
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.methods._network import NetworkConfig
from fdkit.methods.simclr import SimCLR, SimCLRConfig, build, normalised_cross_entropy

VIT: dict[str, Any] = {"model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}}
RESNET: dict[str, Any] = {"architecture": "resnet10t", "pooling": "patches"}


def tiny(network: dict[str, Any] = VIT, *, image_size: int = 8, seed: int = 0, **fields: Any) -> SimCLR:
    config = SimCLRConfig(**{"output_dim": 6, **fields})
    return build(config, TwoViewsConfig(image_size=image_size), NetworkConfig(**network), seed=seed)


def two_views(batch: int = 5, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, size, size, generator=generator) for _ in range(2)]


def rows(batch: int = 4, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    return first, second


def loss_of(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    return normalised_cross_entropy(first, second, temperature=temperature).loss


def loss_by_loops(first: Tensor, second: Tensor, temperature: float) -> float:
    """Sum over all 2N anchors of -log of the share of the other view among all views but the anchor, over N."""
    views = [row / row.norm() for row in [*first.detach(), *second.detach()]]
    num_images, total = len(first), 0.0
    for i, anchor in enumerate(views):
        other = (i + num_images) % (2 * num_images)
        shares = [
            math.exp(float(torch.dot(anchor, view)) / temperature) for k, view in enumerate(views) if k != i
        ]
        total -= math.log(math.exp(float(torch.dot(anchor, views[other])) / temperature) / sum(shares))
    return total / num_images


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the loss


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("batch", [2, 4, 7])
def test_the_loss_matches_naive_loops(batch: int, temperature: float) -> None:
    first, second = rows(batch)
    expected = loss_by_loops(first, second, temperature)
    assert loss_of(first, second, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_equal_features_cost_ln_of_all_other_views_in_each_direction() -> None:
    same = torch.ones(8, 6)
    assert loss_of(same, same).item() == pytest.approx(2 * math.log(2 * 8 - 1), abs=1e-5)


def test_an_anchor_is_not_among_its_own_candidates() -> None:
    views = torch.eye(4, 6, dtype=torch.float64)
    one = math.exp(1 / 0.5)
    expected = -2 * math.log(one / (one + 6))  # 2N - 2 others at cosine 0
    with_itself = -2 * math.log(one / (2 * one + 6))
    assert loss_of(views, views, 0.5).item() == pytest.approx(expected, rel=1e-12)
    assert abs(with_itself - expected) > 0.1


def test_candidates_of_the_same_augmentation_count() -> None:
    """MoCo v3's candidates, the N of the other view alone, are another loss."""
    first, second = rows()
    cosines = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
    labels = torch.arange(len(first))
    other_alone = sum(nn.functional.cross_entropy(scores / 0.1, labels) for scores in (cosines, cosines.T))
    assert loss_of(first, second) > other_alone + 0.01


def test_directions_are_added_not_averaged_over_all_anchors() -> None:
    first, second = rows()
    views = nn.functional.normalize(torch.cat([first, second]), dim=1)
    scores = (views @ views.T / 0.1).fill_diagonal_(-torch.inf)
    labels = torch.arange(8).roll(4)
    mean_over_anchors = nn.functional.cross_entropy(scores, labels)
    torch.testing.assert_close(loss_of(first, second), 2 * mean_over_anchors)


def test_the_loss_does_not_know_the_order_of_images_nor_of_views_nor_any_length() -> None:
    first, second = rows()
    loss = loss_of(first, second)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss_of(first[order], second[order]), loss)
    torch.testing.assert_close(loss_of(second, first), loss)
    torch.testing.assert_close(loss_of(first * 7, second * 0.1), loss)
    assert abs(loss_of(first[order], second) - loss) > 0.1


def test_the_gradient_flows_through_anchors_and_candidates() -> None:
    first, second = rows(3, 4)
    both = torch.stack([first, second])
    leaf = both.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(leaf[0], leaf[1], 0.5), leaf)
    step, numeric = 1e-6, torch.zeros_like(both)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in both.shape)).tolist():
        moved = [both.clone(), both.clone()]
        for sign, values in zip((1, -1), moved, strict=True):
            values[tuple(index)] += sign * step
        high, low = (loss_by_loops(values[0], values[1], 0.5) for values in moved)
        numeric[tuple(index)] = (high - low) / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_scalars_tell_matching_views_from_others() -> None:
    views = torch.eye(4, 6)
    found = normalised_cross_entropy(views, views, temperature=0.1)
    missed = normalised_cross_entropy(views, views.roll(1, dims=0), temperature=0.1)
    assert (found.positive_similarity.item(), found.top1.item()) == (1.0, 1.0)
    assert (missed.positive_similarity.item(), missed.top1.item()) == (0.0, 0.0)


def test_an_anchor_nearer_to_another_image_of_its_own_augmentation_is_not_found() -> None:
    first = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.0, -0.1]])  # nearest to each other
    second = torch.tensor(
        [[0.9, 0.5, 0.1], [0.9, -0.5, -0.1]]
    )  # nearest to the first views of their own images
    assert normalised_cross_entropy(first, second, temperature=0.1).top1.item() == 0.5


# --- a training step


def test_batch_norms_see_both_views_at_once() -> None:
    method, views = tiny().double(), [view.double() for view in two_views()]
    student, projector, apart = (
        copy.deepcopy(part) for part in (method.student, method.projector, method.projector)
    )
    features = [student(view).prefix[:, 0] for view in views]
    together = projector(torch.cat(features)).chunk(2)
    one_at_a_time = [apart(rows) for rows in features]
    scalars = method(views, 0.0)
    expected = loss_by_loops(together[0], together[1], 0.1)
    assert scalars["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert abs(loss_by_loops(one_at_a_time[0], one_at_a_time[1], 0.1) - expected) > 0.01
    assert method.projector[1].num_batches_tracked.item() == 1
    torch.testing.assert_close(method.projector[1].running_mean, projector[1].running_mean)


@pytest.mark.parametrize(("network", "size"), [(VIT, 8), (RESNET, 32)])
def test_gradients_reach_everything_that_trains_and_nothing_else(network: dict[str, Any], size: int) -> None:
    method = tiny(network, image_size=size)
    method(two_views(3, size), 0.0)["loss"].backward()
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trainable
    assert "projector.4.bias" not in trainable
    assert "projector.4.weight" in trainable


def test_looking_at_the_loss_in_eval_changes_nothing() -> None:
    method = tiny().eval()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        assert method(two_views(), 0.0)["loss"].isfinite()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_twenty_steps_learn_and_log_scalars() -> None:
    method, views = tiny(), two_views(16)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        scalars = method(views, step / 20)
        optimiser.zero_grad()
        scalars["loss"].backward()
        optimiser.step()
        method.after_step(step / 20)
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert scalars.keys() == {"loss", "positive_similarity", "top1", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]


def test_a_collapse_shows_in_feature_std() -> None:
    method = tiny()
    with torch.no_grad():
        healthy = method(two_views(), 0.0)["feature_std"]
        method.student.network.norm.weight.mul_(1e-4)
        method.student.network.norm.bias.fill_(1.0)
        collapsed = method(two_views(), 0.0)["feature_std"]
    assert collapsed < 0.01 * healthy


def test_a_batch_cached_at_the_network_is_the_whole_batch() -> None:
    whole = tiny().double()
    parts = copy.deepcopy(whole)
    parts.student.num_parts = 3
    views = [view.double() for view in two_views()]
    losses = [method(views, 0.0)["loss"] for method in (whole, parts)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    expected = grads(whole)
    for name, gradient in grads(parts).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_resumed_run_goes_on_exactly() -> None:
    whole, first = tiny(), tiny()
    for method in (whole, first):
        method(two_views(), 0.0)
    resumed = tiny(seed=9)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed(two_views(), 0.5)["loss"], whole(two_views(), 0.5)["loss"])
    assert torch.equal(resumed.eval()(two_views(), 0.5)["loss"], whole.eval()(two_views(), 0.5)["loss"])


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = tiny()(two_views(), 0.0)
    assert scalars["loss"].dtype == torch.float32
    scalars["loss"].backward()


# --- the network, the views and the recipes


def test_the_projector_is_that_of_the_paper() -> None:
    projector = tiny(num_projector_layers=3).projector
    kinds = [type(layer).__name__ for layer in projector]
    assert kinds == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    linear = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(16, 16), (16, 16), (16, 6)]
    assert all(layer.bias is None for layer in linear)
    assert [projector[index].bias.requires_grad for index in (1, 4, 7)] == [True, True, False]
    assert [projector[index].eps for index in (1, 4, 7)] == [1e-5] * 3
    assert [projector[index].momentum for index in (1, 4, 7)] == [0.1] * 3  # 0.9 of the old, 0.1 of the new


def test_matrices_of_the_projector_start_small() -> None:
    weight = tiny(hidden_dim=200, output_dim=150).projector[3].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_defaults_are_the_published_ones_and_leave_images_unnormalised() -> None:
    config: Any = validate(pretrain.config_class("simclr"), {"data": "demo"}, "test")
    assert (config.network.architecture, config.network.pooling) == ("resnet50", "patches")
    assert (config.network.mean, config.network.std) == ((0, 0, 0), (1, 1, 1))
    views = config.views
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (views.blur_probability, views.solarize_probability) == ((0.5, 0.5), (0, 0))
    assert (config.simclr.num_projector_layers, config.simclr.output_dim, config.simclr.temperature) == (
        2,
        128,
        0.1,
    )
    method = build(
        config.simclr,
        TwoViewsConfig(image_size=8),
        NetworkConfig(**VIT, mean=(0, 0, 0), std=(1, 1, 1)),
        seed=0,
    )
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(method.student.normalise(image), image)


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay", "frozen"),
    [
        ("simclr", 4.8, 1e-6, False),
        ("simclr_vitb", 3.2e-3, 0.1, False),
        ("simclr_vitb_frozen", 3.2e-3, 0.1, True),
    ],
)
def test_recipes_hold_the_published_numbers(name: str, lr: float, weight_decay: float, frozen: bool) -> None:
    recipe = read_yaml(find_recipe(name, "pretrain"))
    config: Any = validate(pretrain.config_class("simclr"), {"data": "x", **recipe}, name)
    assert config.optim.lr * config.train.batch_size / 256 == pytest.approx(lr)
    assert (config.train.batch_size, config.train.epochs) == (4096, 100)
    assert (config.optim.weight_decay, config.optim.clip_grad) == (weight_decay, None)
    assert config.network.freeze_patch_projection is frozen


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    states = [tiny(seed=seed).state_dict() for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_other_than_two_views_are_refused() -> None:
    method = tiny()
    method.views.num_views = 3
    with pytest.raises(ConfigError, match="SimCLR compares 2 views of an image; the views make 3"):
        SimCLR(method.student, method.views, method.config, seed=0)


def test_a_single_image_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size 1: a batch norm \(projector.1\)"):
        tiny().begin(Duration(batch_size=1, part_size=1))


# --- two processes


def cases() -> list[tuple[str, SimCLR, list[Tensor]]]:
    """Double precision, so that the order of sums does not show."""
    return [
        ("vit", tiny(temperature=0.5).double(), [view.double() for view in two_views(6)]),
        ("resnet", tiny(RESNET, image_size=32).double(), [view.double() for view in two_views(6, 32)]),
    ]


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    for name, method, views in cases():
        parallel = DistributedDataParallel(method, broadcast_buffers=False)
        scalars = parallel([view.chunk(2)[rank] for view in views], 0.25)
        scalars["loss"].backward()
        results[name] = {
            "loss": scalars["loss"].detach(),
            "grads": grads(method),
            "state": method.state_dict(),
        }
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, method, views in cases():
        loss = method(views, 0.25)["loss"]
        loss.backward()
        torch.testing.assert_close((ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2, loss.detach())
        for key, grad in grads(method).items():
            for result in ranks:
                torch.testing.assert_close(result[name]["grads"][key], grad, rtol=1e-6, atol=1e-9, msg=key)
        for key, value in method.state_dict().items():
            torch.testing.assert_close(ranks[1][name]["state"][key], value, rtol=1e-7, atol=1e-9, msg=key)
