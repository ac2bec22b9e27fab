import math

import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import nn

from fdkit.config import validate
from fdkit.errors import ConfigError
from fdkit.training.optimizer import (
    Lars,
    OptimizerConfig,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
)


def exempt_names(model: nn.Module, rule: str) -> set[str]:
    groups = parameter_groups(model, rule, 0.05)  # type: ignore[arg-type]
    exempt = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    return {name for name, parameter in model.named_parameters() if id(parameter) in exempt}


class Wrapped(nn.Module):
    """As in a method: names carry a prefix."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.student = network
        self.decoder = nn.Linear(4, 4)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return Wrapped(Beit(**sizes, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, init_values=0.1))


def test_a_vits_shared_position_table_is_decayed_although_timm_exempts_it(vit: nn.Module) -> None:
    table = "rel_pos_bias.relative_position_bias_table"
    assert table in vit.student.no_weight_decay()  # type: ignore[operator,union-attr]
    exempt = exempt_names(vit, "1d+tokens")
    assert f"student.{table}" not in exempt
    assert {
        "student.cls_token",
        "student.pos_embed",
        "student.blocks.0.attn.q_bias",
        "decoder.bias",
    } <= exempt
    assert {name for name, p in vit.named_parameters() if p.ndim > 1} - exempt == {
        name
        for name, p in vit.named_parameters()
        if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
    }


def test_rules_without_tokens(vit: nn.Module) -> None:
    assert exempt_names(vit, "none") == set()
    assert exempt_names(vit, "1d") == {name for name, p in vit.named_parameters() if p.ndim <= 1}


def test_frozen_parameters_are_in_no_group(vit: nn.Module) -> None:
    vit.student.patch_embed.proj.weight.requires_grad_(False)  # type: ignore[union-attr]
    named = parameter_groups(vit, "1d", 0.05)
    assert all(p.requires_grad for group in named for p in group["params"])
    vit.student.patch_embed.proj.weight.requires_grad_(True)  # type: ignore[union-attr]


def test_a_swins_position_parameters_are_exempt() -> None:
    swin = timm.create_model(
        "swinv2_tiny_window8_256", embed_dim=24, depths=(1, 1), num_heads=(1, 2), num_classes=0
    )
    exempt = exempt_names(Wrapped(swin), "1d+tokens")
    attention = "student.layers.0.blocks.0.attn."
    assert {
        f"{attention}cpb_mlp.0.weight",
        f"{attention}cpb_mlp.2.weight",
        f"{attention}logit_scale",
    } <= exempt
    assert not {f"{attention}qkv.weight", "student.layers.0.blocks.0.mlp.fc1.weight"} & exempt


def test_adamw_decays_only_what_it_should() -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimizerConfig(lr=0.1, weight_decay=0.5))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, bias)


def naive_lars(
    values: list[float], gradients: list[float], velocity: list[float], *, is_vector: bool
) -> None:
    """One step on a flat list: lr .3, momentum .9, decay .2, trust .001."""
    if not is_vector:
        gradients = [g + 0.2 * w for g, w in zip(gradients, values, strict=True)]
        size, slope = (math.sqrt(sum(x * x for x in row)) for row in (values, gradients))
        ratio = 0.001 * size / slope if size > 0 and slope > 0 else 1.0
        gradients = [g * ratio for g in gradients]
    for i, gradient in enumerate(gradients):
        velocity[i] = 0.9 * velocity[i] + gradient
        values[i] -= 0.3 * velocity[i]


@pytest.mark.parametrize("shape", [(2, 3), (5,), (1, 2, 2)])
@pytest.mark.parametrize("start", ["random", "zero"])
def test_lars_equals_a_naive_one(shape: tuple[int, ...], start: str) -> None:
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64) * (start == "random"))
    optimizer = Lars([parameter], lr=0.3, weight_decay=0.2)
    values = parameter.detach().flatten().tolist()
    velocity = [0.0] * len(values)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        naive_lars(values, parameter.grad.flatten().tolist(), velocity, is_vector=len(shape) == 1)
        optimizer.step()
    torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "larc", "lamb"])
def test_state_survives_as_plain_tensors(name: str) -> None:
    def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(2)
        layer = nn.Linear(3, 2)
        optimizer = build_optimizer(layer, OptimizerConfig(name=name, lr=0.1))  # type: ignore[arg-type]
        for step in range(steps):
            update(layer, optimizer, step)
        return layer, optimizer

    def update(layer: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    straight, _ = trained(5)
    layer, optimizer = trained(3)
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    resumed, fresh = trained(0)
    resumed.load_state_dict(layer.state_dict())
    load_optimizer_tensors(fresh, saved)
    for step in (3, 4):
        update(resumed, fresh, step)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_lamb_does_not_clip_a_second_time() -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimizerConfig(name="lamb"))
    assert optimizer.defaults["max_grad_norm"] is None


def test_an_unknown_optimiser_is_refused() -> None:
    wanted = "name: 'adam': input should be 'adamw', 'sgd', 'lars', 'larc' or 'lamb'"
    with pytest.raises(ConfigError, match=wanted):
        validate(OptimizerConfig, {"name": "adam"}, "flags")


def test_larc_rescales_every_tensor_by_its_norms_as_apex_does() -> None:
    layer = nn.Linear(3, 2).double()
    config = OptimizerConfig(name="larc", lr=0.3, weight_decay=0.2, momentum=0.9, decay_exempt="none")
    optimizer = build_optimizer(layer, config)
    values = [parameter.detach().clone() for parameter in layer.parameters()]
    velocities = [torch.zeros_like(value) for value in values]
    for _ in range(3):
        for value, velocity, parameter in zip(values, velocities, layer.parameters(), strict=True):
            gradient = parameter.grad = torch.randn_like(parameter)
            trust = 0.001 * value.norm() / (gradient.norm() + 0.2 * value.norm() + 1e-8)
            velocity.mul_(0.9).add_(trust * (gradient + 0.2 * value))
            value -= 0.3 * velocity
        optimizer.step()
    for value, parameter in zip(values, layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_sgd_adds_the_decay_to_the_gradient() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    start = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimizerConfig(name="sgd", lr=0.3, weight_decay=0.2, momentum=0.5))
    gradient = layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), start - 0.3 * (gradient + 0.2 * start))


def test_named_parts_stand_in_groups_of_their_own() -> None:
    model = Wrapped(nn.Linear(3, 4))
    groups = parameter_groups(model, "1d", 0.05, constant_lr=["decoder"])
    kinds = [(group["constant_lr"], group["is_decayed"], group["weight_decay"]) for group in groups]
    assert kinds == [(False, True, 0.05), (False, False, 0.0), (True, True, 0.05), (True, False, 0.0)]
    assert groups[2]["params"] == [model.decoder.weight]
    with pytest.raises(ConfigError, match="constant_lr predictor: no trained parameter") as caught:
        parameter_groups(model, "1d", 0.05, constant_lr=["predictor"])
    assert caught.value.hint == "known: decoder, student"


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="lr_steps"):
        OptimizerConfig(lr_steps=(60, 80))
    with pytest.raises(ConfigError, match="lr_steps"):
        OptimizerConfig(lr_schedule="steps")
    with pytest.raises(ConfigError, match="clip_each_parameter has no effect"):
        OptimizerConfig(clip_grad=None, clip_each_parameter=True)


def test_sgd_takes_parameters_that_get_their_first_gradient_late() -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimizerConfig(name="sgd", lr=0.3, weight_decay=0, momentum=0.5))
    start = layer.bias.detach().clone()
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.bias, start)
    layer.bias.grad = torch.ones_like(layer.bias)
    optimizer.step()
    torch.testing.assert_close(layer.bias.detach(), start - 0.3)


class WithStudent(nn.Module):
    """As a method: a student around a network, and something beside it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.network = network
        self.decoder = nn.Linear(4, 4)


