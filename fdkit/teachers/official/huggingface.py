"""Vision transformers in the names of Hugging Face's transformers: ViT, MAE, DeiT, DINOv2, DINOv3, CLIP, SigLIP.

What no tensor shows (heads, activation, epsilon of the norms) stands in the config.json beside the file. A file alone
is read with what all published models of its kind have, and says so; CLIP's, which come in two kinds, ask.

Source: huggingface/transformers, models/*/modeling_*.py and configuration_*.py of versions 4 and 5
(whose files differ in that version 5 names an image tower saved alone without `vision_model.`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fdkit.errors import WeightsError
from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import Conversion, Layout, Network, Reading, Resample, State, state_in
from fdkit.teachers.official._plain_vit import (
    depth_of,
    fixed_positions,
    fold_class_position,
    network_of,
    ratio_for,
)
from fdkit.teachers.official.clip import CLIP_MEAN, CLIP_STD, activation_of, host

Config = Mapping[str, Any]
"""What a config.json says of the image tower."""

_HALF = (0.5, 0.5, 0.5)
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""timm's names of their activations."""
_QKV = "query, key and value in one matrix"
_CLASSIFIER = (r"(cls_|distillation_)?classifier\..*", "classifier")
_POOLER = r"pooler\..*"
_DINOV3_HOSTS = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}
_DEIT_HOSTS = {192: "tiny", 384: "small", 768: "base"}
_BERT_NAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
_CLIP_NAMES = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
)
_DINOV3_NAMES = (
    *_BERT_NAMES[:8],
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
)


def _vit(
    conversion: Conversion,
    config: Config | None,
    *,
    resample: Resample = positions.by_size,
    architecture: str | None = None,
    eps: float = 1e-12,
    activation: str | None = "gelu",
) -> Network:
    """A plain ViT in BERT's names; epsilon and activation are those where the config does not say."""
    conversion.drop(_POOLER, "layer between the class token and a classifier")
    conversion.drop(r"embeddings\.mask_token", "mask token, which stands in for hidden patches")
    _rename(conversion, _BERT_NAMES)
    _merge_qkv(conversion, ("query", "key", "value"))
    if "reg_token" in conversion.state:
        fold_class_position(conversion)
    network = network_of(
        conversion.state,
        resample=resample,
        num_heads=_heads(config, 12),
        architecture=architecture,
        crop_ratio=None,
        interpolation=None,
    )
    return _told(network, config, eps=eps, activation=activation)


def _plain(conversion: Conversion, config: Config | None) -> Network:
    network = _vit(conversion, config)
    words = "ImageNet mean and std, which preprocessor_config.json beside the file may contradict"
    return network if config is not None else network._replace(assumption=f"{network.assumption}; {words}")


def _deit_distilled(conversion: Conversion, config: Config | None) -> Network:
    size = _DEIT_HOSTS.get(conversion.state["embeddings.cls_token"].shape[-1], "base")
    return _vit(conversion, config, architecture=f"deit_{size}_distilled_patch16_224")


def _dinov2(conversion: Conversion, config: Config | None) -> Network:
    state = conversion.state
    is_gated = "encoder.layer.0.mlp.weights_in.weight" in state
    has_registers = "embeddings.register_tokens" in state
    return _vit(
        conversion,
        config,
        resample=positions.by_size_antialiased if has_registers else positions.by_size,
        architecture="vit_giant_patch14_dinov2" if is_gated else None,
        eps=1e-6,
        activation=None if is_gated else "gelu",
    )


