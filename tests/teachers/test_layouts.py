from typing import Any

import pytest
import timm
import torch

from fdkit.teachers.layouts import STANDARD_HEADS, recognise

BASE = {"embed_dim": 192, "depth": 2, "num_heads": 3, "img_size": 40, "patch_size": 8, "num_classes": 0}


def vit(**args: Any) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**BASE, **args})


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"mlp_ratio": 2.0, "qkv_bias": False, "depth": 3},
        {"no_embed_class": True},
    ],
)
def test_a_recognised_layout_builds_the_same_state_dict(args: dict[str, Any]) -> None:
    state = vit(**args).state_dict()
    layout = recognise(state)
    assert layout is not None
    assert layout.timm_name == "vit_tiny_patch16_224"
    again = timm.create_model(layout.timm_name, num_classes=0, **layout.model_args(num_heads=3)).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    assert (layout.width, layout.patch_size, layout.grid) == (192, 8, 5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_standard_heads_are_timms(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    assert STANDARD_HEADS[network.embed_dim] == network.blocks[0].attn.num_heads


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_quickgelu_224",
        "deit_base_distilled_patch16_224",
        "vit_small_patch16_dinov3",
        "vit_giant_patch14_dinov2",
        "swin_tiny_patch4_window7_224",
        "resnet18",
        "vit_base_patch16_siglip_224",
    ],
)
def test_what_the_tensors_leave_open_is_not_guessed(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    assert recognise(state) is None


def test_a_position_embedding_that_is_no_square_is_not_guessed() -> None:
    state = vit().state_dict()
    state["pos_embed"] = torch.zeros(1, 23, 192)
    assert recognise(state) is None
