"""The network that learns: like its teacher, but with a learned relative position bias; or any timm model.

A student like a ViT teacher is timm's `Beit` with the teacher's width, depth and heads, and the official
initialisation. A student like a Swin teacher is timm's Swin V2 with the teacher's stages.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.errors import ConfigError
from fdkit.models.attention import WantedAttention
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Preprocessing
from fdkit.models.fast_beit import use_batched_depth
from fdkit.models.fast_beit_attention import use_attention
from fdkit.models.libraries import build_timm

INIT_STD = 0.02
LAYER_SCALE = 0.1
SWIN_NORM_WEIGHT = 1e-5


class StudentConfig(Config):
    """What is distilled into."""

    name: str | None = None
    """A timm model with random weights; left out, the student is built like the teacher."""
    position: Literal["shared_rpb", "rpb", "absolute"] | None = None
    """Position encoding of a ViT student built like its teacher: one relative bias table for all layers (the
    default), one table a layer, or absolute positions. Swin and named students have their own."""
    drop_path: float = Field(default=0.2, ge=0, lt=1)
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    drop_path_mode: Literal["bernoulli", "batched"] = "bernoulli"
    """Each sample's branch is dropped independently; or of every batch a fixed share, which saves the time of what is
    dropped and has the same mean. Batched is for ViT students built like their teacher."""
    attention: WantedAttention = "auto"
    """How attention with a learned position bias is computed, which changes time and rounding alone: auto,
    as suits the device; fused, a fused kernel and the bias gradient in Triton; sdpa, PyTorch's choice; matmul, products
    written out; matmul_fp32, the same in float32."""
    width: int | None = Field(default=None, ge=1)
    """Embedding width of a ViT student; left out, the teacher's."""
    depth: int | None = Field(default=None, ge=1)
    """Number of blocks of a ViT student; left out, the teacher's."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a ViT student; left out, as many as keep the teacher's width per head."""
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    """image_size / short side when the trained network is evaluated; 1 for images that are as small as the input."""
    patch_size: int | None = Field(default=None, ge=1)
    """Patch size of a ViT student in pixels; left out, the teacher's."""


def build_student(config: StudentConfig, teacher: Backbone, *, image_size: int, seed: int) -> Backbone:
    """A student with seeded random weights, normalising with ImageNet statistics; the global generator is untouched.

    Raises ConfigError if the teacher is neither a ViT nor a Swin and no name is given, if an option has no effect
    on the student asked for, or if sizes do not divide.
    """
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, image_size, config.crop_ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name is not None:
            _refuse_vit_options(config, f"student {config.name} has its own architecture")
            student = _build_named(config.name, config.drop_path, preprocessing)
        else:
            student = _build_like(config, teacher, preprocessing)
    if config.drop_path_mode == "batched":
        use_batched_depth(student.network)
    use_attention(student.network, config.attention)
    return student


def init_vit(network: Any) -> None:
    """Initialises a timm Beit as the official student.

    Linear weights, class token and absolute positions: normal of deviation 0.02 truncated at one deviation;
    output projections of block i = 1.. are divided by sqrt(2 i). Biases and bias tables are zero, LayerScale 0.1,
    the patch embedding keeps PyTorch's default.
    Source: Wei et al. 2022 (arXiv 2205.14141), released code, models/vision_transformer.py and its subclass.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            _truncated_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (network.cls_token, network.pos_embed):
        if token is not None:
            _truncated_normal(token)
    with torch.no_grad():
        for number, block in enumerate(network.blocks, start=1):
            block.attn.proj.weight /= math.sqrt(2 * number)
            block.mlp.fc2.weight /= math.sqrt(2 * number)


def _build_named(name: str, drop_path: float, preprocessing: Preprocessing) -> Backbone:
    """A timm model; one that knows no stochastic depth serves a rate of 0, and is refused at any other."""
    args: dict[str, Any] = {"img_size": preprocessing.image_size}
    try:
        return build_timm(name, {**args, "drop_path_rate": drop_path}, preprocessing=preprocessing)
    except ConfigError as error:
        if drop_path > 0:
            hint = error.hint or "a model without stochastic depth needs --student.drop-path 0"
            raise ConfigError(error.message, hint=hint) from error
        return build_timm(name, args, preprocessing=preprocessing)


def _build_like(config: StudentConfig, teacher: Backbone, preprocessing: Preprocessing) -> Backbone:
    """A student of the teacher's family and sizes."""
    network: Any = getattr(teacher.network, "trunk", teacher.network)
    kind = _kind(network)
    if kind == "swin":
        _refuse_vit_options(config, "a student like a Swin teacher has the teacher's stages")
        return _build_swin(network, config.drop_path, preprocessing)
    if kind == "vit":
        args = _vit_args(config, network, teacher, preprocessing.image_size)
        student = build_timm("beit_base_patch16_224", args, preprocessing=preprocessing)
        init_vit(student.network)
        return student
    architecture = teacher.recipe.get("architecture", type(network).__name__)
    raise ConfigError(
        f"no student is built like {architecture}: it is neither a ViT nor a Swin",
        hint="name a timm model: --student.name beit_base_patch16_224",
    )


