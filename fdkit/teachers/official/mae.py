"""Vision transformers pretrained by masked prediction: MAE, SupMAE, MaskFeat, CMAE."""

from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official._plain_vit import NOT_PLAIN, PLAIN, fixed_positions, is_standard, network_of


def _mae(conversion: Conversion) -> Network:
    """Source: facebookresearch/mae, models_mae.py and models_vit.py; SupMAE: enyac-group/supmae, models_supmae.py."""
    conversion.drop(r"decoder_.*", "decoder of masked patches")
    conversion.drop("mask_token", "mask token, which stands in for hidden patches in the decoder")
    conversion.drop(r"cls_head\..*", "classifier of the supervised pretraining")
    conversion.drop(r"head\..*", "classifier")
    return network_of(conversion.state, resample=positions.by_size)


def _has_column_first_positions(state: State) -> bool:
    return is_standard(state) and fixed_positions(state) == "column"


def _maskfeat(conversion: Conversion) -> Network:
    """Source: facebookresearch/SlowFast, models/masked.py, which takes the final norm of the encoder away, and
    video_model_builder.py, which takes images of the size of its positions alone.
    """
    conversion.drop(r"pred_head\..*", "head that predicts HOG features, with a norm of its own")
    conversion.drop("mask_token", "mask token, which stands in for hidden patches")
    conversion.drop(r"hogs\.\d+\.(weight_[xy]|gkern)", "filters of the HOG targets")
    return network_of(conversion.state, resample=None)


def _cmae(conversion: Conversion) -> Network:
    """Source: ZhichengHuang/CMAE, models/backbones/vision_transformer.py and mim_cls_vit.py.

    The target network ends without a norm, a fine-tuned one with `fc_norm`. Its released configurations hand images
    over as BGR (mmcv's Normalize swaps what was loaded as RGB), the statistics staying in RGB order; whether the
    released weights were trained so is not said.
    """
    for pattern, replacement in (
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^ln1\.", "norm."),
        (r"^layers\.", "blocks."),
        (r"\.ln([12])\.", r".norm\1."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ):
        conversion.rename(pattern, replacement, "timm's name for it")
    network = network_of(conversion.state, resample=positions.by_size)
    return network._replace(assumption=f"{network.assumption}; images as RGB")


_BESIDE_CMAE = (
    (r"(pixel|feature)_decoder\..*", "decoder of masked patches"),
    (r"(target_)?projector\..*", "projector, a part of pretraining alone"),
    (r"head\..*", "predictor of the pretraining, or a classifier"),
    (r"(target_)?backbone\..*", "the other of the file's two networks"),
)
_DECODER = (r"decoder_embed\.weight", r"decoder_pos_embed", r"mask_token")
_STANDARD = (*PLAIN, r"cls_token", r"blocks\.0\.attn\.qkv\.bias")
_OTHERS = (*NOT_PLAIN, r"dist_token", r"blocks_token\..*", r"pred_head\..*", r"masked_embed")

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "mae",
        "MAE, with its decoder",
        requires=(*_STANDARD, *_DECODER, r"norm\.weight"),
        forbids=(*_OTHERS, r"cls_head\..*"),
        convert=_mae,
    ),
    Layout(
        "mae",
        "MAE",
        requires=(*_STANDARD, r"norm\.weight"),
        forbids=(*_OTHERS, r"cls_head\..*", *_DECODER),
        shows=_has_column_first_positions,
        convert=_mae,
    ),
    Layout(
        "mae",
        "MAE, fine-tuned with mean pooling",
        requires=(*_STANDARD, r"fc_norm\.weight", r"head\.weight"),
        forbids=(*_OTHERS, r"cls_head\..*", *_DECODER, r"norm\.weight"),
        shows=is_standard,
        convert=_mae,
    ),
    Layout(
        "supmae",
        "SupMAE",
        requires=(*_STANDARD, r"cls_head\.(\d+\.)?weight", r"norm\.weight"),
        forbids=_OTHERS,
        shows=is_standard,
        convert=_mae,
    ),
    Layout(
        "maskfeat",
        "MaskFeat (ViT)",
        requires=(*_STANDARD, r"mask_token", r"pred_head\.projections\.0\.weight"),
        forbids=(*NOT_PLAIN, r"decoder_.*", r"norm\.weight", r"norm_stem\..*"),
        convert=_maskfeat,
    ),
    Layout(
        "cmae",
        "CMAE (ViT, mmcls names)",
        requires=(
            r"pos_embed",
            r"cls_token",
            r"patch_embed\.projection\.weight",
            r"layers\.0\.ln1\.weight",
            r"layers\.0\.attn\.qkv\.weight",
            r"layers\.0\.ffn\.layers\.0\.0\.weight",
        ),
        prefixes=("backbone.", "target_backbone.", ""),
        outside=_BESIDE_CMAE,
        convert=_cmae,
    ),
)
