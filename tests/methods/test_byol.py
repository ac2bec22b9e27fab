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
from fdkit.methods.byol import BYOL, BYOLConfig, build, squared_distance

VIT: dict[str, Any] = {
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "pooling": "cls",
}
RESNET: dict[str, Any] = {"architecture": "resnet10t", "pooling": "patches"}


def tiny(network: dict[str, Any] = VIT, *, image_size: int = 8, seed: int = 0, **fields: Any) -> BYOL:
    config = BYOLConfig(**{"hidden_dim": 12, "output_dim": 6, **fields})
    return build(config, TwoViewsConfig(image_size=image_size), NetworkConfig(**network), seed=seed)


def two_views(batch: int = 5, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]


def distance_by_loops(predictions: Tensor, targets: Tensor) -> float:
    """Mean over images of the squared distance of the two vectors, each scaled to length 1."""
    total = 0.0
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        lengths = [math.sqrt(sum(value**2 for value in vector)) for vector in (prediction, target)]
        total += sum((p / lengths[0] - t / lengths[1]) ** 2 for p, t in zip(prediction, target, strict=True))
    return total / len(predictions)


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the loss


def test_the_distance_matches_naive_loops_and_two_minus_two_cosines() -> None:
    predictions, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    distance = squared_distance(predictions, targets)
    assert distance.item() == pytest.approx(distance_by_loops(predictions, targets), rel=1e-12)
    cosines = nn.functional.cosine_similarity(predictions, targets, dim=1)
    torch.testing.assert_close(distance, (2 - 2 * cosines).mean())


def test_the_distance_lies_between_0_and_4_and_ignores_lengths() -> None:
    rows, others = torch.randn(2, 5, 7, dtype=torch.float64)
    assert squared_distance(rows, rows).item() == pytest.approx(0, abs=1e-12)
    assert squared_distance(rows, -rows).item() == pytest.approx(4)
    torch.testing.assert_close(squared_distance(rows * 7, others * 0.1), squared_distance(rows, others))


def test_the_loss_is_about_4_at_first() -> None:
    """Predictions of a new student have nothing to do with projections of a target that starts elsewhere."""
    losses = [tiny(output_dim=64, seed=seed).double()(two_views(), 0.0)["loss"].item() for seed in range(8)]
    assert sum(losses) / len(losses) == pytest.approx(4, abs=0.3)


def forward_by_hand(method: BYOL, views: list[Tensor]) -> float:
    """Both directions added up, view by view, from copies of the method's parts."""
    student, projector, predictor, target, target_projector = (
        copy.deepcopy(part)
        for part in (
            method.student,
            method.projector,
            method.predictor,
            method.target_student,
            method.target_projector,
        )
    )
    predictions = [predictor(projector(student(view).prefix[:, 0])) for view in views]
    targets = [target_projector(target(view).prefix[:, 0]) for view in views]
    return distance_by_loops(predictions[0], targets[1]) + distance_by_loops(predictions[1], targets[0])


