"""Vision transformers of DeiT, plain and distilled, and of DeiT III."""

from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official._plain_vit import NOT_PLAIN, PLAIN, fixed_positions, is_standard, network_of

_NUM_CLASSES = 1000
_DISTILLED_HOSTS = {192: "tiny", 384: "small", 768: "base"}


def _deit(conversion: Conversion) -> Network:
    """Source: facebookresearch/deit, models.py and main.py."""
    conversion.drop(r"head\..*", "classifier")
    network = network_of(conversion.state, resample=positions.by_size)
    words = "ImageNet mean and std, as DeiT; timm's own ViTs have the same tensors, and most of them mean 0.5"
    return network._replace(assumption=f"{network.assumption}; {words}")


def _deit_distilled(conversion: Conversion) -> Network:
    conversion.drop(r"head(_dist)?\..*", "classifier")
    state = conversion.state
    size = _DISTILLED_HOSTS.get(state["pos_embed"].shape[-1], "base")
    architecture = f"deit_{size}_distilled_patch16_224"
    return network_of(state, resample=positions.by_size, architecture=architecture)


def _deit3(conversion: Conversion) -> Network:
    """Source: facebookresearch/deit, models_v2.py; its recipes evaluate on whole images."""
    conversion.drop(r"head\..*", "classifier")
    conversion.rename(r"\.gamma_([12])$", r".ls\1.gamma", "layer scale, a module of its own in timm")
    return network_of(conversion.state, resample=positions.by_size, crop_ratio=1.0)


def is_deit(state: State) -> bool:
    """Whether the sizes, the positions and the 1000 classes are those of DeiT."""
    has_classes = state["head.weight"].shape[0] == _NUM_CLASSES
    return has_classes and is_standard(state) and fixed_positions(state) is None


_STANDARD = (*PLAIN, r"cls_token", r"norm\.weight", r"head\.weight")
_OTHERS = (*NOT_PLAIN, r"mask_token", r"decoder_.*", r"cls_head\..*", r"blocks_token\..*", r"masked_embed")

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "deit",
        "plain ViT with a classifier, as of DeiT",
        requires=_STANDARD,
        forbids=(*_OTHERS, r"dist_token", r"fc_norm\..*", r"pre_logits\..*"),
        shows=is_deit,
        convert=_deit,
    ),
    Layout(
        "deit_distilled",
        "DeiT, distilled",
        requires=(*PLAIN, r"cls_token", r"norm\.weight", r"dist_token"),
        forbids=_OTHERS,
        convert=_deit_distilled,
    ),
    Layout(
        "deit3",
        "DeiT III",
        requires=(
            *PLAIN,
            r"cls_token",
            r"norm\.weight",
            r"blocks\.0\.gamma_1",
            r"blocks\.0\.attn\.qkv\.bias",
        ),
        forbids=(*_OTHERS, r"dist_token"),
        convert=_deit3,
    ),
)
