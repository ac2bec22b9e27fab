"""BEiT, BEiT v2 and the official Feature-Distillation students: ViTs whose positions are relative bias tables.

All have the names of timm's `Beit`. Pretraining shares one table among all blocks and ends in `norm`; fine-tuning
gives each block its own and norms after pooling (`fc_norm`). Verified against microsoft/unilm (beit, beit2:
modeling_pretrain.py, modeling_finetune.py) and SwinTransformer/Feature-Distillation (models/vision_transformer.py,
models/feature_distillation.py); their LayerNorms have epsilon 1e-6 throughout.
"""

import re
from typing import Any

from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official.bias_tables import NUM_CLASS_ROWS, geometric_bias, window_of
from fdkit.teachers.official.positions import by_size

HALF = (0.5, 0.5, 0.5)
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.0.attn.relative_position_bias_table"
RELEASED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
"""Heads by width, for the few files without a bias table to show them."""
NORM_EPS = 1e-6
FULL_SIZE = 384
"""Pixels from which the official evaluations no longer cut a margin off the image."""


def _convert_student(conversion: Conversion) -> Network:
    """A Feature-Distillation student as distilled: one table for all blocks, final norm."""
    return _network(conversion)


def _convert_pretrained(conversion: Conversion) -> Network:
    """BEiT or BEiT v2 as pretrained, with the head that predicts visual words."""
    conversion.drop("mask_token", "stands for hidden patches in pretraining alone")
    conversion.drop(r"lm_head\..*", "pretraining head, predicts visual words")
    is_v2 = any(key.startswith("cls_pt_layers.") for key in conversion.state)
    conversion.drop(r"cls_pt_layers\..*", "blocks that served to pretrain the class token (BEiT v2)")
    conversion.drop(r"cls_pt_(norm|lm_head)\..*", "head that served to pretrain the class token (BEiT v2)")
    network = _network(conversion)
    if is_v2:
        return network
    said = "mean and std 0.5, those of BEiT's own pretraining: the file holds none"
    return network._replace(mean=HALF, std=HALF, assumption=_sentences(network.assumption, said))


def _convert_finetuned(conversion: Conversion) -> Network:
    """A fine-tuned network of any of the three, which nothing in the file tells apart."""
    conversion.drop(r"head\..*", "classifier")
    network = _network(conversion)
    said = "ImageNet's mean and std, which BEiT v2 and Feature Distillation use; BEiT v1 on ImageNet-22k uses 0.5"
    return network._replace(assumption=_sentences(network.assumption, said))


def _network(conversion: Conversion) -> Network:
    """The Beit of timm that the tensors left show, index buffers dropped."""
    conversion.drop(r"(.*\.)?relative_position_index", "index buffer, follows from the window")
    state = conversion.state
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    table = state.get(SHARED_TABLE, state.get(OWN_TABLE))
    image_size = patch * _grid_side(state, table)
    args: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else 0.0,  # 0 is none; timm ignores None
        "use_abs_pos_emb": "pos_embed" in state,
        "use_shared_rel_pos_bias": SHARED_TABLE in state,
        "use_rel_pos_bias": OWN_TABLE in state,
        "global_pool": "avg" if "fc_norm.weight" in state else "token",
        "layer_norm_eps": NORM_EPS,
    }
    heads = {"num_heads": RELEASED_HEADS[width] if table is None else table.shape[1]}
    said = f"{heads['num_heads']} heads, BEiT's own for width {width}: shapes do not show heads"
    return Network(
        "beit_base_patch16_224",
        args if table is None else {**args, **heads},
        assumed_args=heads if table is None else {},
        assumption=said if table is None else "",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resample_positions=by_size,
        resample_bias=geometric_bias,
        crop_ratio=0.875 if image_size < FULL_SIZE else 1.0,
        interpolation="bicubic",
    )


def _grid_side(state: State, table: Tensor | None) -> int:
    """Patches along one side of the image, as the bias table or the positions show."""
    if table is not None:
        return window_of(table, NUM_CLASS_ROWS)
    if "pos_embed" not in state:
        raise WeightsError(
            "the file has no positions, absolute or relative, so that its image size is unknown"
        )
    num_patches = state["pos_embed"].shape[1] - 1
    return round(num_patches**0.5)


def _shows_heads(state: State) -> bool:
    """Whether a bias table or a released width tells the heads; others of BEiT's names are another network's."""
    has_table = any(re.fullmatch(_RELATIVE, key) for key in state)
    return has_table or state["cls_token"].shape[-1] in RELEASED_HEADS


def _sentences(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


_BLOCKS = (r"cls_token", r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.q_bias")
_RELATIVE = r"(rel_pos_bias|blocks\.0\.attn)\.relative_position_bias_table"

LAYOUTS = (
    Layout(
        name="fd_vit",
        title="Feature-Distillation student (ViT)",
        requires=(*_BLOCKS, _RELATIVE, r"norm\.weight"),
        forbids=(r"head\..*", r"lm_head\..*", "mask_token"),
        convert=_convert_student,
        prefixes=("encoder.", ""),
        outside=(
            (r"decoder\..*", "projector onto the teacher's width, used in distillation alone"),
            (r"feature_model\..*", "the teacher the student was distilled from"),
        ),
    ),
    Layout(
        name="beit",
        title="BEiT (pretrained)",
        requires=(*_BLOCKS, r"lm_head\.weight", r"norm\.weight"),
        forbids=(r"cls_pt_layers\..*",),
        shows=_shows_heads,
        convert=_convert_pretrained,
    ),
    Layout(
        name="beitv2",
        title="BEiT v2 (pretrained)",
        requires=(*_BLOCKS, r"lm_head\.weight", r"cls_pt_layers\..*", r"norm\.weight"),
        shows=_shows_heads,
        convert=_convert_pretrained,
    ),
    Layout(
        name="beit_finetuned",
        title="BEiT, BEiT v2 or Feature-Distillation student (fine-tuned)",
        requires=(*_BLOCKS, _RELATIVE, r"(fc_norm|head)\.weight"),
        forbids=(r"lm_head\..*", "mask_token"),
        convert=_convert_finetuned,
    ),
)
