"""Recognises plain vision transformers by the names and shapes of their tensors."""

import math
from typing import Any, NamedTuple

from torch import Tensor

STANDARD_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width to number of heads in the ViT and DeiT papers; shapes do not show heads."""

_TIMM_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}


class Layout(NamedTuple):
    """A plain ViT as its weights show it: absolute positions, pre-norm blocks, a final `norm`."""

    width: int
    depth: int
    patch_size: int
    grid: int
    """Rows, and columns, of patches the position embedding is for."""
    hidden: int
    """Width of the MLPs."""
    registers: int
    has_class_token: bool
    positions_for_prefix: bool
    """Whether the position embedding has a row for the class token."""
    has_layer_scale: bool
    has_qkv_bias: bool

    def __str__(self) -> str:
        words = f"a ViT {self.width} wide, {self.depth} deep, patch {self.patch_size}, {self.grid}x{self.grid} patches"
        return words + (f", {self.registers} registers" if self.registers else "")

    @property
    def timm_name(self) -> str | None:
        """The timm model to build on; None for a width that is none of the papers'."""
        return _TIMM_NAMES.get(self.width)

    def model_args(self, *, num_heads: int) -> dict[str, Any]:
        """Arguments with which that timm model has exactly this layout."""
        return {
            "img_size": self.grid * self.patch_size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": num_heads,
            "mlp_ratio": self.hidden / self.width,
            "qkv_bias": self.has_qkv_bias,
            "class_token": self.has_class_token,
            "reg_tokens": self.registers,
            "no_embed_class": not self.positions_for_prefix,
            "init_values": 1e-5 if self.has_layer_scale else None,
            "global_pool": "token" if self.has_class_token else "avg",
            "fc_norm": False,
        }


def recognise(state: dict[str, Tensor]) -> Layout | None:
    """The layout of a state dict in timm's, DINO's, DeiT's, MAE's or DINOv2's names; None if it is anything else.

    None too where the weights leave open what the network computes: CLIP's activation, gated MLPs, rotary or
    relative positions, distillation tokens.
    """
    needed = (
        "patch_embed.proj.weight",
        "pos_embed",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "norm.weight",
    )
    undecided = (
        "norm_pre.weight",
        "dist_token",
        "blocks.0.attn.q_norm.weight",
        "blocks.0.mlp.norm.weight",
        "attn_pool.latent",
    )
    if any(key not in state for key in needed) or any(key in state for key in undecided):
        return None
    kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    width = kernel.shape[0]
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    is_gated = state["blocks.0.mlp.fc2.weight"].shape[-1] != hidden
    if kernel.ndim != 4 or kernel.shape[-1] != kernel.shape[-2] or positions.ndim != 3 or is_gated:
        return None
    registers = next((state[key].shape[1] for key in ("reg_token", "register_tokens") if key in state), 0)
    counted = _grid(positions.shape[1], has_class_token="cls_token" in state)
    if counted is None:
        return None
    grid, rows_for_prefix = counted
    # DINOv2 files carry a position for the class token; timm folds it into the token when there are registers.
    return Layout(
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        patch_size=kernel.shape[-1],
        grid=grid,
        hidden=hidden,
        registers=registers,
        has_class_token="cls_token" in state,
        positions_for_prefix=rows_for_prefix > 0 and not registers,
        has_layer_scale="blocks.0.ls1.gamma" in state or "blocks.0.gamma_1" in state,
        has_qkv_bias="blocks.0.attn.qkv.bias" in state,
    )


def _grid(rows: int, *, has_class_token: bool) -> tuple[int, int] | None:
    """(side of the grid, rows for prefix tokens) of a position embedding; None if it is not a square of patches."""
    for prefix in (0, 1) if has_class_token else (0,):
        side = math.isqrt(rows - prefix)
        if side * side == rows - prefix:
            return side, prefix
    return None
