"""Vision transformers of MoCo v3 and of ExtreMA, which is built on its code."""

from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official._plain_vit import NOT_PLAIN, PLAIN, fixed_positions, network_of

_HEADS = {384: 12, 768: 12}
"""MoCo v3's ViT-S has 12 heads, where every other of its width has 6; the file loads under both."""

_TWINS = (
    (r"predictor\..*", "predictor, a part of pretraining alone"),
    (r"momentum_encoder\..*", "momentum encoder, the other of the file's two networks"),
    (r"base_encoder\..*", "base encoder, the other of the file's two networks"),
)


def _mocov3(conversion: Conversion) -> Network:
    """Source: facebookresearch/moco-v3, vits.py and main_lincls.py; LayerNorm eps 1e-6, timm's own."""
    conversion.drop(r"head\..*", "projector, or a classifier, behind the class token")
    state = conversion.state
    is_fixed = fixed_positions(state) == "row"
    width = state["pos_embed"].shape[-1]
    resample = positions.row_first if is_fixed else None
    return network_of(state, resample=resample, num_heads=_HEADS.get(width), interpolation="bilinear")


def _has_row_first_positions(state: State) -> bool:
    return fixed_positions(state) == "row"


def _extrema(conversion: Conversion) -> Network:
    """Source: microsoft/ExtreMA, vits.py and main_lincls.py; its norm is that of all tokens before the head."""
    conversion.drop(r"head\..*", "projector behind the class token")
    conversion.drop(r"blocks_token\..*", "class-attention blocks: they read the patch tokens and change none")
    conversion.drop("cls_token", "class token, which only the class-attention blocks read")
    return network_of(conversion.state, resample=positions.by_size, interpolation="bilinear")


_ENCODER = (r"pos_embed", r"cls_token", r"patch_embed\.proj\.(0\.)?weight", *PLAIN[2:], r"norm\.weight")
_OTHERS = (*NOT_PLAIN, r"blocks_token\..*", r"decoder_.*", r"mask_token", r"gamma_.*", r"dist_token")

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "mocov3",
        "MoCo v3 (ViT)",
        requires=_ENCODER,
        forbids=_OTHERS,
        prefixes=("base_encoder.", "momentum_encoder."),
        outside=_TWINS,
        convert=_mocov3,
    ),
    Layout(
        "mocov3",
        "MoCo v3 (ViT, encoder alone)",
        requires=_ENCODER,
        forbids=_OTHERS,
        shows=_has_row_first_positions,
        convert=_mocov3,
    ),
    Layout(
        "extrema",
        "ExtreMA (ViT)",
        requires=(*PLAIN, r"blocks_token\.0\.attn\.q\.weight", r"norm\.weight"),
        forbids=NOT_PLAIN,
        prefixes=("momentum_encoder.", "base_encoder.", ""),
        outside=_TWINS,
        convert=_extrema,
    ),
)
