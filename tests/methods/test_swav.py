import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from swav_oracles import codes_by_loops, loss_by_loops
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.config import find_recipe, read_yaml, validate
from fdkit.data.views import MultiCropConfig
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods.swav import SwAV, SwAVConfig, build

VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
}
RESNET = {
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16]},
    "pooling": "patches",
}
SMALL = {"hidden_dim": 12, "output_dim": 6, "num_prototypes": 10, "freeze_prototypes_steps": 0}
BATCH, EPOCH = 4, 2
"""Images a step, and steps an epoch."""


def tiny(net: dict[str, Any] = RESNET, *, seed: int = 0, local: int = 3, **fields: Any) -> SwAV:
    config = NetworkConfig(**net)
    torch.manual_seed(seed)
    student = build_network(config, image_size=16, sizes=(8,))
    views = SimpleNamespace(num_views=2 + local, image_size=16)
    method = SwAV(student, views, SwAVConfig(**{**SMALL, **fields}), pooling=config.pooling, seed=seed)
    method.begin(Duration(20, EPOCH, batch_size=BATCH, part_size=BATCH))
    return method


def views_of(seed: int = 1, local: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, 16] + [8] * local
    return [torch.rand(BATCH, 3, s, s, generator=generator, dtype=torch.float64) for s in sizes]


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def train_step(method: SwAV, number: int, optimiser: torch.optim.Optimizer | None = None) -> Tensor:
    """One optimiser step of the 20; the images hang on its number."""
    optimiser = optimiser or torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.03)
    optimiser.zero_grad()
    loss: Tensor = method(views_of(number), number / 20)["loss"]
    loss.backward()
    method.before_step(number / 20)
    optimiser.step()
    method.after_step(number / 20)
    return loss.detach()


# --- a training step


def test_the_first_loss_is_near_the_logarithm_of_the_number_of_prototypes() -> None:
    method = tiny(num_prototypes=3000, output_dim=128).double()
    assert method(views_of(), 0.0)["loss"].item() == pytest.approx(math.log(3000), abs=1.0)


