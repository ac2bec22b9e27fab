"""Image towers of CLIP: OpenAI's archives, and open_clip's files, whose activation has to be named."""

from fdkit.errors import WeightsError
from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official._plain_vit import measure, network_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_SCALARS = ("input_resolution", "context_length", "vocab_size")
_TEXT = (
    (
        r"text\..*|transformer\..*|token_embedding\..*|ln_final\..*|positional_embedding|attn_mask",
        "text tower",
    ),
    (r"text_projection", "projection of texts into the shared space"),
    (r"logit_scale|logit_bias", "scale of the contrastive loss"),
)
_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_RESNET_NAMES = (
    (r"^(conv|bn)([123])\.", r"stem.conv\2.\1."),
    *((rf"^layer{stage + 1}\.", f"stages.{stage}.") for stage in range(4)),
    (r"\.downsample\.0\.", ".shortcut.conv.conv."),
    (r"\.downsample\.1\.", ".shortcut.conv.bn."),
    (r"^(stages\.\d\.\d+)\.(conv|bn)1\.", r"\1.conv1_1x1.\2."),
    (r"^(stages\.\d\.\d+)\.(conv|bn)2\.", r"\1.conv2_kxk.\2."),
    (r"^(stages\.\d\.\d+)\.(conv|bn)3\.", r"\1.conv3_1x1.\2."),
)
_HOSTS: dict[tuple[int, ...], str] = {
    (768, 32, 224): "vit_base_patch32_clip{}_224",
    (768, 16, 224): "vit_base_patch16_clip{}_224",
    (1024, 14, 224): "vit_large_patch14_clip{}_224",
    (1024, 14, 336): "vit_large_patch14_clip{}_336",
    (1280, 14, 224): "vit_huge_patch14_clip{}_224",
}
_SHORT: dict[tuple[int, ...], tuple[str, str]] = {
    (768, 32, 224): ("clip_vitb32", ""),
    (768, 16, 224): ("clip_vitb", "openclip_vitb"),
    (1024, 14, 224): ("clip_vitl", "openclip_vitl"),
    (1024, 14, 336): ("clip_vitl336", ""),
}
_RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 64): "resnet50_clip_gap",
    ((3, 4, 23, 3), 64): "resnet101_clip_gap",
    ((4, 6, 10, 6), 80): "resnet50x4_clip_gap",
    ((6, 8, 18, 8), 96): "resnet50x16_clip_gap",
    ((3, 15, 36, 10), 128): "resnet50x64_clip_gap",
}


def clip_tower(conversion: Conversion, *, quick_gelu: bool, num_heads: int | None = None) -> Network:
    """The image tower of a CLIP ViT in timm's names, everything else of the file left out.

    The tower may stand alone or under `visual.`. Positions get their batch axis; the projection into the space shared
    with texts is left out, since tokens do not go through it.
    quick_gelu: the activation, x * sigmoid(1.702 x) instead of GELU; no tensor shows it.
    num_heads: None takes the standard for the width.
    Source: openai/CLIP, clip/model.py; mlfoundations/open_clip, transformer.py; its resize_pos_embed in model.py.
    """
    if any(key.startswith("visual.") for key in conversion.state):
        conversion.enter("visual.", _TEXT)
    conversion.drop("proj", "projection into the space shared with texts, which tokens do not go through")
    conversion.convert(
        "class_embedding", lambda token: token.reshape(1, 1, -1), "timm's name for it; axes added"
    )
    conversion.convert("positional_embedding", lambda table: table.unsqueeze(0), "batch axis added")
    for pattern, replacement in _NAMES:
        conversion.rename(pattern, replacement, "timm's name for it")
    return network_of(
        conversion.state,
        resample=positions.by_size_antialiased,
        num_heads=num_heads,
        architecture=host(conversion.state, quick_gelu=quick_gelu),
        crop_ratio=1.0,
    )._replace(mean=CLIP_MEAN, std=CLIP_STD)


def host(state: State, *, quick_gelu: bool) -> str:
    """The timm model for a CLIP ViT in timm's names: that of its sizes, or for other sizes one that takes any."""
    name = _HOSTS.get(_sizes(state), "vit_base_patch16_clip{}_224")
    return name.format("_quickgelu" if quick_gelu else "")


def activation_of(conversion: Conversion) -> bool:
    """Whether the architecture a CLIP ViT, by now in timm's names, is said to be has QuickGELU.

    Raises WeightsError if none is named, saying which can be.
    """
    if conversion.architecture is not None:
        return "_quickgelu" in conversion.architecture
    state = conversion.state
    quick, plain = (host(state, quick_gelu=value) for value in (True, False))
    short_quick, short_plain = _SHORT.get(_sizes(state), ("", ""))
    raise WeightsError(
        "the tensors of this CLIP image tower do not show whether it was trained with QuickGELU or GELU, and under the "
        "other its features are wrong",
        hint=f"name it: --arch {short_quick or quick} (QuickGELU: OpenAI's, Meta's, DFN's) or "
        f"--arch {short_plain or plain} (GELU: LAION's and DataComp's)",
    )


