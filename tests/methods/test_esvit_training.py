"""A training step of EsViT: what moves, what does not, what is refused, and what its recipes hold."""

import math
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from esvit_toys import CROPS, DURATION, HEADS, RESNET, SWIN, VIT, grads, images, score, tiny, trained_apart
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fdkit.config import find_recipe, read_yaml, validate
from fdkit.data.views import MultiCrop, MultiCropConfig
from fdkit.errors import ConfigError
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods.esvit import EsViT, EsViTConfig

# --- a training step


@pytest.mark.parametrize("network", [SWIN, VIT, RESNET], ids=["swin", "vit", "resnet"])
def test_gradients_reach_everything_that_trains_and_nothing_else(network: dict[str, Any]) -> None:
    crops = MultiCropConfig(image_size=64, local_size=32, num_local=1) if network is RESNET else CROPS
    method = tiny(network, crops=crops)
    scalars = method([view.float() for view in images(crops)], 0.0)
    scalars["loss"].backward()
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trainable
    assert not any(name.startswith("teacher") for name in trainable)
    assert {"head.prototypes.gain", "region_head.prototypes.gain"} <= trainable
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())


def test_the_heads_share_no_gradient() -> None:
    method = trained_apart()
    method(images(), 7 / 8)["loss"].backward()
    both = grads(method)
    with torch.no_grad():
        for parameter in method.region_head.parameters():
            parameter.mul_(1.5)
        method.region_centre.value.add_(torch.arange(7.0)[None])
    method.zero_grad(set_to_none=True)
    method(images(), 7 / 8)["loss"].backward()
    for name, grad in grads(method).items():
        if name.startswith("head."):
            torch.testing.assert_close(grad, both[name])
    assert not torch.allclose(method.student.network.norm.bias.grad, both["student.network.norm.bias"])


def test_a_step_moves_teacher_and_both_centres_by_what_was_seen() -> None:
    method = trained_apart(momentum=0.6)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        taught = [method.teacher(view) for view in images()[:2]]
        rows = torch.cat([tokens.patches.mean(dim=1) for tokens in taught])
        regions = torch.cat([tokens.patches.flatten(0, 1) for tokens in taught])
        means = {
            "centre.value": score(method.teacher_head, rows).mean(dim=0),
            "region_centre.value": score(method.teacher_region_head, regions).mean(dim=0),
        }
    progress = 2 / 8
    method(images(), progress)
    assert torch.equal(method.centre.value, before["centre.value"])  # the loss comes first
    method.after_step(progress)
    after = method.state_dict()
    for name, mean in means.items():
        torch.testing.assert_close(after[name], 0.9 * before[name] + 0.1 * mean[None])
    kept = 1 - 0.4 * (1 + math.cos(math.pi * progress)) / 2
    for own, other in (
        ("student", "teacher"),
        ("head", "teacher_head"),
        ("region_head", "teacher_region_head"),
    ):
        for name, _ in getattr(method, own).named_parameters():
            expected = kept * before[f"{other}.{name}"] + (1 - kept) * before[f"{own}.{name}"]
            torch.testing.assert_close(after[f"{other}.{name}"], expected)


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_leaves_the_centres_alone(how: str) -> None:
    method = trained_apart().train(how != "eval")
    before = [centre.value.clone() for centre in (method.centre, method.region_centre)]
    with torch.set_grad_enabled(how != "no_grad"):
        assert method(images(), 0.1)["loss"].isfinite()
    method.centre.update()
    method.region_centre.update()
    assert torch.equal(torch.cat(before), torch.cat([method.centre.value, method.region_centre.value]))


def test_the_prototypes_of_both_heads_stay_in_the_first_epoch() -> None:
    method = trained_apart()
    for step, stay in ((0, True), (1, True), (2, False)):
        method.zero_grad(set_to_none=True)
        method(images(), step / 8)["loss"].backward()
        method.before_step(step / 8)
        frozen = {name for name, p in method.named_parameters() if p.requires_grad} - grads(method).keys()
        assert all(".prototypes." in name for name in frozen)
        assert len(frozen) == (4 if stay else 0)