def test_layer_decay_multiplies_the_rate_once_for_each_layer_behind() -> None:
    """Of a ViT of depth 2: the embedding three times, its first block twice, its second once, all else never."""
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    model = WithStudent(network)
    optimizer = build_optimizer(
        model, OptimizerConfig(layer_decay=0.5, weight_decay=0.3, decay_exempt="1d+tokens")
    )
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        short = name.removeprefix("student.network.")
        expected = 1.0
        if short.startswith(("patch_embed", "pos_embed", "cls_token")):
            expected = 0.125
        elif short.startswith("blocks.0."):
            expected = 0.25
        elif short.startswith("blocks.1."):
            expected = 0.5
        assert scales[id(parameter)] == expected, name
        assert decays[id(parameter)] == (
            0.0 if parameter.ndim == 1 or short in ("pos_embed", "cls_token") else 0.3
        )
    assert len(scales) == len(list(model.parameters()))


def test_without_layer_decay_groups_are_as_they_were() -> None:
    groups = parameter_groups(Wrapped(nn.Linear(3, 4)), "1d", 0.05)
    assert [(group["is_decayed"], group["lr_scale"], len(group["params"])) for group in groups] == [
        (True, 1.0, 2),
        (False, 1.0, 2),
    ]


def test_layer_decay_needs_layers_that_are_known() -> None:
    with pytest.raises(ConfigError, match="layer_decay: the layers of Linear are not known"):
        build_optimizer(WithStudent(nn.Linear(3, 4)), OptimizerConfig(layer_decay=0.5))
