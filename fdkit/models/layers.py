"""Tokens of any layer: what a network says before its end.

A layer is a block of a transformer (ViT, BEiT, EVA, CLIP), or a stage of a network whose grid changes (Swin, ConvNeXt,
ResNet). Both libraries walk through their own layers; the final norm and the way tokens are read are those of `tokens`,
so that the last layer with the norm is exactly what the network says at its end.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens
from fdkit.models.tokens import map_tokens, norm_after_pool, open_clip_sequence, timm_sequence


class Layer(NamedTuple):
    """The form of what one layer gives."""

    width: int
    """Channels C of its tokens."""
    patch_size: int
    """Input pixels between neighbouring tokens."""


def list_layers(network: nn.Module) -> list[Layer]:
    """Every layer of a timm or open_clip network, first to last.

    Raises ConfigError for a network whose layers are not known to be read exactly.
    """
    network = getattr(network, "trunk", network)
    return _kind_of(network).layers(network)


def final_norm_fits_every_layer(network: nn.Module) -> bool:
    """Whether the final norm fits any layer, as in a transformer of one width, or the last stage alone."""
    return not _kind_of(getattr(network, "trunk", network)).has_stages


def layer_positions(network: nn.Module, layers: Sequence[int], *, norm: bool | Sequence[bool]) -> list[int]:
    """The places of layers, counted from 0, where negative numbers count from the end.

    norm: whether they, or each of them, are to go through the final norm.
    Raises ConfigError if there is no such layer, or no layer, or if the norm does not fit a stage.
    """
    network = getattr(network, "trunk", network)
    kind = _kind_of(network)
    num_layers = len(kind.layers(network))
    if not layers:
        raise ConfigError("no layer is named", "name at least one, such as -1, the last")
    for layer, has_norm in zip(layers, _each(norm, layers), strict=True):
        if not -num_layers <= layer < num_layers:
            raise ConfigError(
                f"layer {layer}: {type(network).__name__} has {num_layers} layers",
                f"use 0 to {num_layers - 1}, or -{num_layers} to -1 to count from the end",
            )
        if has_norm and kind.has_stages and layer % num_layers != num_layers - 1:
            raise ConfigError(
                f"layer {layer}: the final norm of {type(network).__name__} fits its last stage alone",
                "take the layer without the norm (norm false)",
            )
    return [layer % num_layers for layer in layers]


def layer_tokens(
    network: nn.Module, images: Tensor, layers: Sequence[int], *, norm: bool | Sequence[bool]
) -> tuple[Tokens, ...]:
    """Tokens of the layers asked for, in that order, from one pass that stops behind the deepest of them.

    images: normalised, (B, 3, H, W). norm: through the network's own final norm, if it has one, as DINO's linear
    evaluation reads its last blocks (Caron et al. 2021, arXiv 2104.14294); without it, as the layer leaves them; a
    sequence says so of each layer.
    Raises ConfigError as `layer_positions` does.
    """
    network = getattr(network, "trunk", network)
    kind = _kind_of(network)
    wanted = layer_positions(network, layers, norm=norm)
    places = sorted(set(wanted))
    found = dict(zip(places, kind.outputs(network, images, places), strict=True))
    final_norm, plain = kind.norm(network), nn.Identity()
    return tuple(
        kind.tokens(network, (final_norm if has_norm else plain)(found[place]), images)
        for place, has_norm in zip(wanted, _each(norm, layers), strict=True)
    )


def _each(norm: bool | Sequence[bool], layers: Sequence[int]) -> Sequence[bool]:
    return [norm] * len(layers) if isinstance(norm, bool) else norm


class _Kind(NamedTuple):
    """How the layers of one sort of network are read."""

    layers: Callable[[Any], list[Layer]]
    outputs: Callable[[Any, Tensor, list[int]], list[Tensor]]
    """What the layers at these ascending places give, (B, N, C) of blocks or maps of stages, in the network's form."""
    norm: Callable[[Any], nn.Module]
    """The final norm; the identity if there is none."""
    tokens: Callable[[Any, Tensor, Tensor], Tokens]
    """Tokens from what a layer gives, and the images it was given for."""
    has_stages: bool
    """Whether layers differ in width, so that the final norm fits the last alone."""