def test_the_teacher_starts_equal_drops_no_branches_and_is_exported() -> None:
    method = tiny({**SWIN, "drop_path": 0.5})
    for own, other in (
        ("student", "teacher"),
        ("head", "teacher_head"),
        ("region_head", "teacher_region_head"),
    ):
        state, other_state = (getattr(method, name).state_dict() for name in (own, other))
        assert all(torch.equal(state[key], other_state[key]) for key in state)
    assert not torch.equal(method.head.mlp[0].weight, method.region_head.mlp[0].weight)
    view = images()[0].float()
    assert torch.equal(method.teacher(view).patches, method.teacher(view).patches)
    assert not torch.equal(method.student(view).patches, method.student(view).patches)
    assert method.exported is method.teacher


def test_epochs_of_views_alone_leave_the_region_head_as_it_is() -> None:
    method, views_alone = trained_apart(view_only_epochs=2), trained_apart(region_loss=False)
    views_alone.load_state_dict({k: v for k, v in method.state_dict().items() if "region" not in k})
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    start = {key: value.clone() for key, value in method.state_dict().items() if "region" in key}
    loss = method(images(), 3 / 8)["loss"]
    torch.testing.assert_close(loss, views_alone(images(), 3 / 8)["loss"])
    loss.backward()
    assert grads(method).keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    method.before_step(3 / 8)
    optimizer.step()
    method.centre.update()
    method.region_centre.update()
    for key, value in start.items():
        assert torch.equal(method.state_dict()[key], value), key
    scalars = method(images(), 4 / 8)
    torch.testing.assert_close(scalars["loss"].detach(), (scalars["view_loss"] + scalars["region_loss"]) / 2)


def test_twenty_steps_learn() -> None:
    method = tiny(student_temperature=0.3, momentum=0.9)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    views, losses = [view.float() for view in images(batch=6)], []
    for step in range(20):
        scalars = method(views, step / 20)
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
        method.after_step(step / 20)
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_goes_on_exactly() -> None:
    whole, resumed = trained_apart(), tiny(seed=9).double()
    whole(images(), 0.0)["loss"].backward()
    whole.after_step(0.0)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed(images(), 0.5)["loss"], whole(images(), 0.5)["loss"])


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    method, views = trained_apart().float(), [view.float() for view in images()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = method(views, 7 / 8)
    scalars["loss"].backward()
    assert scalars["loss"].dtype == scalars["region_loss"].dtype == torch.float32
    plain = method(views, 7 / 8)["loss"].detach()
    torch.testing.assert_close(scalars["loss"].detach(), plain, rtol=0.1, atol=0)


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    states = [tiny(seed=seed).state_dict() for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


# --- what is refused


def test_views_that_would_be_resized_are_refused() -> None:
    student = build_network(NetworkConfig(**SWIN), image_size=16)
    with pytest.raises(ConfigError, match="would resize views of 12 pixels"):
        EsViT(student, MultiCrop(CROPS), EsViTConfig(**HEADS), seed=0)


def test_small_crops_that_the_windows_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"13 .*2x2 pixels"):
        tiny(crops=MultiCropConfig(image_size=16, local_size=13, num_local=2))
    with pytest.raises(ConfigError, match="a 5x5 map does not divide into 4x4 windows"):
        tiny(crops=MultiCropConfig(image_size=20, local_size=12, num_local=2))


def test_epochs_of_views_alone_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="view_only_epochs 2 has no effect"):
        tiny(region_loss=False, view_only_epochs=2)
    with pytest.raises(ConfigError, match="a run of 4 epochs ends before regions are compared"):
        tiny(view_only_epochs=4)


