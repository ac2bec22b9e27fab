import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.data.views import MultiCrop, MultiCropConfig
from fdkit.errors import ConfigError
from fdkit.methods import dino
from fdkit.methods._method import Duration
from fdkit.methods._network import NetworkConfig
from fdkit.methods.dino import DINO, DINOConfig
from fdkit.models.libraries import build_timm, load_backbone, save_backbone

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
HEADS = {"output_dim": 11, "hidden_dim": 10, "bottleneck_dim": 6}
NUM_LOCAL = 3
DURATION = Duration(num_steps=12, steps_per_epoch=3, batch_size=4, part_size=4)


def tiny(
    seed: int = 0,
    *,
    network: dict[str, Any] | None = None,
    views: dict[str, Any] | None = None,
    **fields: Any,
) -> DINO:
    """Views of 16 and of 8 pixels, a ViT of 4x4 patches; in double precision, so that sums show no order."""
    crops = MultiCropConfig(**{"image_size": 16, "local_size": 8, "num_local": NUM_LOCAL, **(views or {})})
    values = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, **(network or {})}
    method = dino.build(DINOConfig(**{**HEADS, **fields}), crops, NetworkConfig(**values), seed=seed)
    method.begin(DURATION)
    return method.double().train()


RESNET = {"architecture": "resnet10t", "model_args": {}, "pooling": "patches"}
RESNET_VIEWS = {"image_size": 64, "local_size": 32}


def images(batch: int = 4, seed: int = 1, sizes: tuple[int, int] = (16, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    large, small = sizes
    return [
        torch.rand(batch, 3, size, size, generator=generator).double()
        for size in [large, large, *[small] * NUM_LOCAL]
    ]


def apart(method: DINO, amount: float = 0.1) -> DINO:
    """The method with a student and a centre that have left their start, as after some steps."""
    generator = torch.Generator().manual_seed(2)
    for part in (method.student, method.head):
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.data += amount * torch.randn(parameter.shape, generator=generator)
    method.centre.value += 0.05 * torch.randn(method.centre.value.shape, generator=generator)
    return method


def head_by_hand(rows: Tensor, head: nn.Module) -> Tensor:
    """Linear and GELU by their formulas, length 1, cosines with the prototypes."""
    layers = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(layers):
        rows = rows @ layer.weight.T + layer.bias
        if number + 1 < len(layers):
            rows = 0.5 * rows * (1 + torch.erf(rows / math.sqrt(2)))
    rows = rows / rows.square().sum(dim=1, keepdim=True).sqrt()
    weight = head.prototypes.weight
    return rows @ (weight / weight.square().sum(dim=1, keepdim=True).sqrt()).T


def loss_by_hand(method: DINO, views: list[Tensor], temperature: float) -> float:
    """View by view, pair by pair, image by image, in plain Python."""
    config = method.config
    with torch.no_grad():
        student = [head_by_hand(method.student(view).prefix[:, 0], method.head) for view in views]
        teacher = [head_by_hand(method.teacher(view).prefix[:, 0], method.teacher_head) for view in views[:2]]
    centre, total, num_pairs = method.centre.value[0].tolist(), 0.0, 0
    for i, j in [(i, j) for i in range(2) for j in range(len(views)) if i != j]:
        num_pairs += 1
        for scores, predictions in zip(teacher[i].tolist(), student[j].tolist(), strict=True):
            powers = [math.exp((s - c) / temperature) for s, c in zip(scores, centre, strict=True)]
            sum_exp = sum(math.exp(p / config.student_temperature) for p in predictions)
            for power, prediction in zip(powers, predictions, strict=True):
                log_share = prediction / config.student_temperature - math.log(sum_exp)
                total -= power / sum(powers) * log_share / len(views[0])
    assert num_pairs == 2 * (len(views) - 1)
    return total / num_pairs


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def take_step(method: DINO, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    progress = number / DURATION.num_steps
    optimizer.zero_grad(set_to_none=True)
    loss = method(images(seed=number), progress)["loss"]
    loss.backward()
    method.before_step(progress)
    optimizer.step()
    method.after_step(progress)
    return loss.detach()


# --- the loss of a step


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.99])
def test_the_loss_matches_plain_python(progress: float) -> None:
    method = apart(
        tiny(
            teacher_temperature=0.07,
            warmup_teacher_temperature_epochs=3,
            network={"drop_path": 0.0, "model_args": VIT},
        )
    )
    temperature = [0.04, 0.055, 0.07, 0.07][int(progress * 4)]  # one an epoch
    loss = method(images(), progress)["loss"]
    assert loss.item() == pytest.approx(loss_by_hand(method, images(), temperature), rel=1e-10)


def test_the_student_sees_every_size_once_the_head_everything_and_the_teacher_large_views_alone() -> None:
    method = tiny()
    seen: list[torch.Size] = []
    for part in (method.student.network.patch_embed, method.head, method.teacher.network.patch_embed):
        part.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    method(images(), 0.0)
    assert seen == [torch.Size(s) for s in [(8, 3, 16, 16), (12, 3, 8, 8), (20, 16), (8, 3, 16, 16)]]


def test_without_small_views_each_large_one_predicts_the_other() -> None:
    method = apart(tiny(views={"num_local": 0}, network={"drop_path": 0.0}))
    loss = method(images()[:2], 0.0)["loss"]
    assert loss.item() == pytest.approx(loss_by_hand(method, images()[:2], 0.04), rel=1e-10)


def test_the_loss_is_entropy_and_divergence() -> None:
    scalars = apart(tiny())(images(), 0.0)
    assert scalars.keys() == {"loss", "target_entropy", "divergence", "prototypes_used", "feature_std"}
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]
    torch.testing.assert_close(scalars["target_entropy"] + scalars["divergence"], scalars["loss"].detach())
    assert scalars["divergence"] > 0


