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
from fdkit.methods.simsiam import SimSiam, SimSiamConfig, build, build_projector, mean_cosine
from fdkit.models.representation import channel_std
from fdkit.training.optimizer import OptimizerConfig, build_optimizer

VIT: dict[str, Any] = {
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "pooling": "cls",
}
RESNET: dict[str, Any] = {"architecture": "resnet10t", "pooling": "patches"}


def tiny(network: dict[str, Any] = VIT, *, image_size: int = 8, seed: int = 0, **fields: Any) -> SimSiam:
    config = SimSiamConfig(**{"output_dim": 12, "predictor_hidden_dim": 6, **fields})
    return build(config, TwoViewsConfig(image_size=image_size), NetworkConfig(**network), seed=seed)


def two_views(batch: int = 5, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]


def cosine_by_loops(predictions: Tensor, targets: Tensor) -> float:
    """Mean over images of the cosine of the two vectors."""
    total = 0.0
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        lengths = [math.sqrt(sum(value**2 for value in vector)) for vector in (prediction, target)]
        total += sum(p * t for p, t in zip(prediction, target, strict=True)) / math.prod(lengths)
    return total / len(predictions)


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the loss


def test_the_cosine_matches_naive_loops_and_ignores_lengths() -> None:
    predictions, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    cosine = mean_cosine(predictions, targets)
    assert cosine.item() == pytest.approx(cosine_by_loops(predictions, targets), rel=1e-12)
    torch.testing.assert_close(mean_cosine(predictions * 7, targets * 0.1), cosine)
    assert mean_cosine(predictions, predictions).item() == pytest.approx(1)
    assert mean_cosine(predictions, -predictions).item() == pytest.approx(-1)