def _build_swin(teacher: Any, drop_path: float, preprocessing: Preprocessing) -> Backbone:
    """Swin V2 with the stages of a Swin teacher; each residual norm starts with weight 1e-5."""
    stages = [layer.blocks for layer in teacher.layers]
    args = {
        "img_size": preprocessing.image_size,
        "patch_size": teacher.patch_embed.patch_size[0],
        "embed_dim": teacher.patch_embed.proj.out_channels,
        "depths": [len(blocks) for blocks in stages],
        "num_heads": [blocks[0].attn.num_heads for blocks in stages],
        "window_size": max(blocks[0].window_size[0] for blocks in stages),
        "mlp_ratio": _mlp_ratio(stages[0][0].mlp),
        "drop_path_rate": drop_path,
    }
    student = build_timm("swinv2_tiny_window8_256", args, preprocessing=preprocessing)
    layers: Any = student.network.layers
    for layer in layers:
        for block in layer.blocks:
            nn.init.constant_(block.norm1.weight, SWIN_NORM_WEIGHT)
            nn.init.constant_(block.norm2.weight, SWIN_NORM_WEIGHT)
    return student


def _vit_args(config: StudentConfig, network: Any, teacher: Backbone, image_size: int) -> dict[str, Any]:
    """Arguments of timm's Beit: what the config asks for, else the teacher's sizes."""
    blocks = network.transformer.resblocks if hasattr(network, "transformer") else network.blocks
    width = config.width or teacher.embed_dim
    heads = config.num_heads or max(1, width * blocks[0].attn.num_heads // teacher.embed_dim)
    patch_size = config.patch_size or teacher.patch_size
    position = config.position or "shared_rpb"
    if width % heads:
        raise ConfigError(
            f"a student {width} wide does not divide into {heads} heads", hint="set --student.num-heads"
        )
    if image_size % patch_size:
        raise ConfigError(
            f"image size {image_size} does not divide into patches of {patch_size} pixels",
            hint=f"use an image size of {round(image_size / patch_size) * patch_size}, or set --student.patch-size",
        )
    return {
        "img_size": image_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": config.depth or len(blocks),
        "num_heads": heads,
        "mlp_ratio": _mlp_ratio(blocks[0].mlp),
        "global_pool": "token",  # keeps the final norm on all tokens, where "avg" moves it behind the pooling
        "use_shared_rel_pos_bias": position == "shared_rpb",
        "use_rel_pos_bias": position == "rpb",
        "use_abs_pos_emb": position == "absolute",
        "init_values": LAYER_SCALE,
        "drop_path_rate": config.drop_path,
    }


def _kind(network: nn.Module) -> Literal["vit", "swin"] | None:
    """Which family of student a teacher's network calls for; None if neither."""
    from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(network, (VisionTransformer, Beit, Eva, OpenClipVisionTransformer)):
        return "vit"
    return "swin" if isinstance(network, (SwinTransformer, SwinTransformerV2)) else None


def _mlp_ratio(mlp: Any) -> float:
    """Hidden over input width of a plain MLP; 4 for a gated one, which the student does not have."""
    for first, second in (("fc1", "fc2"), ("c_fc", "c_proj")):
        if hasattr(mlp, first) and getattr(mlp, first).out_features == getattr(mlp, second).in_features:
            return float(getattr(mlp, first).out_features / getattr(mlp, first).in_features)
    return 4.0


def _refuse_vit_options(config: StudentConfig, reason: str) -> None:
    for option in ("position", "width", "depth", "num_heads", "patch_size"):
        if getattr(config, option) is not None:
            raise ConfigError(f"student.{option} {getattr(config, option)} has no effect: {reason}")


def _truncated_normal(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
