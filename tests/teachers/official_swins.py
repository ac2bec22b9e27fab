"""Swins in the official key layouts, and a plain reading of their official forward.

Attention is written over the whole map, and windows are a mask.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.official_files import Shapes, filled, with_prefix

PATCH, SIDE, WIDTH = 2, 32, 8
DEPTHS, HEADS = (2, 3, 1), (1, 2, 4)
IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
Sizes = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
SMALL: Sizes = (PATCH, SIDE, WIDTH, DEPTHS, HEADS)
TABLE, INDEX = "attn.relative_position_bias_table", "attn.relative_position_index"


def block_windows(window: int, block: int, side: int) -> tuple[int, int]:
    """Window and shift of a block: a map no larger than the window is one window, unshifted."""
    if side <= window:
        return side, 0
    return window, 0 if block % 2 == 0 else window // 2


def swin_shapes(window: int, sizes: Sizes = SMALL, *, version: int = 1, has_masks: bool = True) -> Shapes:
    """Names and shapes of the official network, buffers included; `has_masks` is false for EsViT."""
    patch, image, width, depths, heads = sizes
    shapes: Shapes = {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= norm("patch_embed.norm", width)
    for stage, depth in enumerate(depths):
        side, wide = image // patch // 2**stage, width * 2**stage
        for number in range(depth):
            size, shift = block_windows(window, number, side)
            block = {**block_shapes(wide, heads[stage], version), INDEX: (size**2, size**2)}
            block |= {TABLE: ((2 * size - 1) ** 2, heads[stage])} if version == 1 else {}
            if has_masks and shift:
                block["attn_mask"] = ((side // size) ** 2, size**2, size**2)
            shapes |= with_prefix(f"layers.{stage}.blocks.{number}.", block)
        if stage < len(depths) - 1:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * wide, 4 * wide)
            shapes |= norm(f"layers.{stage}.downsample.norm", (4 if version == 1 else 2) * wide)
    return {**shapes, **norm("norm", width * 2 ** (len(depths) - 1))}


def block_shapes(width: int, heads: int, version: int) -> Shapes:
    block: Shapes = {**norm("norm1", width), **norm("norm2", width), "attn.qkv.weight": (3 * width, width)}
    block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    block |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
    block |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    if version == 1:
        return {**block, "attn.qkv.bias": (3 * width,)}
    block |= {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.logit_scale": (heads, 1, 1)}
    block |= {"attn.cpb_mlp.0.weight": (512, 2), "attn.cpb_mlp.0.bias": (512,)}
    return {**block, "attn.cpb_mlp.2.weight": (heads, 512)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def coordinates(window: int, pretrained: int = 0) -> Tensor:
    """(1, 2w - 1, 2w - 1, 2): Swin V2's log-spaced coordinates, in steps of the window it was pretrained with."""
    table = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
    for i in range(2 * window - 1):
        for j in range(2 * window - 1):
            for axis, place in enumerate((i, j)):
                far = 8 * (place - window + 1) / ((pretrained or window) - 1)
                table[0, i, j, axis] = math.copysign(math.log2(abs(far) + 1) / math.log2(8), far)
    return table


