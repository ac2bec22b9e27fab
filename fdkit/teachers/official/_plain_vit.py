"""What the tensors of a plain vision transformer show of it, and the timm network of exactly those sizes."""

import math
import re
from typing import Any, Literal, NamedTuple

import torch

from fdkit.errors import WeightsError
from fdkit.models.vit import sincos_position
from fdkit.teachers.official._layout import Conversion, Network, Resample, State

STANDARD_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
"""Width to number of heads in the papers' models; shapes do not show heads. Other widths have 64 channels a head."""

_HOSTS = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}

PLAIN = (
    r"pos_embed",
    r"patch_embed\.proj\.weight",
    r"blocks\.0\.norm1\.weight",
    r"blocks\.0\.attn\.qkv\.weight",
    r"blocks\.0\.mlp\.fc1\.weight",
)
"""Names every plain ViT has in timm's, and so in most official files."""
NOT_PLAIN = (
    r"norm_pre\..*",
    r"attn_pool\..*",
    r"blocks\.0\.(attn\.(q_norm|q_bias|norm|relative_position_bias_table)|mlp\.norm|norm11|post_norm1)\b.*",
    r"rel_pos_bias\..*",
)
"""Names that show another network under the names of a plain one: CLIP, SigLIP, BEiT, normalised queries."""


class PlainViT(NamedTuple):
    """Absolute positions, pre-norm blocks, a final norm: the sizes the tensors show, in timm's names."""

    width: int
    depth: int
    patch_size: int
    grid: int
    """Rows, and columns, of patches the positions are for."""
    hidden: int
    """Rows of the first matrix of an MLP: both halves of it if it is gated."""
    is_gated: bool
    num_registers: int
    num_prefix_rows: int
    """Positions in front of the patches'."""
    has_class_token: bool
    has_layer_scale: bool
    has_qkv_bias: bool
    has_conv_stem: bool
    has_norm: bool
    has_pooled_norm: bool
    """Whether the norm follows the pooling (fc_norm)."""

    def model_args(self) -> dict[str, Any]:
        """Arguments with which timm's plain ViT has exactly these tensors, but for the number of heads."""
        args = {
            "img_size": self.grid * self.patch_size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "mlp_ratio": ratio_for(self.hidden, self.width),
            "qkv_bias": self.has_qkv_bias,
            "class_token": self.has_class_token,
            "reg_tokens": self.num_registers,
            "no_embed_class": self.num_prefix_rows == 0,
            "init_values": 1e-5 if self.has_layer_scale else None,
            "global_pool": "avg" if self.has_pooled_norm or not self.has_class_token else "token",
            "fc_norm": self.has_pooled_norm,
        }
        args |= {"stem": "conv"} if self.has_conv_stem else {}
        return args | ({} if self.has_norm or self.has_pooled_norm else {"final_norm": False})


def fold_class_position(conversion: Conversion) -> None:
    """The class token's position goes into the token: timm has no position for it where there are registers."""
    table = conversion.state["pos_embed"]
    parts = {"class_position": table[:, :1], "pos_embed": table[:, 1:]}
    conversion.split("pos_embed", parts, "the class token's row goes into the class token")
    both = ["cls_token", "class_position"]
    conversion.merge(both, "cls_token", lambda parts: parts[0] + parts[1], "with its position added")


def measure(state: State) -> PlainViT | None:
    """What a state dict in timm's names shows; None if positions or patches are not square, or it is no plain ViT."""
    needed = ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "blocks.0.attn.qkv.weight")
    if any(key not in state for key in needed) or state["pos_embed"].ndim != 3:
        return None
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    patch_size = _patch_size(state)
    num_tokens = sum(state[key].shape[1] for key in ("cls_token", "dist_token", "reg_token") if key in state)
    counted = _grid(state["pos_embed"].shape[1], num_tokens)
    if counted is None or patch_size is None:
        return None
    return PlainViT(
        width=state["pos_embed"].shape[-1],
        depth=depth_of(state),
        patch_size=patch_size,
        grid=counted[0],
        hidden=hidden,
        is_gated=state["blocks.0.mlp.fc2.weight"].shape[-1] != hidden,
        num_registers=state["reg_token"].shape[1] if "reg_token" in state else 0,
        num_prefix_rows=counted[1],
        has_class_token="cls_token" in state,
        has_layer_scale="blocks.0.ls1.gamma" in state,
        has_qkv_bias="blocks.0.attn.qkv.bias" in state,
        has_conv_stem="patch_embed.proj.0.weight" in state,
        has_norm="norm.weight" in state,
        has_pooled_norm="fc_norm.weight" in state,
    )


