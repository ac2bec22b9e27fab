"""Vision transformers of DINO and iBOT, DINOv2 and DINOv3."""

from typing import Any

import torch
from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official._plain_vit import (
    NOT_PLAIN,
    PLAIN,
    depth_of,
    fixed_positions,
    fold_class_position,
    is_standard,
    network_of,
    ratio_for,
)

SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)
"""Of SAT-493M, the satellite images two of the DINOv3 models were trained on; facebookresearch/dinov3, README.md."""

_DINOV3_HOSTS = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}


def _dino(conversion: Conversion) -> Network:
    """Source: facebookresearch/dino, vision_transformer.py and utils.py; bytedance/ibot, vision_transformer.py."""
    conversion.drop("masked_embed", "iBOT's mask token, which stands in for hidden patches")
    return network_of(conversion.state, resample=positions.by_scale)


def _is_dino(state: State) -> bool:
    return is_standard(state) and fixed_positions(state) is None


def _dinov2(conversion: Conversion) -> Network:
    """Source: facebookresearch/dinov2, models/vision_transformer.py, layers/swiglu_ffn.py and hub/backbones.py."""
    conversion.drop("mask_token", "mask token, which stands in for hidden patches")
    conversion.rename(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", "blocks were kept in groups")
    is_gated = "blocks.0.mlp.w12.weight" in conversion.state
    conversion.rename(r"\.mlp\.w12\.", ".mlp.fc1.", "both halves of the gated MLP's first matrix")
    conversion.rename(r"\.mlp\.w3\.", ".mlp.fc2.", "timm's name for it")
    has_registers = "register_tokens" in conversion.state
    if has_registers:
        conversion.rename(r"^register_tokens$", "reg_token", "timm's name for it")
        fold_class_position(conversion)
    return network_of(
        conversion.state,
        resample=positions.by_size_antialiased if has_registers else positions.by_scale,
        architecture="vit_giant_patch14_dinov2" if is_gated else None,
    )


def _has_flat_mask_token(state: State) -> bool:
    return state["mask_token"].ndim == 2


def _dinov3(conversion: Conversion) -> Network:
    """Source: facebookresearch/dinov3, models/vision_transformer.py, layers/*.py and hub/backbones.py."""
    state = conversion.state
    args = _dinov3_args(state)
    has_local_norm = "local_cls_norm.weight" in state
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        _split_bias(conversion, key)
    conversion.drop(r".*\.bias_mask", "mask of the qkv bias, which is applied to it")
    conversion.drop(
        r"rope_embed\.periods", "periods of the rotary positions, which the network is built with"
    )
    conversion.drop("mask_token", "mask token, which stands in for hidden patches")
    conversion.drop(r"local_cls_norm\..*", "norm of small crops' class tokens, used in pretraining alone")
    for pattern, replacement in (
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ):
        conversion.rename(pattern, replacement, "timm's name for it")
    width = args["embed_dim"]
    size = "small_plus" if width == 384 and args["swiglu_mlp"] else _DINOV3_HOSTS.get(width, "base")
    network = Network(f"vit_{size}_patch16_dinov3", args, crop_ratio=0.875, interpolation="bicubic")
    if has_local_norm and width == 1024:
        return network._replace(mean=SATELLITE_MEAN, std=SATELLITE_STD)
    if has_local_norm:
        words = "mean and std of photographs; the model of satellite images has the same tensors"
        return network._replace(assumption=words)
    return network


def _dinov3_args(state: State) -> dict[str, Any]:
    """Arguments of timm's DINOv3; the periods show the heads, one of them for four channels of a head."""
    width, periods = state["cls_token"].shape[-1], state["rope_embed.periods"]
    is_gated = "blocks.0.mlp.w1.weight" in state
    hidden = state[f"blocks.0.mlp.{'w1' if is_gated else 'fc1'}.weight"].shape[0]
    return {
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "embed_dim": width,
        "depth": depth_of(state),
        "num_heads": width // (4 * len(periods)),
        "mlp_ratio": ratio_for(hidden, width),
        "swiglu_mlp": is_gated,
        "swiglu_align_to": 1
        if is_gated
        else 0,  # not 0: timm then keeps the two matrices apart, as the file does
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_reg_tokens": state["storage_tokens"].shape[1],
        "rope_periods": [float(period) for period in periods],
    }


def _split_bias(conversion: Conversion, key: str) -> None:
    """The parts of a qkv bias that timm has: none for the keys, which the file's mask makes zero, or it is refused."""
    bias: Tensor = conversion.state[key]
    mask = conversion.state.get(f"{key}_mask")
    query, middle, value = (bias if mask is None else bias * mask).chunk(3)
    if torch.any(middle):
        raise WeightsError(f"{key} has a bias for the keys, which DINOv3 masks to zero")
    stem = key.removesuffix("qkv.bias")
    parts = {f"{stem}q_bias": query, f"{stem}v_bias": value}
    conversion.split(key, parts, "its parts for queries and values; the keys' is masked to zero")


_EXTRAS = (
    r"dist_token",
    r"mask_token",
    r"decoder_.*",
    r"cls_head\..*",
    r"blocks_token\..*",
    r"pred_head\..*",
)
_BLOCK = r"blocks\.0\.(0\.)?"

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "dino",
        "plain ViT, as of DINO and iBOT",
        requires=(*PLAIN, r"cls_token", r"norm\.weight"),
        forbids=(*NOT_PLAIN, *_EXTRAS, r"head\..*", r"fc_norm\..*", r"pre_logits\..*"),
        prefixes=("", "backbone."),
        outside=((r"head\..*", "projection head"),),
        shows=_is_dino,
        convert=_dino,
    ),
    Layout(
        "dinov2",
        "DINOv2 (ViT)",
        requires=(
            *PLAIN[:2],
            r"cls_token",
            r"mask_token",
            rf"{_BLOCK}norm1\.weight",
            rf"{_BLOCK}attn\.qkv\.weight",
            rf"{_BLOCK}ls1\.gamma",
            rf"{_BLOCK}mlp\.(fc1|w12)\.weight",
            r"norm\.weight",
        ),
        forbids=(*NOT_PLAIN, r"storage_tokens", r"head\..*"),
        prefixes=("", "backbone."),
        outside=((r"(dino|ibot)_head\..*", "projection head"),),
        shows=_has_flat_mask_token,
        convert=_dinov2,
    ),
    Layout(
        "dinov3",
        "DINOv3 (ViT)",
        requires=(
            r"cls_token",
            r"storage_tokens",
            r"mask_token",
            r"patch_embed\.proj\.weight",
            r"rope_embed\.periods",
            r"blocks\.0\.attn\.qkv\.weight",
            r"blocks\.0\.ls1\.gamma",
            r"blocks\.0\.mlp\.(fc1|w1)\.weight",
            r"norm\.weight",
        ),
        forbids=(r"cls_norm\..*",),
        prefixes=("", "backbone."),
        outside=((r"(dino|ibot)_head\..*", "projection head"),),
        convert=_dinov3,
    ),
)