def coordinate_buffers(window: int, sizes: Sizes, pretrained: tuple[int, ...] = ()) -> dict[str, Tensor]:
    patch, image, _, depths, _ = sizes
    made = {}
    for stage, depth in enumerate(depths):
        size, _ = block_windows(window, 0, image // patch // 2**stage)
        table = coordinates(size, pretrained[stage] if pretrained else 0)
        made |= {f"layers.{stage}.blocks.{n}.attn.relative_coords_table": table for n in range(depth)}
    return made


def pairs(side: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every two places of a map: whether they share a window, and rows and columns between them; each (N, N).

    A shifted window that wraps around the edge is cut there.
    """
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    shares = torch.ones(side * side, side * side, dtype=torch.bool)
    for place in (row.flatten(), column.flatten()):
        moved = (place - shift) % side
        for label in (moved // window, moved >= side - shift):
            shares &= label[:, None] == label[None]
    down, right = (place.flatten()[:, None] - place.flatten()[None] for place in (row, column))
    return shares, down, right


def bias_map(block: dict[str, Tensor], window: int, pretrained: int) -> Tensor:
    """(2w - 1, 2w - 1, heads): bias by rows and columns between query and key."""
    if TABLE in block:
        return block[TABLE].unflatten(0, (2 * window - 1, 2 * window - 1))
    hidden = F.linear(
        coordinates(window, pretrained)[0], block["attn.cpb_mlp.0.weight"], block["attn.cpb_mlp.0.bias"]
    )
    return 16 * torch.sigmoid(F.linear(hidden.relu(), block["attn.cpb_mlp.2.weight"]))


def attend(
    x: Tensor, block: dict[str, Tensor], heads: int, window: int, shift: int, pretrained: int
) -> Tensor:
    """Window attention of a map as tokens (B, N, C), as attention over the whole map with other windows masked."""
    side = math.isqrt(x.shape[1])
    shares, down, right = pairs(side, window, shift)
    biases = bias_map(block, window, pretrained)
    bias = biases[(down + window - 1).clamp(0, 2 * window - 2), (right + window - 1).clamp(0, 2 * window - 2)]
    mask = bias.permute(2, 0, 1).masked_fill(~shares, -math.inf)
    qkv_bias = block.get("attn.qkv.bias")
    if qkv_bias is None:
        qkv_bias = torch.cat([block["attn.q_bias"], torch.zeros(x.shape[-1]), block["attn.v_bias"]])
    qkv = F.linear(x, block["attn.qkv.weight"], qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if "attn.logit_scale" in block:
        sharpness = block["attn.logit_scale"].clamp(max=math.log(100)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * sharpness
    else:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mixed = ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(mixed, block["attn.proj.weight"], block["attn.proj.bias"])


def official_tokens(
    state: dict[str, Tensor],
    images: Tensor,
    window: int,
    *,
    heads: tuple[int, ...] = HEADS,
    eps: float = 1e-5,
    pretrained: tuple[int, ...] = (0, 0, 0),
    has_norm: bool = True,
) -> Tensor:
    """The official forward on official names, V1 or V2 as the tensors tell."""

    def layer_norm(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=eps)

    is_v2 = any("logit_scale" in key for key in state)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = layer_norm(x.flatten(2).transpose(1, 2), state, "patch_embed.norm")
    for stage, num_heads in enumerate(heads):
        start = f"layers.{stage}.blocks."
        for number in range(len({k.split(".")[3] for k in state if k.startswith(start)})):
            prefix = f"{start}{number}."
            block = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            side = math.isqrt(x.shape[1])
            attention = partial(attend, block=block, heads=num_heads, pretrained=pretrained[stage])
            size, shift = block_windows(window, number, side)

            def mlp(y: Tensor, block: dict[str, Tensor] = block) -> Tensor:
                hidden = F.gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
                return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])

            if is_v2:
                x = x + layer_norm(attention(x, window=size, shift=shift), block, "norm1")
                x = x + layer_norm(mlp(x), block, "norm2")
            else:
                x = x + attention(layer_norm(x, block, "norm1"), window=size, shift=shift)
                x = x + mlp(layer_norm(x, block, "norm2"))
        down = f"layers.{stage}.downsample"
        if f"{down}.reduction.weight" in state:
            square = x.unflatten(1, (math.isqrt(x.shape[1]), -1))
            corners = [square[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            merged = torch.cat(corners, dim=-1).flatten(1, 2)
            reduction = state[f"{down}.reduction.weight"]
            if is_v2:
                x = layer_norm(F.linear(merged, reduction), state, f"{down}.norm")
            else:
                x = F.linear(layer_norm(merged, state, f"{down}.norm"), reduction)
    return layer_norm(x, state, "norm") if has_norm else x


def strong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with position biases large enough to matter."""
    return {key: 15 * value if TABLE in key or "cpb_mlp" in key else value for key, value in state.items()}


def esvit_content(window: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A whole EsViT checkpoint, and its teacher's and student's networks."""
    shapes = swin_shapes(window, has_masks=False)
    wide = WIDTH * 4
    heads: Shapes = {}
    for name in ("head", "head_dense"):
        heads |= {f"{name}.mlp.0.weight": (16, wide), f"{name}.mlp.0.bias": (16,)}
        heads |= {f"{name}.last_layer.weight_g": (12, 1), f"{name}.last_layer.weight_v": (12, 16)}
    teacher, student = (strong(filled({**shapes, **heads}, seed)) for seed in (1, 2))
    content = {
        "student": with_prefix("module.", student),
        "teacher": teacher,
        "optimizer": {"state": {}},
        "dino_loss": {"center": torch.zeros(1, 12), "center_grid": torch.zeros(1, 12)},
        "epoch": 300,
    }
    return content, teacher, student


def swin_state(window: int = 4) -> dict[str, Tensor]:
    return strong(filled({**swin_shapes(window), "head.weight": (10, WIDTH * 4), "head.bias": (10,)}))


def v2_state(window: int, pretrained: tuple[int, ...] = (), network: str = "cpb_mlp") -> dict[str, Tensor]:
    state = strong(filled(swin_shapes(window, version=2)))
    state = {**state, **coordinate_buffers(window, SMALL, pretrained)}
    return {key.replace("cpb_mlp", network): value for key, value in state.items()}
