"""DINO, iBOT, DINOv2 and DINOv3: seeded files in the official layout against their forward written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_vits import (
    IMAGES,
    LARGER_IMAGES,
    Shapes,
    State,
    assert_holds_whole,
    hollow,
    layer_norm,
    linear,
    linear_shapes,
    load,
    normalised,
    patches_of,
    prefixed,
    run_blocks,
    seeded,
    vit_shapes,
    vit_tokens,
)
from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.teachers.official._layout import Change
from fdkit.teachers.official.dino import SATELLITE_MEAN, SATELLITE_STD


def head_shapes(width: int) -> Shapes:
    shapes = linear_shapes("head.mlp.0", 32, width) | linear_shapes("head.mlp.2", 16, 32)
    return shapes | {"head.last_layer.weight_g": (64, 1), "head.last_layer.weight_v": (64, 16)}


def dino_resized(table: Tensor, size: int, *, offset: float = 0.1) -> Tensor:
    """interpolate_pos_encoding, by a loop: bicubic with A = -0.75 at the points that the scale factor gives."""
    old = math.isqrt(table.shape[1] - 1)
    patches = table[0, 1:].reshape(old, old, -1).double()
    scale = old / (size + offset)
    weights = torch.zeros(size, old, dtype=torch.float64)
    for target in range(size):
        place = (target + 0.5) * scale - 0.5
        start = math.floor(place)
        for neighbour in range(start - 1, start + 3):
            far = abs(place - neighbour)
            near = (1.25 * far - 2.25) * far**2 + 1
            weight = near if far <= 1 else ((-0.75 * far + 3.75) * far - 6) * far + 3
            weights[target, min(max(neighbour, 0), old - 1)] += weight
    resized = torch.einsum("ti,uj,ijd->tud", weights, weights, patches)
    return torch.cat([table[:, :1], resized.reshape(1, size * size, -1).float()], dim=1)


def test_tokens_are_the_official_ones_from_backbone_and_checkpoint() -> None:
    student, teacher = seeded(vit_shapes(384)), {k: v * 0.9 for k, v in seeded(vit_shapes(384)).items()}
    alone = load(teacher)
    assert alone.reading.layout == "dino"
    expected = vit_tokens(teacher, IMAGES, 6)
    assert (alone.tokens(IMAGES) - expected).abs().max() < 1e-4
    head = seeded(head_shapes(384))
    checkpoint = {
        "student": prefixed(prefixed(student, "backbone.") | head, "module."),
        "teacher": prefixed(teacher, "backbone.") | head,
        "optimizer": {"state": {}, "param_groups": [{"params": [0, 1, 2]}]},
        "epoch": 100,
        "dino_loss": {"center": torch.zeros(1, 64)},
    }
    whole = load(checkpoint)
    assert (whole.tokens(IMAGES) - expected).abs().max() < 1e-4
    assert Change("head.mlp.0.weight", None, "projection head") in whole.reading.audit
    tokens = load(checkpoint, checkpoint_key="student").tokens(IMAGES)
    assert (tokens - vit_tokens(student, IMAGES, 6)).abs().max() < 1e-4
    assert (tokens - expected).abs().max() > 1e-2


def test_ibots_student_is_read_without_its_mask_token() -> None:
    state = seeded(vit_shapes(192) | {"masked_embed": (1, 192)})
    loaded = load({"state_dict": state})
    assert loaded.reading.layout == "dino"
    assert (loaded.tokens(IMAGES) - vit_tokens(state, IMAGES, 3)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [6, 3])
def test_positions_for_another_size_are_those_of_interpolate_pos_encoding(size: int) -> None:
    state = seeded(vit_shapes(192))
    images = LARGER_IMAGES[:, :, : 16 * size, : 16 * size]
    tokens = load(state, image_size=16 * size).tokens(images)
    right, wrong = (dino_resized(state["pos_embed"], size, offset=offset) for offset in (0.1, 0.0))
    assert (tokens - vit_tokens(state, images, 3, positions=right)).abs().max() < 1e-4
    assert (tokens - vit_tokens(state, images, 3, positions=wrong)).abs().max() > 1e-3


def test_dinos_files_of_real_size_are_held_whole() -> None:
    for patch, rows in ((16, 197), (8, 785)):
        reading = assert_holds_whole(hollow(vit_shapes(768, 12, patch=patch, rows=rows)), "dino")
        assert (reading.network.model_args["patch_size"], reading.network.model_args["img_size"]) == (
            patch,
            224,
        )


def dinov2_shapes(
    width: int, depth: int = 2, *, rows: int = 17, registers: int = 0, gated: int = 0
) -> Shapes:
    """gated: hidden width of the SwiGLU MLPs; 0 for plain ones."""
    shapes = vit_shapes(width, depth, patch=14, rows=rows) | {"mask_token": (1, width)}
    shapes |= {f"blocks.{index}.ls{i}.gamma": (width,) for index in range(depth) for i in (1, 2)}
    shapes |= {"register_tokens": (1, registers, width)} if registers else {}
    if gated:
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for index in range(depth):
            shapes |= linear_shapes(f"blocks.{index}.mlp.w12", 2 * gated, width)
            shapes |= linear_shapes(f"blocks.{index}.mlp.w3", width, gated)
    return shapes


def dinov2_tokens(state: State, images: Tensor, num_heads: int, positions: Tensor | None = None) -> Tensor:
    """Class token and patches get positions, registers none; then they stand between the two."""
    x = torch.cat([state["cls_token"].expand(2, -1, -1), patches_of(state, normalised(images))], dim=1)
    x = x + (state["pos_embed"] if positions is None else positions)
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(2, -1, -1), x[:, 1:]], dim=1)
    return layer_norm(run_blocks(x, state, num_heads), state, "norm")


IMAGES_14 = IMAGES[:, :, :56, :56]


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_of_dinov2_are_the_official_ones(registers: int) -> None:
    state = seeded(dinov2_shapes(384, registers=registers))
    loaded = load(state)
    assert loaded.reading.layout == "dinov2"
    tokens = loaded.tokens(IMAGES_14)
    assert tokens.shape[1] == 17 + registers
    assert (tokens - dinov2_tokens(state, IMAGES_14, 6)).abs().max() < 1e-4
    unplaced = state | {"pos_embed": state["pos_embed"] * torch.tensor([0.0] + [1.0] * 16)[:, None]}
    assert (tokens - dinov2_tokens(unplaced, IMAGES_14, 6)).abs().max() > 1e-2


@pytest.mark.parametrize("size", [6, 3])
def test_dinov2_resamples_with_the_offset_and_with_registers_by_antialiasing(size: int) -> None:
    images = LARGER_IMAGES[:, :, : 14 * size, : 14 * size]
    state = seeded(dinov2_shapes(192))
    tokens = load(state, image_size=14 * size).tokens(images)
    expected = dinov2_tokens(state, images, 3, dino_resized(state["pos_embed"], size))
    assert (tokens - expected).abs().max() < 1e-4
    state = seeded(dinov2_shapes(192, registers=4))
    tokens = load(state, image_size=14 * size).tokens(images)
    for is_right in (True, False):
        rows = state["pos_embed"][0, 1:].T.reshape(1, 192, 4, 4)
        resized = F.interpolate(rows, size=(size, size), mode="bicubic", antialias=is_right)
        positions = torch.cat([state["pos_embed"][:, :1], resized.flatten(2).mT], dim=1)
        difference = (tokens - dinov2_tokens(state, images, 3, positions)).abs().max()
        assert (difference < 1e-4) == is_right


def test_the_gated_mlps_of_the_giant_are_the_official_ones() -> None:
    state = seeded(dinov2_shapes(192, depth=1, gated=136))
    x = torch.cat([state["cls_token"].expand(2, -1, -1), patches_of(state, normalised(IMAGES_14))], dim=1)
    x = run_swiglu_block(x + state["pos_embed"], state)
    tokens = load(state).tokens(IMAGES_14)
    assert (tokens - layer_norm(x, state, "norm")).abs().max() < 1e-4


def run_swiglu_block(x: Tensor, state: State) -> Tensor:
    """Block 0: plain attention, then SiLU of the first half of w12 times the second."""
    attention = {k: v for k, v in state.items() if ".mlp." not in k} | {
        "blocks.0.mlp.fc1.weight": torch.zeros(1, 192),
        "blocks.0.mlp.fc1.bias": torch.zeros(1),
        "blocks.0.mlp.fc2.weight": torch.zeros(192, 1),
        "blocks.0.mlp.fc2.bias": torch.zeros(192),
    }
    x = run_blocks(x, attention, 3)
    gate, value = linear(layer_norm(x, state, "blocks.0.norm2"), state, "blocks.0.mlp.w12").chunk(2, dim=-1)
    return x + state["blocks.0.ls2.gamma"] * linear(F.silu(gate) * value, state, "blocks.0.mlp.w3")


def test_a_training_checkpoint_of_dinov2_keeps_its_blocks_in_groups() -> None:
    state = seeded(dinov2_shapes(192, depth=4))
    grouped = {
        name.replace("blocks.", f"blocks.{int(name.split('.')[1]) // 2}.")
        if "blocks." in name
        else name: value
        for name, value in state.items()
    }
    content = {"teacher": prefixed(grouped, "backbone.") | seeded(linear_shapes("dino_head.mlp.0", 8, 192))}
    assert (load(content).tokens(IMAGES_14) - dinov2_tokens(state, IMAGES_14, 3)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("width", "depth", "registers", "gated"), [(384, 12, 0, 0), (1024, 24, 4, 0), (1536, 40, 4, 4096)]
)
def test_dinov2s_files_of_real_size_are_held_whole(
    width: int, depth: int, registers: int, gated: int
) -> None:
    shapes = dinov2_shapes(width, depth, rows=1370, registers=registers, gated=gated)
    reading = assert_holds_whole(hollow(shapes), "dinov2")
    assert reading.network.model_args["img_size"] == 518
    assert reading.network.assumed_args == {"num_heads": width // 64}


def dinov3_shapes(
    width: int,
    depth: int = 2,
    *,
    gated: int = 0,
    qkv_bias: bool = True,
    local_norm: bool = False,
    channels: int = 64,
) -> Shapes:
    """gated: hidden width of the SwiGLU MLPs; 0 for plain ones. channels: of a head."""
    shapes = dinov2_shapes(width, depth, gated=gated)
    shapes |= linear_shapes("patch_embed.proj", width, 3, 16, 16)
    shapes |= {"storage_tokens": (1, 4, width), "rope_embed.periods": (channels // 4,)}
    del shapes["pos_embed"]
    for index in range(depth):
        at = f"blocks.{index}."
        shapes |= {f"{at}attn.qkv.bias_mask": (3 * width,)}
        if not qkv_bias:
            del shapes[f"{at}attn.qkv.bias"], shapes[f"{at}attn.qkv.bias_mask"]
        if gated:
            del shapes[f"{at}mlp.w12.weight"], shapes[f"{at}mlp.w12.bias"]
            shapes |= linear_shapes(f"{at}mlp.w1", gated, width) | linear_shapes(f"{at}mlp.w2", gated, width)
    return shapes | (linear_shapes("local_cls_norm", width) if local_norm else {})


def masked(state: State) -> State:
    """The buffers as init_weights leaves them and the published files hold them: periods rounded to bfloat16."""
    count = len(state["rope_embed.periods"])
    state = state | {"rope_embed.periods": (100.0 ** (torch.arange(count) / count)).bfloat16().float()}
    for name in [name for name in state if name.endswith("bias_mask")]:
        third = len(state[name]) // 3
        state[name] = torch.cat([torch.ones(third), torch.zeros(third), torch.ones(third)])
    return state


def rotary(state: State, size: int, periods: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sine, cosine), each (size^2, 64): rows in the first quarter of a head's channels, columns in the second."""
    periods = state["rope_embed.periods"] if periods is None else periods
    place = 2 * (torch.arange(size) + 0.5) / size - 1
    rows, columns = place.repeat_interleave(size), place.repeat(size)
    angles = torch.cat([2 * math.pi * axis[:, None] / periods for axis in (rows, columns)], dim=1).repeat(
        1, 2
    )
    return angles.sin(), angles.cos()