def scores_by_hand(method: SwAV, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Unit features (V, B, d) and scores (V, B, K), large crops in one batch of the network, small ones in another."""
    copied = copy.deepcopy(method)
    large, small = torch.cat(views[:2]), torch.cat(views[2:])
    features = torch.cat([copied.student.pooled(batch, method.pooling) for batch in (large, small)])
    projected = copied.projector(features)
    unit = projected / projected.norm(dim=1, keepdim=True)
    weight = copied.prototypes.weight
    prototypes = weight / weight.norm(dim=1, keepdim=True)
    return unit.unflatten(0, (len(views), -1)), (unit @ prototypes.T).unflatten(0, (len(views), -1))


@torch.no_grad()
def loss_by_hand(method: SwAV, views: list[Tensor], queued: Tensor | None = None) -> float:
    """queued: (2, Q, d), features of earlier images."""
    _, scores = scores_by_hand(method, views)
    batch, codes = len(views[0]), []
    for crop in range(2):
        old = (
            queued[crop] @ F.normalize(method.prototypes.weight, dim=1).T
            if queued is not None
            else scores[0][:0]
        )
        balanced = codes_by_loops(torch.cat([old, scores[crop]]), method.config.epsilon, 3)
        codes.append(balanced[-batch:])
    return loss_by_loops(scores, torch.stack(codes), method.config.temperature)


def test_a_step_swaps_the_codes_of_the_two_large_crops() -> None:
    method, views = tiny().double(), views_of()
    expected = loss_by_hand(method, views)
    assert method(views, 0.0)["loss"].item() == pytest.approx(expected, rel=1e-9)
    large_alone = tiny(local=0).double()
    large_alone.load_state_dict(method.state_dict())
    assert abs(large_alone(views[:2], 0.0)["loss"].item() - expected) > 1e-3


def test_batch_norms_see_a_resolution_at_a_time_and_the_head_all_of_them() -> None:
    method = tiny().double()
    method(views_of(), 0.0)
    assert method.student.network.bn1.num_batches_tracked == 2
    assert method.projector[1].num_batches_tracked == 1
    equal_sizes = tiny().double()
    equal_sizes(views_of()[:2], 0.0)
    assert equal_sizes.student.network.bn1.num_batches_tracked == 1


def test_prototypes_are_scaled_in_place_before_the_forward_pass() -> None:
    method, views = tiny().double(), views_of()
    first = method.prototypes.weight.detach().clone()
    loss = method(views, 0.0)["loss"]
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(method.prototypes.weight.data, F.normalize(first, dim=1))
    loss.backward()
    radial = (method.prototypes.weight.grad * method.prototypes.weight).sum(dim=1)
    assert radial.abs().max() > 1e-4  # a gradient through the scaling would have none along the prototype


def test_looking_at_the_loss_leaves_prototypes_and_queue_alone() -> None:
    for how in ("eval", "no_grad"):
        method = tiny(queue_size=8, queue_start_epoch=0).double().train(how != "eval")
        first = method.prototypes.weight.detach().clone()
        with torch.set_grad_enabled(how != "no_grad"):
            assert method(views_of(), 0.0)["loss"].isfinite()
        method.after_step(0.0)
        assert torch.equal(method.prototypes.weight, first)
        assert method.queue.num_pushed == 0


def test_prototypes_stay_as_drawn_for_the_first_steps() -> None:
    method = tiny(freeze_prototypes_steps=2).double()
    directions = F.normalize(method.prototypes.weight.detach(), dim=1)
    moves = []
    for number in range(3):
        train_step(method, number)
        moves.append(not torch.allclose(F.normalize(method.prototypes.weight.detach(), dim=1), directions))
    assert moves == [False, False, True]


@pytest.mark.parametrize("net", [VIT, RESNET])
def test_gradients_reach_everything_that_trains(net: dict[str, Any]) -> None:
    method = tiny(net).double()
    method(views_of(), 0.0)["loss"].backward()
    assert grads(method).keys() == {name for name, p in method.named_parameters() if p.requires_grad}


def test_a_network_in_parts_gives_the_same_loss() -> None:
    whole, parts = tiny(VIT).double(), tiny(VIT).double()
    parts.student.num_parts = 2
    for method in (whole, parts):
        method(views_of(), 0.0)["loss"].backward()
    for key, gradient in grads(whole).items():
        torch.testing.assert_close(grads(parts)[key], gradient, msg=key)


def test_twenty_steps_learn() -> None:
    method = tiny(VIT).double()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        optimiser.zero_grad()
        scalars = method(views_of(), step / 20)
        scalars["loss"].backward()
        optimiser.step()
        method.after_step(step / 20)
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert scalars.keys() == {"loss", "top1", "prototype_usage", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]


def test_scores_and_loss_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method = tiny(VIT, queue_size=4, queue_start_epoch=0)
        for _ in range(2):
            scalars = method([view.float() for view in views_of()], 0.0)
            method.after_step(0.0)
    assert {value.dtype for value in scalars.values()} == {torch.float32}
    scalars["loss"].backward()


# --- the queue


def test_the_queue_starts_at_its_epoch_and_serves_once_it_is_full() -> None:
    method = tiny(queue_size=2 * BATCH, queue_start_epoch=2).double()
    history: list[Tensor] = []
    for number in range(2 * EPOCH + 4):
        views = views_of(number)
        full = number >= 2 * EPOCH + 2
        queued = torch.cat(history[-2:], dim=1) if full else None
        expected = loss_by_hand(method, views, queued)
        with torch.no_grad():
            unit, _ = scores_by_hand(method, views)
        loss = train_step(method, number)
        assert loss.item() == pytest.approx(expected, rel=1e-7), number
        if full:  # the queue makes a difference, and so do its features' age and the prototypes of now
            assert abs(expected - loss_by_hand(method, views)) > 1e-4
        if number >= 2 * EPOCH:
            history.append(unit[:2])
        assert method.queue.num_pushed == max(0, number + 1 - 2 * EPOCH) * BATCH
    torch.testing.assert_close(method.queue.rows.transpose(0, 1), torch.cat(history[-2:], dim=1))


def test_no_queue_is_kept_without_one() -> None:
    method = tiny().double()
    train_step(method, 19)
    assert method.queue.rows.numel() == 0
    assert method.queue.num_pushed == 0


def test_a_resumed_run_goes_on_exactly() -> None:
    for filled in (2, 4):  # before and after the queue is full
        whole = tiny(queue_size=3 * BATCH, queue_start_epoch=0, freeze_prototypes_steps=3).double()
        for number in range(filled):
            train_step(whole, number)
        resumed = tiny(seed=9, queue_size=3 * BATCH, queue_start_epoch=0, freeze_prototypes_steps=3).double()
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for number in range(filled, filled + 3):
            assert torch.equal(train_step(resumed, number), train_step(whole, number))
        for key, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], value), key


# --- what is built, and what is refused


def test_the_projector_has_biases_and_one_batch_norm() -> None:
    def kinds(method: SwAV) -> list[str]:
        return [type(layer).__name__ for layer in method.projector]

    assert kinds(tiny()) == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert all(layer.bias is not None for layer in tiny().projector if isinstance(layer, nn.Linear))
    assert kinds(tiny(head_norm=False)) == ["Linear", "ReLU", "Linear"]
    assert tiny().prototypes.bias is None


def test_build_makes_a_network_for_both_sizes_that_starts_in_full() -> None:
    views = MultiCropConfig(image_size=24, local_size=16, num_local=2)
    method = build(SwAVConfig(**SMALL), views, NetworkConfig(**RESNET), seed=0)
    assert method.student.sizes == (16,)
    assert method.views.num_views == 4
    assert (method.student.network.layer1[0].bn2.weight == 1).all()
    two = build(SwAVConfig(**SMALL), views.model_copy(update={"num_local": 0}), NetworkConfig(**VIT), seed=0)
    assert two.student.sizes == ()
    assert two.views.num_views == 2


def test_the_published_values_are_the_defaults() -> None:
    from fdkit.commands.pretrain import config_class

    config: Any = validate(config_class("swav"), {"data": "x"}, "test")
    assert config.swav.model_dump() == {
        "hidden_dim": 2048,
        "output_dim": 128,
        "head_norm": True,
        "num_prototypes": 3000,
        "temperature": 0.1,
        "epsilon": 0.05,
        "num_sinkhorn_iterations": 3,
        "freeze_prototypes_steps": 313,
        "queue_size": 0,
        "queue_start_epoch": 15,
    }
    assert (config.network.architecture, config.network.std) == ("resnet50", (0.228, 0.224, 0.225))
    views = config.views
    assert (views.min_scale, views.num_local, views.local_size, views.local_scale) == (
        0.14,
        6,
        96,
        (0.05, 0.14),
    )
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (views.blur_probability, views.local_blur_probability) == ((0.5, 0.5), 0.5)
    assert views.solarize_probability == (0.0, 0.0)


def recipe_schedule(name: str, *, batch_size: int, steps_per_epoch: int) -> tuple[Any, int]:
    """The learning rate of a shipped recipe, and the steps of its run."""
    from fdkit.commands.pretrain import config_class
    from fdkit.training.schedule import build_schedule

    config: Any = validate(
        config_class("swav"), {"data": "x", **read_yaml(find_recipe(name, "pretrain"))}, name
    )
    assert config.train.batch_size == batch_size
    num_steps = round(config.train.epochs * steps_per_epoch)
    return build_schedule(
        config.optim, batch_size=batch_size, steps_per_epoch=steps_per_epoch, num_steps=num_steps
    ), num_steps


def test_the_recipes_have_the_official_learning_rates() -> None:
    large, num_steps = recipe_schedule("swav", batch_size=4096, steps_per_epoch=312)
    warmup = torch.linspace(0.3, 4.8, 10 * 312, dtype=torch.float64)
    assert [large(step) for step in (0, 1, 3119)] == pytest.approx([warmup[i].item() for i in (0, 1, 3119)])
    for step in (3120, 9000, num_steps - 1):
        share = (step - 3120) / (num_steps - 3120)
        expected = 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + math.cos(math.pi * share))
        assert large(step) == pytest.approx(expected)
    small, num_steps = recipe_schedule("swav_256", batch_size=256, steps_per_epoch=5004)
    assert small(0) == 0.6
    assert small(num_steps - 1) == pytest.approx(6e-4, rel=1e-3)


def test_a_queue_that_the_batch_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"swav.queue_size 10 is no multiple of the 4 images of a batch"):
        tiny(queue_size=10)


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot normalise a single image"):
        tiny().begin(Duration(20, EPOCH, batch_size=1, part_size=1))


def test_a_single_view_is_refused() -> None:
    with pytest.raises(ConfigError, match="the views make 1"):
        tiny(local=-1)


# --- two processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {name: run_steps(method, rank, 2) for name, method in cases().items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def cases() -> dict[str, SwAV]:
    queue = {"queue_size": 2 * BATCH, "queue_start_epoch": 0}
    return {"vit": tiny(VIT).double(), "resnet": tiny(**queue).double()}


def run_steps(method: SwAV, rank: int, world: int) -> list[dict[str, Any]]:
    """Four steps, in the last two of which the queue serves."""
    options = {"broadcast_buffers": False}
    module = DistributedDataParallel(method, **options) if world > 1 else method
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.03)
    results = []
    for number in range(4):
        optimiser.zero_grad()
        loss = module([view.chunk(world)[rank] for view in views_of(number)], number / 20)["loss"]
        loss.backward()
        results.append({"loss": loss.detach(), "grads": grads(method)})
        method.before_step(number / 20)
        optimiser.step()
        method.after_step(number / 20)
    results[-1]["state"] = copy.deepcopy(method.state_dict())
    return results


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning")
def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, method in cases().items():
        for number, expected in enumerate(run_steps(method, 0, 1)):
            got = [result[name][number] for result in ranks]
            torch.testing.assert_close((got[0]["loss"] + got[1]["loss"]) / 2, expected["loss"])
            for one in got:
                for key, gradient in expected["grads"].items():
                    torch.testing.assert_close(one["grads"][key], gradient, rtol=1e-6, atol=1e-9, msg=key)
                for key, value in expected.get("state", {}).items():
                    torch.testing.assert_close(one["state"][key], value, rtol=1e-6, atol=1e-9, msg=key)