def test_both_collapses_show() -> None:
    method = tiny(network={"drop_path": 0.0})
    with torch.no_grad():
        for head in (method.head, method.teacher_head):
            head.mlp[-1].weight.zero_()
            head.mlp[-1].bias.fill_(1)
    scores = method.teacher_head(torch.zeros(1, 16).double()).detach()
    one = method(images(), 0.0)  # sharpened without a centre: one prototype for all
    method.centre.value.copy_(scores)
    uniform = method(images(), 0.0)  # centred: all alike
    assert one["prototypes_used"].item() < 3
    assert uniform["target_entropy"].item() == pytest.approx(math.log(11))
    assert uniform["prototypes_used"].item() == pytest.approx(11)
    spread = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    method.teacher_head.mlp.register_forward_hook(lambda *_: spread)
    healthy = method(images(), 0.0)
    assert 3 < healthy["prototypes_used"].item() < 10
    assert healthy["target_entropy"].item() < 1


# --- what trains


def test_gradients_reach_everything_that_trains_and_nothing_else() -> None:
    method = tiny(norm_last_layer=False)
    method(images(), 0.0)["loss"].backward()
    with_gradient = grads(method)
    assert with_gradient.keys() == {n for n, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("teacher", "centre")) for name in with_gradient)
    assert {"head.prototypes.weight", "head.prototypes.gain"} <= with_gradient.keys()
    assert all(gradient.abs().max() > 0 for gradient in with_gradient.values())


def test_student_and_teacher_start_equal_and_share_nothing() -> None:
    method = tiny()
    for own, copied in ((method.student, method.teacher), (method.head, method.teacher_head)):
        torch.testing.assert_close(own.state_dict(), copied.state_dict(), rtol=0, atol=0)
        assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in copied.parameters()}


def test_the_last_layer_waits_for_the_first_epochs() -> None:
    method = tiny(freeze_last_layer_epochs=2, norm_last_layer=False)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], weight_decay=0.1)
    start = copy.deepcopy(method.head)
    for number in range(6):
        take_step(method, optimizer, number)
    assert torch.equal(method.head.prototypes.weight, start.prototypes.weight)  # not decayed either
    assert torch.equal(method.head.prototypes.gain, start.prototypes.gain)
    assert not torch.equal(method.head.mlp[0].weight, start.mlp[0].weight)
    take_step(method, optimizer, 6)
    assert not torch.equal(method.head.prototypes.weight, start.prototypes.weight)
    assert not torch.equal(method.head.prototypes.gain, start.prototypes.gain)


# --- what follows


@pytest.mark.parametrize("number", [0, 3, 11])
def test_the_teacher_follows_after_the_step_by_the_momentum_of_the_step(number: int) -> None:
    method = apart(tiny(momentum=0.9))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    take_step(method, torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05), number)
    momentum = 1 - 0.1 * (1 + math.cos(math.pi * number / 12)) / 2
    for old, new in (("teacher", "student"), ("teacher_head", "head")):
        for name, parameter in getattr(method, new).named_parameters():
            expected = momentum * before[f"{old}.{name}"] + (1 - momentum) * parameter.detach()
            torch.testing.assert_close(method.state_dict()[f"{old}.{name}"], expected)