def _kind_of(network: nn.Module) -> _Kind:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
    from timm.models.beit import Beit
    from timm.models.convnext import ConvNeXt
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit
    from timm.models.resnet import ResNet
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(network, (VisionTransformer, Beit, Eva, NaFlexVit)):
        return _Kind(_timm_layers, _timm_blocks, _timm_norm, timm_sequence, has_stages=False)
    if isinstance(network, (SwinTransformer, SwinTransformerV2, ConvNeXt, ResNet)):
        return _Kind(_timm_layers, _timm_stages, _timm_norm, _read_map, has_stages=True)
    if isinstance(network, OpenClipVisionTransformer):
        return _Kind(_clip_layers, _clip_blocks, _clip_norm, open_clip_sequence, has_stages=False)
    if isinstance(network, ModifiedResNet):
        return _Kind(_clip_resnet_layers, _clip_resnet_stages, _no_norm, _read_map, has_stages=True)
    raise ConfigError(
        f"the layers of {type(network).__name__} are not known, only its final tokens",
        "leave the layer out; layers are known of ViT, BEiT, EVA, CLIP, Swin, Swin V2, ConvNeXt and ResNet",
    )


def _timm_layers(network: Any) -> list[Layer]:
    infos = [info for info in network.feature_info if info["module"] != "act1"]  # a ResNet's stem is no stage
    return [Layer(info["num_chs"], info["reduction"]) for info in infos]


def _timm_blocks(network: Any, images: Tensor, places: list[int]) -> list[Tensor]:
    outputs = network.forward_intermediates(
        images,
        indices=places,
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    # A network without prefix tokens gives the patches alone, others a pair of patches and prefix.
    return [out if isinstance(out, Tensor) else torch.cat([out[1], out[0]], dim=1) for out in outputs]


def _timm_stages(network: Any, images: Tensor, places: list[int]) -> list[Tensor]:
    num_stems = len(network.feature_info) - len(_timm_layers(network))
    indices = [num_stems + place for place in places]
    maps = network.forward_intermediates(images, indices=indices, stop_early=True, intermediates_only=True)
    is_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
    return [one.permute(0, 2, 3, 1) if is_channels_last else one for one in maps]


def _timm_norm(network: Any) -> nn.Module:
    """The norm between the last layer and the final tokens, in front of the pooling or behind it."""
    from timm.models.convnext import ConvNeXt

    own: Any = network.norm_pre if isinstance(network, ConvNeXt) else getattr(network, "norm", None)
    return norm_after_pool(network) if own is None or isinstance(own, nn.Identity) else own


def _clip_layers(visual: Any) -> list[Layer]:
    layer = Layer(visual.class_embedding.shape[0], visual.patch_size[0])
    return [layer] * len(visual.transformer.resblocks)


def _clip_blocks(visual: Any, images: Tensor, places: list[int]) -> list[Tensor]:
    embedded = visual._embeds(images)
    _, outputs = visual.transformer.forward_intermediates(embedded, indices=places, stop_early=True)
    return list(outputs)


def _clip_norm(visual: Any) -> nn.Module:
    norm: nn.Module = visual.ln_post
    return norm


def _clip_resnet_layers(visual: Any) -> list[Layer]:
    widths = [stage[-1].conv3.out_channels for stage in _clip_resnet_modules(visual)]
    return [Layer(width, 4 * 2**number) for number, width in enumerate(widths)]


def _clip_resnet_stages(visual: Any, images: Tensor, places: list[int]) -> list[Tensor]:
    features, maps = visual.stem(images), []
    for stage in _clip_resnet_modules(visual)[: places[-1] + 1]:
        features = stage(features)
        maps.append(features)
    return [maps[place] for place in places]


def _clip_resnet_modules(visual: Any) -> list[Any]:
    return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]


def _no_norm(network: Any) -> nn.Module:
    return nn.Identity()


def _read_map(network: nn.Module, features: Tensor, images: Tensor) -> Tokens:
    return map_tokens(network, features)