def test_a_forward_pass_adds_up_both_directions_of_one_view_at_a_time() -> None:
    method = tiny().double()
    expected = forward_by_hand(method, two_views())
    scalars = method(two_views(), 0.0)
    assert scalars["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert scalars["positive_similarity"].item() == pytest.approx((4 - expected) / 4, rel=1e-9)
    counts = {int(value) for key, value in method.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {2}


def test_the_loss_does_not_know_which_view_is_first() -> None:
    views = two_views()
    torch.testing.assert_close(tiny().double()(views, 0.0)["loss"], tiny().double()(views[::-1], 0.0)["loss"])


# --- a training step


@pytest.mark.parametrize(("network", "size"), [(VIT, 8), (RESNET, 32)])
def test_gradients_reach_the_student_and_its_heads_and_never_the_target(
    network: dict[str, Any], size: int
) -> None:
    method = tiny(network, image_size=size).double()
    method(two_views(3, size), 0.0)["loss"].backward()
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trainable
    assert {name.partition(".")[0] for name in trainable} == {"student", "projector", "predictor"}


def steps(method: BYOL, num_steps: int, total: int) -> list[dict[str, Tensor]]:
    """Target parameters after each of some steps of SGD, as the loop makes them."""
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    history = []
    for step in range(num_steps):
        optimiser.zero_grad()
        method(two_views(), step / total)["loss"].backward()
        optimiser.step()
        method.after_step(step / total)
        history.append(target_parameters(method))
    return history


def target_parameters(method: BYOL) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.named_parameters() if name.startswith("target_")}


def steps_by_hand(method: BYOL, num_steps: int, total: int) -> list[dict[str, Tensor]]:
    """The same, written out: a plain gradient step, then each target parameter moves to its updated counterpart."""
    history = []
    for step in range(num_steps):
        method.zero_grad()
        method(two_views(), step / total)["loss"].backward()
        parameters = dict(method.named_parameters())
        momentum = 1 - (1 - method.config.momentum) * (math.cos(math.pi * step / total) + 1) / 2
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
            for name, old in parameters.items():
                if name.startswith("target_"):
                    old.copy_(momentum * old + (1 - momentum) * parameters[name.removeprefix("target_")])
        history.append(target_parameters(method))
    return history


def test_the_target_follows_the_updated_student_with_the_momentum_of_the_step_just_made() -> None:
    results = steps(tiny(momentum=0.3).double(), 3, 5)
    expected = steps_by_hand(tiny(momentum=0.3).double(), 3, 5)
    for result, wanted in zip(results, expected, strict=True):
        assert result.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_following_before_the_step_or_by_the_next_steps_momentum_would_show() -> None:
    expected = steps_by_hand(tiny(momentum=0.3).double(), 1, 5)[0]
    before = tiny(momentum=0.3).double()
    before.after_step(0.0)
    late = tiny(momentum=0.3).double()
    late(two_views(), 0.0)["loss"].backward()
    with torch.no_grad():
        for parameter in late.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    late.after_step(1 / 5)
    for wrong in (before, late):
        apart = max((target_parameters(wrong)[name] - value).abs().max() for name, value in expected.items())
        assert apart > 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_momentum_1_keeps_the_target_as_it_is(schedule: str) -> None:
    method = tiny(momentum=1.0, momentum_schedule=schedule).double()
    start = target_parameters(method)
    end = steps(method, 2, 5)[-1]
    assert all(torch.equal(end[name], value) for name, value in start.items())


def test_momentum_0_makes_the_target_the_student() -> None:
    method = tiny(momentum=0.0, momentum_schedule="constant").double()
    end = steps(method, 1, 5)[0]
    for part in ("student", "projector"):
        for name, parameter in getattr(method, part).named_parameters():
            torch.testing.assert_close(end[f"target_{part}.{name}"], parameter.detach(), rtol=0, atol=1e-15)


def test_the_target_starts_from_other_weights_and_has_no_predictor() -> None:
    method = tiny()
    student, target = (
        part.network.blocks[0].attn.qkv.weight for part in (method.student, method.target_student)
    )
    assert not torch.allclose(student, target)
    assert not torch.allclose(method.projector[0].weight, method.target_projector[0].weight)
    assert not any("predictor" in name for name in target_parameters(method))
    assert method.exported is method.student


def test_batch_norm_of_the_target_lives_by_its_own_batches() -> None:
    method = tiny().double()
    steps(method, 2, 5)
    mine, theirs = method.projector[1], method.target_projector[1]
    assert theirs.training
    assert mine.num_batches_tracked.item() == theirs.num_batches_tracked.item() == 4
    assert not torch.allclose(mine.running_mean, theirs.running_mean)


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_leaves_the_target_alone(how: str) -> None:
    method = tiny().double().train(how != "eval")
    start = target_parameters(method)
    with torch.set_grad_enabled(how != "no_grad"):
        assert method(two_views(), 0.1)["loss"].isfinite()
    assert all(torch.equal(value, start[name]) for name, value in target_parameters(method).items())


def test_twenty_steps_learn_and_log_scalars() -> None:
    method, views = tiny(momentum=0.9).double(), two_views(16)
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
    assert scalars.keys() == {"loss", "positive_similarity", "projection_std", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]


def test_a_collapse_shows_in_both_spreads() -> None:
    method = tiny()
    views = [view.float() for view in two_views()]
    with torch.no_grad():
        healthy = method(views, 0.0)
        method.student.network.norm.weight.mul_(1e-4)
        method.student.network.norm.bias.fill_(1.0)
        method.projector[1].weight.mul_(1e-4)
        method.projector[1].bias.fill_(1.0)
        collapsed = method(views, 0.0)
    for name in ("projection_std", "feature_std"):
        assert collapsed[name] < 0.01 * healthy[name]


def test_a_resumed_run_goes_on_exactly() -> None:
    whole, first = tiny().double(), tiny().double()
    for method in (whole, first):
        steps(method, 2, 5)
    resumed = tiny(seed=9).double()
    resumed.load_state_dict(first.state_dict())
    for method in (whole, resumed):
        method.after_step(0.4)
    assert torch.equal(resumed(two_views(), 0.5)["loss"], whole(two_views(), 0.5)["loss"])
    assert all(
        torch.equal(value, target_parameters(whole)[name])
        for name, value in target_parameters(resumed).items()
    )


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = tiny()([view.float() for view in two_views()], 0.0)
    assert scalars["loss"].dtype == torch.float32
    scalars["loss"].backward()


# --- the network, the views and the recipes


def test_heads_have_hidden_biases_and_nothing_behind_their_last_matrix() -> None:
    method = tiny(num_projector_layers=3)
    kinds = [type(layer).__name__ for layer in method.projector]
    assert kinds == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in method.predictor] == kinds[3:]
    for head in (method.projector, method.predictor, method.target_projector):
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert [layer.bias is None for layer in linear] == [*[False] * (len(linear) - 1), True]
        norms = [layer for layer in head if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        assert all((norm.momentum, norm.eps, norm.affine) == (0.1, 1e-5, True) for norm in norms)
    assert [layer.out_features for layer in method.predictor if isinstance(layer, nn.Linear)] == [12, 6]


def test_matrices_of_heads_start_as_in_haiku() -> None:
    layer = tiny(hidden_dim=400, output_dim=300).predictor[0]
    std = 1 / math.sqrt(300)
    assert layer.weight.abs().max().item() <= 2 * std
    assert layer.weight.std().item() == pytest.approx(
        0.8796 * std, rel=0.01
    )  # of a normal cut at two deviations
    assert not layer.bias.any()


def test_residual_branches_of_a_resnet_do_not_start_at_zero() -> None:
    network = tiny(RESNET, image_size=32).student.network
    assert all(block.bn2.weight.eq(1).all() for stage in (network.layer1, network.layer4) for block in stage)


def test_defaults_are_the_published_ones() -> None:
    config: Any = validate(pretrain.config_class("byol"), {"data": "demo"}, "test")
    assert (config.network.architecture, config.network.pooling) == ("resnet50", "patches")
    assert (config.views.blur_probability, config.views.solarize_probability) == ((1, 0.1), (0, 0.2))
    assert (config.views.min_scale, config.views.interpolation) == (0.08, "bicubic")
    assert (config.byol.hidden_dim, config.byol.output_dim, config.byol.momentum) == (4096, 256, 0.99)


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "weight_decay", "momentum", "frozen"),
    [
        ("byol", 300, 4.8, 1e-6, 0.99, False),
        ("byol_1000ep", 1000, 3.2, 1.5e-6, 0.996, False),
        ("byol_vitb", 100, 1.6e-3, 0.03, 0.99, False),
        ("byol_vitb_frozen", 100, 1.6e-3, 0.03, 0.99, True),
    ],
)
def test_recipes_hold_the_published_numbers(
    name: str, epochs: int, lr: float, weight_decay: float, *, momentum: float, frozen: bool
) -> None:
    recipe = read_yaml(find_recipe(name, "pretrain"))
    config: Any = validate(pretrain.config_class("byol"), {"data": "x", **recipe}, name)
    assert config.optim.lr * config.train.batch_size / 256 == pytest.approx(lr)
    assert (config.train.batch_size, config.train.epochs) == (4096, epochs)
    assert (config.optim.weight_decay, config.optim.clip_grad) == (weight_decay, None)
    assert (config.byol.momentum, config.byol.momentum_schedule) == (momentum, "cosine")
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
    with pytest.raises(ConfigError, match="BYOL compares 2 views of an image; the views make 3"):
        BYOL(method.student, method.views, method.config, target=method.target_student, seed=0)


def test_a_single_image_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size 1: a batch norm \(projector.1\)"):
        tiny().begin(Duration(batch_size=1, part_size=1))


# --- two processes


def cases() -> list[tuple[str, BYOL, list[Tensor]]]:
    """Double precision, so that the order of sums does not show."""
    return [
        ("vit", tiny().double(), two_views(6)),
        ("resnet", tiny(RESNET, image_size=32).double(), two_views(6, 32)),
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
        method.after_step(0.25)
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
        method.after_step(0.25)
        torch.testing.assert_close((ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2, loss.detach())
        for key, grad in grads(method).items():
            for result in ranks:
                torch.testing.assert_close(result[name]["grads"][key], grad, rtol=1e-6, atol=1e-9, msg=key)
        for key, value in method.state_dict().items():
            torch.testing.assert_close(ranks[1][name]["state"][key], value, rtol=1e-7, atol=1e-9, msg=key)