def test_the_centre_follows_after_the_loss() -> None:
    method = tiny()
    with torch.no_grad():
        scores = [
            head_by_hand(method.teacher(view).prefix[:, 0], method.teacher_head) for view in images()[:2]
        ]
    mean = torch.cat(scores).mean(dim=0, keepdim=True)
    loss = method(images(), 0.0)["loss"]
    assert torch.equal(method.centre.value, torch.zeros(1, 11).double())
    method.after_step(0.0)
    torch.testing.assert_close(method.centre.value, 0.1 * mean)
    fresh = tiny()
    fresh.centre.value.copy_(0.1 * mean)  # a centre that moved before the loss would give another one
    assert abs(fresh(images(), 0.0)["loss"] - loss) > 1e-4


def test_a_centre_of_the_student_would_be_another_loss() -> None:
    method = apart(tiny(network={"drop_path": 0.0}))
    loss = method(images(), 0.0)["loss"]
    method.head.register_forward_hook(lambda _, __, scores: scores - method.centre.value)
    assert abs(method(images(), 0.0)["loss"] - loss) > 1e-3


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_leaves_the_centre_alone(how: str) -> None:
    method = apart(tiny()).train(how != "eval")
    start = method.centre.value.clone()
    with torch.set_grad_enabled(how != "no_grad"):
        assert method(images(), 0.0)["loss"].isfinite()
    method.after_step(0.0)
    assert torch.equal(method.centre.value, start)


def test_parts_of_a_batch_are_the_whole() -> None:
    whole, parts = (apart(tiny(network={"drop_path": 0.0})) for _ in range(2))
    assert (whole.compares_images, tiny(head_norm=True).compares_images) == (False, True)
    loss = whole(images(), 0.3)["loss"]
    loss.backward()
    losses = []
    for rows in (slice(0, 2), slice(2, 4)):
        losses.append(parts([view[rows] for view in images()], 0.3)["loss"])
        (losses[-1] / 2).backward()
    torch.testing.assert_close(sum(losses) / 2, loss)
    torch.testing.assert_close(grads(parts), grads(whole))
    for method in (whole, parts):
        method.after_step(0.3)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def test_steps_learn_and_keep_images_apart() -> None:
    method = tiny(momentum=0.9, freeze_last_layer_epochs=0, teacher_temperature=0.07)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    method.begin(DURATION._replace(num_steps=80))
    divergences, used = [], []
    for step in range(80):
        optimizer.zero_grad()
        scalars = method(images(16, seed=0), step / 80)
        scalars["loss"].backward()
        method.before_step(step / 80)
        optimizer.step()
        method.after_step(step / 80)
        divergences.append(scalars["divergence"].item())
        used.append(scalars["prototypes_used"].item())
    assert sum(divergences[-10:]) < 0.7 * sum(divergences[20:30]), divergences
    assert used[-1] > 1.5, used


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    method = tiny().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = method([view.float() for view in images()], 0.0)
    assert {value.dtype for value in scalars.values()} == {torch.float32}
    scalars["loss"].backward()
    method.after_step(0.0)
    assert method.centre.value.dtype == torch.float32


# --- drop path, batch norms


def test_batch_norms_see_all_views_of_a_size_together() -> None:
    method = tiny(network=RESNET, views=RESNET_VIEWS)
    views = images(sizes=(64, 32))
    norm, old_norm = method.student.network.bn1, method.teacher.network.bn1
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    norm.register_forward_hook(lambda _, inputs, __: seen["student"].append(len(inputs[0])))
    old_norm.register_forward_hook(lambda _, inputs, __: seen["teacher"].append(len(inputs[0])))
    method(views, 0.0)["loss"].backward()
    assert seen == {"student": [8, 12], "teacher": [8]}
    assert (norm.num_batches_tracked.item(), old_norm.num_batches_tracked.item()) == (2, 1)
    assert grads(method).keys() == {n for n, p in method.named_parameters() if p.requires_grad}


def test_a_resnet_starts_as_torchvisions() -> None:
    network = tiny(network=RESNET, views=RESNET_VIEWS).student.network
    assert all(torch.equal(block.bn2.weight, torch.ones_like(block.bn2.weight)) for block in network.layer1)


@pytest.mark.parametrize("fields", [{"head_norm": True}, {"network": RESNET, "views": RESNET_VIEWS}])
def test_a_single_image_is_refused_where_there_are_batch_norms(fields: dict[str, Any]) -> None:
    method = tiny(**fields)
    with pytest.raises(ConfigError, match=r"train\.batch_size 1: a batch norm"):
        method.begin(DURATION._replace(batch_size=1, part_size=1))
    method.begin(DURATION._replace(batch_size=2, part_size=1, world_size=2))
    tiny().begin(DURATION._replace(batch_size=1, part_size=1))


