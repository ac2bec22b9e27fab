"""Plain vision transformers: the official layouts of their families, and any other in timm's names."""

from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official._plain_vit import NOT_PLAIN, PLAIN, measure, network_of
from fdkit.teachers.official.deit import LAYOUTS as DEIT
from fdkit.teachers.official.dino import LAYOUTS as DINO
from fdkit.teachers.official.mae import LAYOUTS as MAE
from fdkit.teachers.official.mocov3 import LAYOUTS as MOCOV3

_FAMILIES: tuple[Layout, ...] = (*MOCOV3, *MAE, *DEIT, *DINO)
_NUM_IMAGENET21K_CLASSES = 21843
"""Outputs of the ViT paper's own models, which JAX users trained on images from -1 to 1."""


def _vit(conversion: Conversion) -> Network:
    """Source: timm, models/vision_transformer.py; its positions are resampled as its own loader does."""
    head = conversion.state.get("head.weight")
    conversion.drop(r"head\..*", "classifier")
    conversion.drop(r"pre_logits\..*", "layer between the class token and the classifier")
    network = network_of(
        conversion.state, resample=positions.by_size_antialiased, crop_ratio=None, interpolation=None
    )
    if head is not None and head.shape[0] == _NUM_IMAGENET21K_CLASSES:
        return network._replace(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return network


def _is_other_vit(state: State) -> bool:
    """Whether it is a plain ViT that no family claims; a gated MLP's activation does not show."""
    vit = measure(state)
    if vit is None or vit.is_gated or not (vit.has_norm or vit.has_pooled_norm):
        return False
    return all(layout.prefix_in(state, None) is None for layout in _FAMILIES)


LAYOUTS: tuple[Layout, ...] = (
    *_FAMILIES,
    Layout(
        "vit",
        "plain ViT in timm's names",
        requires=PLAIN,
        forbids=(*NOT_PLAIN, r"dist_token", r"mask_token", r"decoder_.*", r"blocks\.0\.gamma_1"),
        shows=_is_other_vit,
        convert=_vit,
    ),
)
