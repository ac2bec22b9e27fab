"""Swins at several sizes, against a plain reading of EsViT's network: attention over a whole padded map, masked."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.any_size_swin import take_any_size
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_backbone, build_timm

ARCHITECTURE = "swin_tiny_patch4_window7_224"
ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 4),
    "window_size": 4,
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.0,
}
WINDOWS = (4, 4, 4)
SHIFTS = (2, 2, 0)
"""Of the second block of each stage: a map that is one window at the network's own size is not shifted."""
SIZES = (12, 20, 24)
"""Maps of 6, 3, 2; of 10, 5, 3; of 12, 6, 3 patches a side."""


def swin(**args: Any) -> Backbone:
    """In double precision, with position biases large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_timm(ARCHITECTURE, {**ARGS, **args}).double()
        for name, parameter in backbone.network.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return backbone


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size)).double()


def shares_window(side: int, window: int, shift: int) -> Tensor:
    """(N, N): whether two places of a map attend to each other; windows that wrap around an edge are cut there."""
    shares = torch.ones(side**2, side**2, dtype=torch.bool)
    for axis in range(2):
        place = torch.arange(side**2).view(side, side).div(side if axis == 0 else 1, rounding_mode="floor")
        moved = (place.flatten() % side - shift) % side
        for label in (moved // window, moved >= side - shift):
            shares &= label[:, None] == label[None]
    return shares


def position_bias(table: Tensor, side: int, window: int) -> Tensor:
    """(heads, N, N) from a table by rows and columns between query and key; any number where they are too far."""
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    down, right = (place[:, None] - place[None] + window - 1 for place in (row, column))
    index = down * (2 * window - 1) + right
    return table[index.clamp(0, len(table) - 1)].permute(2, 0, 1)


def attend(x: Tensor, state: dict[str, Tensor], window: int, shift: int, *, sees_padding: bool) -> Tensor:
    """Attention of a map (B, S, S, C) padded to whole windows at bottom and right, cut again."""
    side = x.shape[1]
    padded = math.ceil(side / window) * window
    x = F.pad(x, (0, 0, 0, padded - side, 0, padded - side))
    table = state["attn.relative_position_bias_table"]
    shares = shares_window(padded, window, shift)
    if not sees_padding:
        is_real = F.pad(torch.ones(side, side, dtype=torch.bool), (0, padded - side, 0, padded - side))
        shares &= is_real.flatten()[None] | torch.eye(padded**2, dtype=torch.bool)
    mask = position_bias(table, padded, window).masked_fill(~shares, -math.inf)
    qkv = F.linear(x.flatten(1, 2), state["attn.qkv.weight"], state["attn.qkv.bias"])
    query, key, value = qkv.unflatten(-1, (3, table.shape[1], -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    out = F.linear(mixed, state["attn.proj.weight"], state["attn.proj.bias"])
    return out.unflatten(1, (padded, padded))[:, :side, :side]


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def merge(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A map (B, S, S, C) at half the side, odd maps padded: the four patches of a square, columns outermost."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    four = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
    return F.linear(layer_norm(four, state, "norm"), state["reduction.weight"])


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def by_hand(state: dict[str, Tensor], x: Tensor, *, sees_padding: bool = True) -> Tensor:
    """The final map (B, S, S, C) of normalised images, from the tensors of a network."""
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=2)
    x = layer_norm(x.permute(0, 2, 3, 1), state, "patch_embed.norm")
    for stage, (window, shift) in enumerate(zip(WINDOWS, SHIFTS, strict=True)):
        x = merge(x, part(state, f"layers.{stage}.downsample.")) if stage else x
        for number in range(2):
            block = part(state, f"layers.{stage}.blocks.{number}.")
            moved = shift if number == 1 else 0
            x = x + attend(layer_norm(x, block, "norm1"), block, window, moved, sees_padding=sees_padding)
            hidden = F.linear(layer_norm(x, block, "norm2"), block["mlp.fc1.weight"], block["mlp.fc1.bias"])
            x = x + F.linear(F.gelu(hidden), block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return layer_norm(x, state, "norm")


def any_size_swin() -> nn.Module:
    network = swin().network
    take_any_size(network, SIZES)
    return network


@pytest.mark.parametrize("size", [*SIZES, 32, 40])
def test_maps_and_gradients_equal_attention_over_padded_maps(size: int) -> None:
    network = any_size_swin()
    found = network.forward_features(images(size))
    state = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    expected = by_hand(state, images(size))
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).double()
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=name)


@pytest.mark.parametrize("size", [12, 20])
def test_padding_takes_part_in_attention_and_comes_before_the_shift(size: int) -> None:
    network = any_size_swin()
    with torch.no_grad():
        found = network.forward_features(images(size))
        blind = by_hand(dict(network.named_parameters()), images(size), sees_padding=False)
        timms = swin(strict_img_size=False).network.forward_features(images(size))
    assert (found - blind).abs().max() > 1e-2
    assert (found - timms).abs().max() > 1e-2  # timm shifts first


def test_images_of_the_own_size_give_the_bits_of_plain_timm() -> None:
    assert torch.equal(
        any_size_swin().forward_features(images(32)), swin().network.forward_features(images(32))
    )


def test_the_weights_are_those_of_a_plain_network() -> None:
    network = any_size_swin()
    network.forward_features(images(20))
    plain = build_backbone(swin().recipe).network.double()
    plain.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(plain.forward_features(images(32)), network.forward_features(images(32)))
    with pytest.raises(AssertionError):
        plain.forward_features(images(20))


def test_a_deep_copy_takes_the_same_sizes_by_its_own_weights() -> None:
    network = any_size_swin()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        before = network.forward_features(images(20))
        assert torch.equal(copied.forward_features(images(20)), before)
        copied.norm.bias.add_(1)
        assert torch.equal(network.forward_features(images(20)), before)
        assert not torch.allclose(copied.forward_features(images(20)), before)


def test_masks_are_made_once_a_size_and_serve_training_after_evaluation() -> None:
    network = any_size_swin()
    with torch.inference_mode():
        network.forward_features(images(20))
    masks = [block.masks for stage in network.layers for block in stage.blocks]
    made = [{key: mask for key, mask in one.items() if mask is not None} for one in masks]
    assert [len(one) for one in made] == [0, 1, 0, 1, 0, 0]
    network.forward_features(images(20)).sum().backward()
    for one, other in zip(made, masks, strict=True):
        assert all(mask is other[key] for key, mask in one.items())
    assert network.float().forward_features(images(20).float()).dtype == torch.float32


def test_sizes_of_no_whole_patches_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"image size 21 and 31 is no whole number of patches: .* 2x2 pixels"
    ):
        take_any_size(swin().network, (20, 21, 31))
    with pytest.raises(ConfigError, match="image size 0 is no whole number"):
        take_any_size(swin().network, (0,))


def test_an_own_size_that_needs_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match="image size 40: a 10x10 map does not divide into 4x4 windows"):
        take_any_size(swin(img_size=40).network, (20,))


def test_other_networks_are_refused() -> None:
    network = build_timm("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1, 1, 1)}).network
    with pytest.raises(
        ConfigError, match="SwinTransformerV2 takes images of one size alone, not of 96 and 64"
    ):
        take_any_size(network, (96, 64))