# --- networks, views and what is exported


def test_a_swin_pools_its_normalised_map() -> None:
    swin = {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": {
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "pooling": "patches",
    }
    method = tiny(network=swin)
    scalars = method(images(), 0.0)
    scalars["loss"].backward()
    assert scalars["loss"].isfinite()
    assert grads(method).keys() == {n for n, p in method.named_parameters() if p.requires_grad}


def test_the_teacher_is_what_is_exported(tmp_path: Any) -> None:
    method = apart(tiny()).float()
    assert method.exported is method.teacher
    save_backbone(method.exported, tmp_path)
    loaded = load_backbone(tmp_path)
    assert type(loaded.network) is timm.models.VisionTransformer
    view = images()[0].float()
    torch.testing.assert_close(loaded(view).all(), method.teacher.eval()(view).all())


def test_the_defaults_are_those_of_the_code() -> None:
    values = DINOConfig().model_dump()
    assert [values[name] for name in ("output_dim", "hidden_dim", "bottleneck_dim")] == [65536, 2048, 256]
    assert (values["num_head_layers"], values["freeze_last_layer_epochs"]) == (3, 1)
    assert (values["norm_last_layer"], values["head_norm"]) == (True, False)
    assert [value for name, value in values.items() if "temperature" in name] == [0.1, 0.04, 0.04, 0]
    assert (values["momentum"], values["centre_momentum"]) == (0.996, 0.9)
    views = MultiCropConfig(**dino.DEFAULTS["views"])
    assert (views.min_scale, views.local_scale, views.interpolation) == (0.4, (0.05, 0.4), "bicubic")
    assert (views.num_local, views.local_size, views.local_blur_probability) == (8, 96, 0.5)
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (views.blur_probability, views.solarize_probability) == ((1.0, 0.1), (0.0, 0.2))


def test_a_network_that_would_resize_the_small_views_is_refused() -> None:
    student = build_timm("vit_tiny_patch16_224", {**VIT, "img_size": 16})
    views = MultiCrop(MultiCropConfig(image_size=16, local_size=8))
    with pytest.raises(ConfigError, match="would resize views of 8 pixels"):
        DINO(student, views, DINOConfig(**HEADS), seed=0)


def test_small_views_that_a_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="image size 10 is no whole number of patches"):
        tiny(views={"local_size": 10})


@pytest.mark.slow
def test_compiling_meets_no_new_graph_at_every_epoch() -> None:
    graphs: list[Any] = []
    fields = {
        "teacher_temperature": 0.07,
        "warmup_teacher_temperature_epochs": 4,
        "network": {"drop_path": 0.0},
    }
    method, expected = tiny(**fields), tiny(**fields)
    method.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for step in range(9):
        losses = [one(images(seed=step), step / 12)["loss"] for one in (method, expected)]
        torch.testing.assert_close(losses[0], losses[1])
        for one, loss in zip((method, expected), losses, strict=True):
            one.zero_grad()
            loss.backward()
            one.after_step(step / 12)
        if step == 3:
            settled = len(graphs)
    torch.testing.assert_close(method.centre.value, expected.centre.value)
    assert len(graphs) == settled


# --- two processes


def cases() -> dict[str, tuple[DINO, list[Tensor]]]:
    steady = {"drop_path": 0.0}
    return {
        "vit": (apart(tiny(network=steady)), images()),
        "head_norm": (apart(tiny(network=steady, head_norm=True)), images()),
        "resnet": (tiny(network=RESNET, views=RESNET_VIEWS), images(sizes=(64, 32))),
    }


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for name, (method, views) in cases().items():
        parallel = DistributedDataParallel(method, broadcast_buffers=False)
        loss = parallel([view.chunk(2)[rank] for view in views], 0.25)["loss"]
        loss.backward()
        method.after_step(0.25)
        results[name] = {"loss": loss.detach(), "grads": grads(method), "state": method.state_dict()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (method, views) in cases().items():
        loss = method(views, 0.25)["loss"]
        loss.backward()
        method.after_step(0.25)
        torch.testing.assert_close((ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2, loss.detach())
        for result in ranks:
            torch.testing.assert_close(result[name]["grads"], grads(method), rtol=1e-6, atol=1e-10)
            torch.testing.assert_close(
                result[name]["state"], dict(method.state_dict()), rtol=1e-6, atol=1e-10
            )
