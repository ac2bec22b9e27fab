import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.beit import Beit
from torch import nn

from fdkit.models.fast_beit import FastBlock, accelerate
from fdkit.models.fast_beit_attention import FastAttention

SIZES: dict[str, Any] = {
    "img_size": (48, 80),
    "patch_size": 16,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 0,
    "global_pool": "token",
}
POSITIONS = {
    "shared_rpb": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    "rpb": {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True},
    "absolute": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
}


def _pair(position: str = "shared_rpb", **args: Any) -> tuple[Beit, Beit]:
    """The same random network twice: as timm makes it, and accelerated."""
    plain = timm.create_model("beit_base_patch16_224", **SIZES, **POSITIONS[position], **args)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain.train(), fast.train()


def _step(network: Beit, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    images = torch.rand(5, 3, 48, 80)
    torch.manual_seed(seed)
    out = network.forward_features(images)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_seeded_step_equals_timms(position: str, drop_path_rate: float) -> None:
    """Including which samples are dropped, and a gradient for every parameter even if all of them are."""
    plain, fast = _pair(position, drop_path_rate=drop_path_rate)
    (expected, expected_grads), (found, grads) = _step(plain, 3), _step(fast, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_dropped_samples_are_not_computed() -> None:
    _, fast = _pair(drop_path_rate=0.9)
    sizes: list[int] = []
    fast.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for seed in range(20):
        _step(fast, seed)
    assert sum(sizes) < 5 * 20 / 2


def test_evaluation_drops_nothing() -> None:
    plain, fast = _pair(drop_path_rate=0.9)
    images = torch.rand(2, 3, 48, 80)
    with torch.no_grad():
        expected = plain.eval().forward_features(images)
        torch.testing.assert_close(fast.eval().forward_features(images), expected, rtol=1e-4, atol=1e-5)


def test_attention_weights_are_still_readable_on_timms_unfused_path() -> None:
    plain, fast = _pair()
    maps: list[torch.Tensor] = []
    for network in (plain, fast):
        attention = network.blocks[1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda *call: maps.append(call[2]))
        network.eval().forward_features(torch.ones(1, 3, 48, 80))
    assert maps[0].shape == (1, 3, 16, 16)
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-5)


def test_names_and_copies_survive() -> None:
    plain, fast = _pair(drop_path_rate=0.1)
    twin = copy.deepcopy(fast)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    assert isinstance(twin.blocks[0], FastBlock)
    assert isinstance(twin.blocks[0].attn, FastAttention)
    with torch.no_grad():
        twin.blocks[0].attn.proj.weight.zero_()
    assert fast.blocks[0].attn.proj.weight.abs().sum() > 0
    assert isinstance(fast.blocks[2].drop_path1, DropPath)


def test_other_networks_are_left_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    accelerate(network)
    assert type(network[0]) is nn.Linear