def test_batch_norms_refuse_a_single_image() -> None:
    with pytest.raises(ConfigError, match="cannot normalise a single image"):
        tiny(head_norm=True).begin(DURATION._replace(part_size=1))
    tiny().begin(DURATION._replace(part_size=1))


# --- the recipes


@pytest.mark.parametrize(
    ("recipe", "width", "window", "drop_path", "view_only_epochs", "batch_size"),
    [
        ("esvit", 768, 7, 0.1, 0, 512),
        ("esvit_swins", 768, 7, 0.2, 0, 512),
        ("esvit_swinb", 1024, 7, 0.2, 200, 512),
        ("esvit_swint_w14", 768, 14, 0.1, 200, 512),
        ("esvit_swins_w14", 768, 14, 0.2, 180, 512),
        ("esvit_swinb_w14", 1024, 14, 0.2, 200, 512),
        ("esvit_r50", 2048, None, 0.0, 200, 1024),
    ],
)
def test_recipes_hold_the_published_numbers(
    recipe: str, width: int, window: int | None, drop_path: float, view_only_epochs: int, batch_size: int
) -> None:
    from fdkit.commands import pretrain

    values = {"data": "x", **read_yaml(find_recipe(recipe, "pretrain"))}
    config: Any = validate(pretrain.config_class("esvit"), values, recipe)
    own, optim, views, train = config.esvit, config.optim, config.views, config.train
    assert (own.region_loss, own.view_only_epochs, own.norm_last_layer) == (True, view_only_epochs, False)
    assert (own.output_dim, own.momentum, own.student_temperature, own.centre_momentum) == (
        65536,
        0.996,
        0.1,
        0.9,
    )
    warmup = (own.warmup_teacher_temperature, own.teacher_temperature, own.warmup_teacher_temperature_epochs)
    assert warmup == (0.04, 0.07, 30)
    assert (optim.lr, optim.lr_reference_batch, optim.min_lr, optim.warmup_epochs) == (5e-4, 256, 1e-6, 10)
    assert (optim.weight_decay, optim.weight_decay_end, optim.clip_grad) == (0.04, 0.4, 3.0)
    assert (optim.decay_exempt, optim.clip_each_parameter, optim.scale_min_lr) == ("1d", True, False)
    assert (views.min_scale, views.local_scale, views.num_local, views.local_size) == (
        0.4,
        (0.05, 0.4),
        8,
        96,
    )
    assert (train.epochs, train.batch_size, config.network.drop_path) == (300, batch_size, drop_path)
    student = build_network(config.network, image_size=224, sizes=(96,))
    assert student.embed_dim == width
    if window is not None:
        assert student.network.layers[0].blocks[0].window_size == (window, window)
        assert student.network.layers[3].blocks[0].window_size == (7, 7)
        assert student.network.norm.eps == 1e-6


# --- two processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    for name, method, views in cases():
        parallel = DistributedDataParallel(method)
        loss = parallel([view.chunk(2)[rank] for view in views], 0.5)["loss"]
        loss.backward()
        method.after_step(0.5)
        results[name] = {"loss": loss.detach(), "grads": grads(method), "state": method.state_dict()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def cases() -> list[tuple[str, EsViT, list[Tensor]]]:
    return [
        ("swin", trained_apart(), images(batch=4)),
        ("batch norms in the heads", trained_apart(head_norm=True), images(batch=4)),
        ("views alone", trained_apart(view_only_epochs=3), images(batch=4)),
    ]


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, method, views in cases():
        loss = method(views, 0.5)["loss"]
        loss.backward()
        method.after_step(0.5)
        torch.testing.assert_close((ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2, loss.detach())
        for key, grad in grads(method).items():
            for result in ranks:
                torch.testing.assert_close(result[name]["grads"][key], grad, rtol=1e-6, atol=1e-9, msg=key)
        for key, value in method.state_dict().items():
            for result in ranks:
                torch.testing.assert_close(result[name]["state"][key], value, rtol=1e-6, atol=1e-9, msg=key)