def _sizes(state: State) -> tuple[int, ...]:
    """Width, patch size and image size."""
    vit = measure(state)
    return (vit.width, vit.patch_size, vit.grid * vit.patch_size) if vit else ()


def _openai(conversion: Conversion) -> Network:
    """OpenAI's archive, known by its three numbers: every one of its ViTs has QuickGELU and 64 channels a head."""
    conversion.drop("|".join(_SCALARS), "a number of the archive: image size, text length or vocabulary")
    width = conversion.state["visual.class_embedding"].shape[0]
    network = clip_tower(conversion, quick_gelu=True, num_heads=width // 64)
    named = conversion.architecture
    if named is not None and "_clip_" in named and "_quickgelu" not in named:
        raise WeightsError(
            f"this is OpenAI's CLIP, trained with QuickGELU, and {named} has another activation",
            hint=f"use --arch {_SHORT.get(_sizes(conversion.state), ('', ''))[0] or network.architecture}",
        )
    return network


def _unsaid(conversion: Conversion) -> Network:
    network = clip_tower(conversion, quick_gelu=False)
    quick_gelu = activation_of(conversion)
    return network._replace(architecture=host(conversion.state, quick_gelu=quick_gelu))


def _trunk(conversion: Conversion) -> Network:
    """open_clip around a timm model: its own names, which do not show all of what it computes."""
    if conversion.architecture is None:
        raise WeightsError(
            "this is an open_clip file around a timm model (visual.trunk.*), and its tensors do not show which",
            hint="name it: --arch open_clip:ARCH/TAG, as in open_clip:ViT-B-16-SigLIP2/webli, or the timm model inside",
        )
    conversion.enter(
        "visual.trunk.", (*_TEXT, (r"visual\.head\..*", "projection into the space shared with texts"))
    )
    return Network(conversion.architecture, {})


def _resnet(conversion: Conversion) -> Network:
    """OpenAI's ResNet with three convolutions first and average pooling before strides; ReLU throughout.

    The attention that pools its last map is left out: the map is what tokens are taken from.
    Source: openai/CLIP, clip/model.py, ModifiedResNet.
    """
    conversion.drop("|".join(_SCALARS), "a number of the archive: image size, text length or vocabulary")
    conversion.enter("visual.", _TEXT)
    state = conversion.state
    num_blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    width = state["layer1.0.conv1.weight"].shape[0]
    if (num_blocks, width) not in _RESNETS:
        raise WeightsError(f"timm has no CLIP ResNet of {num_blocks} blocks, {width} wide")
    side = round((state["attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    conversion.drop(r"attnpool\..*", "attention pooling after the last map")
    for pattern, replacement in _RESNET_NAMES:
        conversion.rename(pattern, replacement, "timm's name for it")
    return Network(
        _RESNETS[num_blocks, width],
        {"img_size": side * 32},
        mean=CLIP_MEAN,
        std=CLIP_STD,
        crop_ratio=1.0,
        interpolation="bicubic",
    )


_TOWER = (
    r"class_embedding",
    r"positional_embedding",
    r"conv1\.weight",
    r"ln_pre\.weight",
    r"ln_post\.weight",
)
_BLOCK = (r"transformer\.resblocks\.0\.attn\.in_proj_weight", r"transformer\.resblocks\.0\.mlp\.c_fc\.weight")
_IN_FILE = tuple(rf"visual\.{name}" for name in (*_TOWER, *_BLOCK))

LAYOUTS: tuple[Layout, ...] = (
    Layout("clip", "CLIP, OpenAI's (ViT)", requires=(*_IN_FILE, *_SCALARS), convert=_openai),
    Layout("clip", "CLIP (ViT)", requires=_IN_FILE, forbids=_SCALARS, convert=_unsaid),
    Layout(
        "clip",
        "CLIP (ViT), image tower alone",
        requires=(*_TOWER, *_BLOCK),
        forbids=(r"visual\..*", r"token_embedding\..*"),
        convert=_unsaid,
    ),
    Layout(
        "clip_resnet",
        "CLIP (ResNet)",
        requires=(
            r"visual\.layer1\.0\.conv1\.weight",
            r"visual\.conv3\.weight",
            r"visual\.attnpool\.positional_embedding",
        ),
        convert=_resnet,
    ),
    Layout(
        "openclip_trunk",
        "open_clip around a timm model",
        requires=(r"visual\.trunk\..*",),
        convert=_trunk,
    ),
)