def _dinov3(conversion: Conversion, config: Config | None) -> Network:
    """Rotary positions, registers, a bias for queries and values but not for keys."""
    conversion.drop(r"embeddings\.mask_token", "mask token, which stands in for hidden patches")
    conversion.drop(
        r"rope_embeddings\.inv_freq", "periods of the rotary positions, made when the network is built"
    )
    _rename(conversion, _DINOV3_NAMES)
    is_gated = "blocks.0.mlp.gate_proj.weight" in conversion.state
    conversion.rename(r"\.mlp\.gate_proj\.", ".mlp.fc1_g.", "timm's name for it")
    conversion.rename(r"\.mlp\.up_proj\.", ".mlp.fc1_x." if is_gated else ".mlp.fc1.", "timm's name for it")
    conversion.rename(r"\.mlp\.down_proj\.", ".mlp.fc2.", "timm's name for it")
    conversion.rename(r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias", "timm's name for it")
    _merge_qkv(conversion, ("q_proj", "k_proj", "v_proj"))
    state = conversion.state
    width, hidden = (
        state["cls_token"].shape[-1],
        state[f"blocks.0.mlp.fc1{'_g' if is_gated else ''}.weight"].shape[0],
    )
    args = {
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "embed_dim": width,
        "depth": depth_of(state),
        "mlp_ratio": ratio_for(hidden, width),
        "swiglu_mlp": is_gated,
        "swiglu_align_to": int(is_gated),  # other than 0, timm keeps the two matrices apart, as the file does
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "num_reg_tokens": state["reg_token"].shape[1],
        "rope_temperature": float((config or {}).get("rope_theta", 100.0)),
    }
    heads = {"num_heads": _heads(config, 6) or (32 if width == 4096 else width // 64)}
    size = "small_plus" if width == 384 and is_gated else _DINOV3_HOSTS.get(width, "base")
    words = f"{heads['num_heads']} heads, DINOv3's for width {width}: shapes do not show heads"
    network = Network(f"vit_{size}_patch16_dinov3", args, heads, words)
    if config is not None:
        network = Network(
            network.architecture, {**args, **heads, "img_size": _side(config.get("image_size", 224))}
        )
    activation = "silu" if is_gated else "gelu"
    if _activation(config or {}, activation) != activation:
        raise WeightsError(
            f"config.json has the activation {(config or {})['hidden_act']}; DINOv3 has {activation}"
        )
    return _told(network, config, eps=1e-5, activation=None)


def _clip(conversion: Conversion, config: Config | None) -> Network:
    """Image tower of CLIP; without a config the activation has to be named."""
    conversion.drop(r"embeddings\.position_ids", "index buffer")
    conversion.convert(r"embeddings\.class_embedding", lambda token: token.reshape(1, 1, -1), "axes added")
    conversion.convert(
        r"embeddings\.position_embedding\.weight", lambda table: table.unsqueeze(0), "batch axis added"
    )
    _rename(conversion, _CLIP_NAMES)
    _merge_qkv(conversion, ("q_proj", "k_proj", "v_proj"))
    activation = _activation(config, "quick_gelu") if config is not None else ""
    quick_gelu = activation == "quick_gelu" if activation else activation_of(conversion)
    network = network_of(
        conversion.state,
        resample=positions.by_size,
        num_heads=_heads(config, 12),
        architecture=host(conversion.state, quick_gelu=quick_gelu),
        crop_ratio=1.0,
    )
    network = network._replace(mean=CLIP_MEAN, std=CLIP_STD)
    return _told(network, config, eps=1e-5, activation="quick_gelu" if quick_gelu else "gelu")


def _siglip(conversion: Conversion, config: Config | None) -> Network:
    """Image tower of SigLIP and SigLIP 2 (fixed sizes); the attention that pools its tokens is left out."""
    conversion.drop(r"embeddings\.position_ids", "index buffer")
    conversion.drop(r"head\..*", "attention pooling, which tokens do not go through")
    conversion.convert(
        r"embeddings\.position_embedding\.weight", lambda table: table.unsqueeze(0), "batch axis added"
    )
    _rename(conversion, _CLIP_NAMES)
    _merge_qkv(conversion, ("q_proj", "k_proj", "v_proj"))
    network = network_of(
        conversion.state,
        resample=positions.by_size,
        num_heads=_heads(config, 12),
        architecture="vit_base_patch16_siglip_gap_224",
        crop_ratio=1.0,
    )
    return _told(network._replace(mean=_HALF, std=_HALF), config, eps=1e-6, activation="gelu_pytorch_tanh")


def _rename(conversion: Conversion, names: tuple[tuple[str, str], ...]) -> None:
    for pattern, replacement in names:
        conversion.rename(pattern, replacement, "timm's name for it")


def _merge_qkv(conversion: Conversion, names: tuple[str, str, str]) -> None:
    """One matrix, and one bias where each of the three has one, of every block's query, key and value."""
    for block in range(depth_of(conversion.state)):
        for leaf in ("weight", "bias"):
            keys = [f"blocks.{block}.attn.{name}.{leaf}" for name in names]
            if all(key in conversion.state for key in keys):
                conversion.merge(keys, f"blocks.{block}.attn.qkv.{leaf}", torch.cat, _QKV)


def _heads(config: Config | None, default: int) -> int | None:
    """Heads by the config, where a missing line means their class's default; None without a config."""
    return None if config is None else int(config.get("num_attention_heads", default))


def _side(stated: Any) -> Any:
    """The one number of a config's (height, width), if they are the same."""
    return stated[0] if isinstance(stated, list) and len(set(stated)) == 1 else stated


def _activation(config: Config, default: str) -> str:
    """The activation a config states, by timm's name."""
    stated = config.get("hidden_act", default)
    if stated not in _ACTIVATIONS:
        raise WeightsError(f"config.json has the activation {stated}; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[stated]


def _told(network: Network, config: Config | None, *, eps: float, activation: str | None) -> Network:
    """The network with its norms' epsilon and its activation: the config's, or those all models of its kind have.

    activation: None for a gated MLP, which has one that cannot be chosen.
    """
    stated = config or {}
    args: dict[str, Any] = {"layer_norm_eps": float(stated.get("layer_norm_eps", eps))}
    if activation is not None:
        args["act_layer"] = _activation(stated, activation)
    network = network._replace(model_args={**network.model_args, **args})
    _check_sizes(network, stated)
    return network


def _check_sizes(network: Network, stated: Config) -> None:
    """Refuses tensors of other sizes than their config states."""
    named = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "patch_size": "patch_size",
        "image_size": "img_size",
    }
    for key, name in named.items():
        value = _side(stated.get(key))
        shown = network.model_args.get(name)
        if value is not None and shown is not None and value != shown:
            raise WeightsError(
                f"config.json states {key} {value}, and the tensors show {shown}",
                hint="the two files belong to different models: get both from one place",
            )


class _Family(NamedTuple):
    """One kind of model of the library."""

    model_types: tuple[str, ...]
    """As config.json names it."""
    layout: Layout
    convert: Callable[[Conversion, Config | None], Network]


def _family(
    model_types: tuple[str, ...], convert: Callable[[Conversion, Config | None], Network], **fields: Any
) -> _Family:
    return _Family(
        model_types, Layout(convert=lambda conversion: convert(conversion, None), **fields), convert
    )


def _has_fixed_positions(state: State) -> bool:
    return fixed_positions({"pos_embed": state["embeddings.position_embeddings"]}) == "column"


_EMBEDDED = (
    r"embeddings\.cls_token",
    r"embeddings\.position_embeddings",
    r"embeddings\.patch_embeddings\.projection\.weight",
)
_VIT = (
    *_EMBEDDED,
    r"encoder\.layer\.0\.attention\.attention\.query\.weight",
    r"encoder\.layer\.0\.intermediate\.dense\.weight",
    r"encoder\.layer\.0\.layernorm_before\.weight",
    r"layernorm\.weight",
)
_TOWER = (
    r"embeddings\.patch_embedding\.weight",
    r"embeddings\.position_embedding\.weight",
    r"encoder\.layers\.0\.self_attn\.q_proj\.weight",
    r"post_layernorm\.weight",
)
_BESIDE_TOWER = (
    (r"text_model\..*", "text tower"),
    (r"(visual|text)_projection\.weight", "projection into the space shared with texts"),
    (r"logit_scale|logit_bias", "scale of the contrastive loss"),
    _CLASSIFIER,
)
_OTHER_VITS = (
    r"embeddings\.distillation_token",
    r"embeddings\.register_tokens",
    r"encoder\.layer\.0\.lambda_1",
)

_FAMILIES = (
    _family(
        ("vit",),
        _plain,
        name="hf_vit",
        title="ViT (transformers)",
        requires=_VIT,
        forbids=_OTHER_VITS,
        prefixes=("vit.", "deit.", ""),
        outside=(_CLASSIFIER, (r"decoder\..*", "decoder of masked patches")),
        shows=lambda state: not _has_fixed_positions(state),
    ),
    _family(
        ("vit_mae",),
        _vit,
        name="hf_vit_mae",
        title="MAE (transformers)",
        requires=_VIT,
        forbids=_OTHER_VITS,
        prefixes=("vit.", ""),
        outside=(_CLASSIFIER, (r"decoder\..*", "decoder of masked patches")),
        shows=_has_fixed_positions,
    ),
    _family(
        ("deit",),
        _deit_distilled,
        name="hf_deit",
        title="DeiT, distilled (transformers)",
        requires=(*_VIT, r"embeddings\.distillation_token"),
        prefixes=("deit.", ""),
        outside=(_CLASSIFIER,),
    ),
    _family(
        ("dinov2", "dinov2_with_registers"),
        _dinov2,
        name="hf_dinov2",
        title="DINOv2 (transformers)",
        requires=(
            *_EMBEDDED,
            r"encoder\.layer\.0\.attention\.attention\.query\.weight",
            r"encoder\.layer\.0\.layer_scale1\.lambda1",
            r"encoder\.layer\.0\.mlp\.(fc1|weights_in)\.weight",
            r"layernorm\.weight",
        ),
        prefixes=("dinov2.", "dinov2_with_registers.", ""),
        outside=(_CLASSIFIER,),
    ),
    _family(
        ("dinov3_vit",),
        _dinov3,
        name="hf_dinov3",
        title="DINOv3 (transformers)",
        requires=(
            r"embeddings\.cls_token",
            r"embeddings\.register_tokens",
            r"embeddings\.patch_embeddings\.weight",
            r"layer\.0\.attention\.q_proj\.weight",
            r"layer\.0\.layer_scale1\.lambda1",
        ),
    ),
    _family(
        ("clip", "clip_vision_model"),
        _clip,
        name="hf_clip",
        title="CLIP (transformers)",
        requires=(*_TOWER, r"embeddings\.class_embedding", r"pre_layrnorm\.weight"),
        prefixes=("vision_model.", ""),
        outside=_BESIDE_TOWER,
    ),
    _family(
        ("siglip", "siglip_vision_model"),
        _siglip,
        name="hf_siglip",
        title="SigLIP (transformers)",
        requires=(*_TOWER, r"embeddings\.patch_embedding\.bias"),
        forbids=(r"embeddings\.class_embedding",),
        prefixes=("vision_model.", ""),
        outside=_BESIDE_TOWER,
    ),
)

LAYOUTS: tuple[Layout, ...] = tuple(family.layout for family in _FAMILIES)


def read_configured(content: Any, config: Config, *, source: str) -> Reading:
    """A file's content read as the model its config.json describes.

    Raises WeightsError for a model_type that is not known here, and for tensors that are not those of the config.
    """
    model_type = config.get("model_type")
    family = next((family for family in _FAMILIES if model_type in family.model_types), None)
    if family is None:
        known = ", ".join(name for family in _FAMILIES for name in family.model_types)
        raise WeightsError(
            f"{source}: config.json has the model_type {model_type}; known are {known}",
            hint="give timm's or open_clip's copy of the same weights",
        )
    state = state_in(content, source=source)
    prefix = family.layout._replace(shows=lambda state: True).prefix_in(state, None)
    if prefix is None:
        raise WeightsError(f"{source}: config.json says {model_type}, and its tensors are of another model")
    conversion = Conversion(state)
    conversion.enter(prefix, family.layout.outside)
    network = family.convert(conversion, config.get("vision_config", config))
    return Reading(family.layout.name, family.layout.title, network, conversion.state, conversion.audit())