def dinov3_tokens(
    state: State, images: Tensor, *, periods: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Storage tokens behind the class token; queries and keys of patches rotated; no bias for keys."""
    x = patches_of(state, normalised(images))
    sine, cosine = rotary(state, math.isqrt(x.shape[1]), periods)
    x = torch.cat([state["cls_token"].expand(2, -1, -1), state["storage_tokens"].expand(2, -1, -1), x], dim=1)
    width = x.shape[-1]

    def rotated(heads: Tensor) -> Tensor:
        patches = heads[:, :, 5:]
        first, second = patches.chunk(2, dim=-1)
        turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
        return torch.cat([heads[:, :, :5], turned], dim=2)

    for index in range(2):
        at = f"blocks.{index}."
        bias = None
        if f"{at}attn.qkv.bias" in state:
            bias = state[f"{at}attn.qkv.bias"].clone()
            bias[width : 2 * width] = 0
        normed = layer_norm(x, state, f"{at}norm1", eps)
        qkv = F.linear(normed, state[f"{at}attn.qkv.weight"], bias)
        query, key, value = qkv.unflatten(-1, (3, width // 64, 64)).permute(2, 0, 3, 1, 4)
        weights = (rotated(query) @ rotated(key).mT / 8).softmax(dim=-1)
        attended = linear((weights @ value).transpose(1, 2).flatten(2), state, f"{at}attn.proj")
        x = x + state[f"{at}ls1.gamma"] * attended
        normed = layer_norm(x, state, f"{at}norm2", eps)
        if f"{at}mlp.w1.weight" in state:
            gate, gated = (linear(normed, state, f"{at}mlp.{name}") for name in ("w1", "w2"))
            out = linear(F.silu(gate) * gated, state, f"{at}mlp.w3")
        else:
            out = linear(F.gelu(linear(normed, state, f"{at}mlp.fc1")), state, f"{at}mlp.fc2")
        x = x + state[f"{at}ls2.gamma"] * out
    return layer_norm(x, state, "norm", eps)


@pytest.mark.parametrize("kind", [{}, {"gated": 136}, {"gated": 128, "qkv_bias": False, "local_norm": True}])
def test_tokens_of_dinov3_are_the_official_ones(kind: dict[str, Any]) -> None:
    state = masked(seeded(dinov3_shapes(128, **kind)))
    loaded = load(state, image_size=64)
    assert loaded.reading.layout == "dinov3"
    assert loaded.reading.network.model_args["num_heads"] == 2
    tokens = loaded.tokens(IMAGES)
    assert tokens.shape == (2, 5 + 16, 128)
    assert (tokens - dinov3_tokens(state, IMAGES)).abs().max() < 1e-4
    exact = 100.0 ** (torch.arange(16) / 16)
    assert (tokens - dinov3_tokens(state, IMAGES, periods=exact)).abs().max() > 5e-4
    coarse = {k: v * 1e-3 if k.startswith(("patch", "cls", "storage")) else v for k, v in state.items()}
    by_eps = [dinov3_tokens(coarse, IMAGES, eps=eps) for eps in (1e-5, 1e-6)]
    assert (load(coarse, image_size=64).tokens(IMAGES) - by_eps[0]).abs().max() < 1e-4
    assert (by_eps[0] - by_eps[1]).abs().max() > 1e-3


def test_dinov3_takes_any_size_without_a_table() -> None:
    state = masked(seeded(dinov3_shapes(128)))
    tokens = load(state, image_size=96).tokens(LARGER_IMAGES)
    assert (tokens - dinov3_tokens(state, LARGER_IMAGES)).abs().max() < 1e-4


def test_a_bias_for_the_keys_is_refused() -> None:
    state = masked(seeded(dinov3_shapes(128)))
    state["blocks.1.attn.qkv.bias_mask"] = torch.ones(384)
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.bias has a bias for the keys"):
        load(state)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "kind"),
    [
        (384, 12, 6, {}),
        (384, 12, 6, {"gated": 1536}),
        (768, 12, 12, {}),
        (1024, 24, 16, {"local_norm": True}),
        (1024, 24, 16, {"gated": 4096}),
        (1280, 32, 20, {"gated": 5120}),
        (4096, 40, 32, {"gated": 8192, "qkv_bias": False, "local_norm": True, "channels": 128}),
    ],
)
def test_dinov3s_files_of_real_size_are_held_whole(
    width: int, depth: int, heads: int, kind: dict[str, Any]
) -> None:
    reading = assert_holds_whole(masked(hollow(dinov3_shapes(width, depth, **kind))), "dinov3")
    network = reading.network
    assert network.model_args["num_heads"] == heads
    is_satellite = width == 1024 and "local_norm" in kind
    assert ((network.mean, network.std) == (SATELLITE_MEAN, SATELLITE_STD)) == is_satellite
    assert ("satellite" in network.assumption) == (width == 4096)