def network_of(
    state: State,
    *,
    resample: Resample | None,
    num_heads: int | None = None,
    architecture: str | None = None,
    crop_ratio: float | None = 0.875,
    interpolation: Literal["bilinear", "bicubic"] | None = "bicubic",
) -> Network:
    """The timm network of a state dict in timm's names.

    num_heads: what the layout implies; None takes the standard for the width, and says so.
    architecture: None is timm's plain ViT of the width.
    crop_ratio, interpolation: of the official evaluation, which has the same two nearly everywhere.
    Raises WeightsError if the sizes cannot be read, or no standard says how many heads a width has.
    """
    vit = measure(state)
    if vit is None:
        shape = tuple(state["pos_embed"].shape)
        raise WeightsError(f"cannot read the grid of the positions {shape}: it is not square")
    assumed, assumption = {}, ""
    if num_heads is None:
        assumed = {"num_heads": _standard_heads(vit.width)}
        assumption = (
            f"{assumed['num_heads']} heads, the standard for width {vit.width}: shapes do not show heads"
        )
    certain = vit.model_args() | ({} if num_heads is None else {"num_heads": num_heads})
    return Network(
        architecture or _HOSTS.get(vit.width, "vit_base_patch16_224"),
        certain,
        assumed,
        assumption,
        resample_positions=resample,
        crop_ratio=crop_ratio,
        interpolation=interpolation,
    )


def is_standard(state: State) -> bool:
    """Whether it is the ViT of DINO, DeiT and MAE: a class token with a position, qkv bias, a norm and no extras."""
    vit = measure(state)
    if vit is None or not (vit.has_class_token and vit.has_qkv_bias and vit.num_prefix_rows == 1):
        return False
    return not (vit.is_gated or vit.has_layer_scale or vit.has_conv_stem or vit.num_registers)


def fixed_positions(state: State) -> Literal["row", "column"] | None:
    """Whose half comes first in a table of fixed sines and cosines; None for learned positions.

    The tolerance is that of a file in half precision, far below the distance of the two tables or of learned ones.
    """
    table = state["pos_embed"]
    counted = _grid(table.shape[1], 1) if table.ndim == 3 else None
    if counted is None or table.shape[-1] % 4:
        return None
    side, num_prefix = counted
    patches = table[0, num_prefix:].float()
    orders: tuple[Literal["row", "column"], ...] = ("row", "column")
    for first in orders:
        fixed = sincos_position((side, side), table.shape[-1], first=first)
        if torch.allclose(patches, fixed.to(patches.device), rtol=0, atol=1e-2):
            return first
    return None


def depth_of(state: State) -> int:
    """Number of blocks, from the highest number among their names."""
    return 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))


def ratio_for(hidden: int, width: int) -> float:
    """An MLP ratio of which timm, which cuts width * ratio to whole numbers, makes exactly this many rows."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _standard_heads(width: int) -> int:
    if width not in STANDARD_HEADS and width % 64:
        raise WeightsError(
            f"no standard says how many heads a ViT of width {width} has, and shapes do not show it"
        )
    return STANDARD_HEADS.get(width, width // 64)


def _patch_size(state: State) -> int | None:
    """Side of a patch in pixels: of the square kernel, or by the halvings of a convolutional stem."""
    num_halvings = sum(
        re.fullmatch(r"patch_embed\.proj\.\d+\.running_mean", key) is not None for key in state
    )
    if num_halvings:
        return 2**num_halvings
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4 or kernel.shape[-1] != kernel.shape[-2]:
        return None
    return kernel.shape[-1]


def _grid(num_rows: int, num_tokens: int) -> tuple[int, int] | None:
    """(side of the grid, rows for prefix tokens) of a position table; None if it is not a square of patches."""
    for num_prefix in (0, num_tokens):
        side = math.isqrt(max(0, num_rows - num_prefix))
        if side and side * side == num_rows - num_prefix:
            return side, num_prefix
    return None