def outputs(method: SimSiam, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and projections of both views, one view at a time."""
    projections = [method.projector(method.student(view).prefix[:, 0]) for view in views]
    return [method.predictor(rows) for rows in projections], projections


def test_a_forward_pass_is_the_mean_of_both_directions_of_one_view_at_a_time() -> None:
    method, views = tiny().double(), two_views()
    predictions, projections = outputs(copy.deepcopy(method), views)
    expected = -(
        cosine_by_loops(predictions[0], projections[1]) + cosine_by_loops(predictions[1], projections[0])
    )
    assert method(views, 0.0)["loss"].item() == pytest.approx(expected / 2, rel=1e-9)
    counts = {int(value) for key, value in method.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {2}


def test_the_loss_is_about_0_at_first() -> None:
    losses = [tiny(output_dim=64, seed=seed).double()(two_views(), 0.0)["loss"].item() for seed in range(8)]
    assert sum(losses) / len(losses) == pytest.approx(0, abs=0.1)


def test_the_loss_does_not_know_which_view_is_first() -> None:
    views = two_views()
    torch.testing.assert_close(tiny().double()(views, 0.0)["loss"], tiny().double()(views[::-1], 0.0)["loss"])


@pytest.mark.parametrize("constants", ["both", "first", "none"])
def test_what_is_predicted_counts_as_a_constant_in_both_directions(constants: str) -> None:
    """The gradient is that of a loss against fixed vectors; a path through either of them would show."""
    method, views = tiny().double(), two_views()
    by_hand = copy.deepcopy(method)
    predictions, projections = outputs(by_hand, views)
    fixed = [rows.detach() for rows in projections]
    first = projections[0] if constants == "none" else fixed[0]
    second = fixed[1] if constants == "both" else projections[1]
    (-(mean_cosine(predictions[0], second) + mean_cosine(predictions[1], first)) / 2).backward()
    method(views, 0.0)["loss"].backward()
    expected, result = grads(by_hand), grads(method)
    assert result.keys() == expected.keys()
    furthest = max((result[name] - value).abs().max().item() for name, value in expected.items())
    assert furthest < 1e-12 if constants == "both" else furthest > 1e-3


# --- a training step


@pytest.mark.parametrize(("network", "size"), [(VIT, 8), (RESNET, 32)])
def test_gradients_reach_everything_that_trains_and_nothing_else(network: dict[str, Any], size: int) -> None:
    method = tiny(network, image_size=size).double()
    method(two_views(3, size), 0.0)["loss"].backward()
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trainable
    assert {name for name, _ in method.named_parameters()} - trainable == {"projector.6.bias"}


def test_the_bias_before_the_last_norm_keeps_its_value_and_leaves_the_loss_alone() -> None:
    method, views = tiny().double(), two_views()
    bias = method.projector[6].bias
    start = bias.clone()
    config = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.1, decay_exempt="none")
    optimiser = build_optimizer(method, config)
    loss = method(views, 0.0)["loss"]
    loss.backward()
    optimiser.step()
    assert start.any()
    assert torch.equal(bias, start)
    other = tiny().double()
    with torch.no_grad():
        other.projector[6].bias += 3
    torch.testing.assert_close(other(views, 0.0)["loss"], loss)


def test_the_predictor_can_keep_its_learning_rate() -> None:
    """As the recipe asks: its parameters form groups of their own, and are all of those groups."""
    config = OptimizerConfig(name="sgd", decay_exempt="none", constant_lr=("predictor",))
    method = tiny()
    groups = {group["constant_lr"]: group["params"] for group in build_optimizer(method, config).param_groups}
    assert {id(p) for p in groups[True]} == {id(p) for p in method.predictor.parameters()}


def test_twenty_steps_learn_and_log_scalars() -> None:
    method, views = tiny().double(), two_views(16)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        scalars = method(views, step / 20)
        optimiser.zero_grad()
        scalars["loss"].backward()
        optimiser.step()
        method.after_step(step / 20)
        losses.append(scalars["loss"].item())
    assert losses[-1] < losses[0] - 0.3
    assert scalars.keys() == {"loss", "projection_std", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]


def test_healthy_projections_spread_as_random_directions() -> None:
    projections = build_projector(32, SimSiamConfig())(torch.randn(256, 32))
    assert channel_std(projections).item() == pytest.approx(1 / math.sqrt(2048), rel=0.01)  # 0.0221


def test_a_collapse_shows_in_both_spreads() -> None:
    method = tiny().double()
    with torch.no_grad():
        healthy = method(two_views(), 0.0)
        method.student.network.norm.weight.mul_(1e-8)
        method.student.network.norm.bias.fill_(1.0)
        collapsed = method(two_views(), 0.0)
    assert healthy["projection_std"].item() == pytest.approx(1 / math.sqrt(12), rel=0.05)
    assert collapsed["feature_std"] < 0.01 * healthy["feature_std"]


def test_a_constant_projection_has_no_spread() -> None:
    method = tiny().double()
    with torch.no_grad():
        method.projector[6].weight.zero_()
        collapsed = method(two_views(), 0.0)
    assert collapsed["projection_std"].item() < 1e-6


def test_looking_at_the_loss_in_eval_changes_nothing() -> None:
    method = tiny().double().eval()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        assert method(two_views(), 0.0)["loss"].isfinite()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_a_resumed_run_goes_on_exactly() -> None:
    whole, first = tiny(), tiny()
    views = [view.float() for view in two_views()]
    for method in (whole, first):
        method(views, 0.0)
    resumed = tiny(seed=9)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed(views, 0.5)["loss"], whole(views, 0.5)["loss"])
    assert torch.equal(resumed.eval()(views, 0.5)["loss"], whole.eval()(views, 0.5)["loss"])


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = tiny()([view.float() for view in two_views()], 0.0)
    assert scalars["loss"].dtype == torch.float32
    scalars["loss"].backward()


# --- the network, the views and the recipe


def test_heads_are_those_of_the_paper() -> None:
    method = tiny()
    kinds = ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    assert [type(layer).__name__ for layer in method.projector] == kinds
    assert [type(layer).__name__ for layer in method.predictor] == ["Linear", "BatchNorm", "ReLU", "Linear"]
    widths = [
        (layer.in_features, layer.out_features) for layer in method.projector if isinstance(layer, nn.Linear)
    ]
    assert widths == [(16, 16), (16, 16), (16, 12)]
    assert [method.projector[index].bias is None for index in (0, 3, 6)] == [True, True, False]
    assert [method.projector[index].affine for index in (1, 4, 7)] == [True, True, False]
    assert [method.predictor[index].bias is None for index in (0, 3)] == [True, False]
    assert method.predictor[1].affine


def test_residual_branches_of_a_resnet_start_at_zero() -> None:
    network = tiny(RESNET, image_size=32).student.network
    assert all(not block.bn2.weight.any() for stage in (network.layer1, network.layer4) for block in stage)


def test_the_recipe_holds_the_published_numbers() -> None:
    recipe = read_yaml(find_recipe("simsiam", "pretrain"))
    config: Any = validate(pretrain.config_class("simsiam"), {"data": "x", **recipe}, "simsiam")
    assert (config.optim.name, config.optim.lr, config.optim.lr_reference_batch) == ("sgd", 0.05, 256)
    assert (config.optim.weight_decay, config.optim.decay_exempt, config.optim.clip_grad) == (
        1e-4,
        "none",
        None,
    )
    assert (config.optim.constant_lr, config.optim.lr_update) == (("predictor",), "epoch")
    assert (config.optim.warmup_epochs, config.optim.min_lr) == (0, 0)
    assert (config.train.batch_size, config.train.epochs, config.train.precision) == (512, 100, "fp32")


def test_defaults_are_the_published_ones() -> None:
    config: Any = validate(pretrain.config_class("simsiam"), {"data": "demo"}, "test")
    assert (config.network.architecture, config.network.pooling) == ("resnet50", "patches")
    views = config.views
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (views.blur_probability, views.solarize_probability, views.min_scale) == ((0.5, 0.5), (0, 0), 0.2)
    assert (config.simsiam.output_dim, config.simsiam.predictor_hidden_dim) == (2048, 512)


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    states = [tiny(seed=seed).state_dict() for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_other_than_two_views_are_refused() -> None:
    method = tiny()
    method.views.num_views = 3
    with pytest.raises(ConfigError, match="SimSiam compares 2 views of an image; the views make 3"):
        SimSiam(method.student, method.views, method.config, seed=0)


def test_a_single_image_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size 1: a batch norm \(projector.1\)"):
        tiny().begin(Duration(batch_size=1, part_size=1))


# --- two processes


def cases() -> list[tuple[str, SimSiam, list[Tensor]]]:
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
