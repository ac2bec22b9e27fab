"""How final tokens are read out of the networks of timm and open_clip.

Images are normalised already: (B, 3, H, W), as the network itself takes them.
"""

from typing import Any

from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens


def timm_tokens(network: nn.Module, images: Tensor) -> Tokens:
    """Final tokens of a timm model, each through the model's own final norm.

    Models that pool before that norm (BEiT, ConvNeXt) keep it as `fc_norm` or `head.norm`; it is applied to every
    token here. Registers of a model without a class token are left out, so that a prefix starts with the class token.
    """
    features = norm_after_pool(network)(network.forward_features(images))  # type: ignore[operator]
    return map_tokens(network, features) if features.ndim == 4 else timm_sequence(network, features, images)


def open_clip_vit_tokens(visual: Any, images: Tensor) -> Tokens:
    """Tokens of open_clip's own ViT: `ln_post` on every token, where CLIP itself keeps the class token alone."""
    return open_clip_sequence(visual, visual.ln_post(visual.transformer(visual._embeds(images))), images)


def open_clip_resnet_tokens(visual: Any, images: Tensor) -> Tokens:
    """The last stage's map of open_clip's ResNet, before its attention pooling."""
    features = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        features = stage(features)
    return map_tokens(visual, features)


def open_clip_trunk_tokens(visual: Any, images: Tensor) -> Tokens:
    """Tokens of an open_clip tower that wraps a timm model."""
    return timm_tokens(visual.trunk, images)


def map_tokens(network: nn.Module, features: Tensor) -> Tokens:
    """Tokens of a feature map, (B, C, h, w) or (B, h, w, C) as the network has it; there is no prefix."""
    is_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
    features = features if is_channels_last else features.permute(0, 2, 3, 1)
    patches = features.flatten(1, 2)
    return Tokens(patches[:, :0], patches, (features.shape[1], features.shape[2]))


def timm_sequence(network: nn.Module, features: Tensor, images: Tensor) -> Tokens:
    """Tokens of a timm transformer's sequence (B, P + h*w, C); ConfigError if it is not one token a patch."""
    num_prefix = int(getattr(network, "num_prefix_tokens", 0))
    side = stride(network)
    grid = (images.shape[-2] // side, images.shape[-1] // side)
    patches = features[:, num_prefix:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ConfigError(
            f"{type(network).__name__} gave {features.shape[1]} tokens, {num_prefix} of them prefix tokens, where a "
            f"{grid[0]}x{grid[1]} grid was expected: it has no plain token map"
        )
    return Tokens(features[:, : num_prefix_tokens(network)], patches, grid)


def open_clip_sequence(visual: Any, features: Tensor, images: Tensor) -> Tokens:
    """Tokens of the sequence (B, 1 + h*w, C) of open_clip's own ViT."""
    height, width = images.shape[-2] // visual.patch_size[0], images.shape[-1] // visual.patch_size[1]
    return Tokens(features[:, :1], features[:, 1:], (height, width))


def norm_after_pool(network: nn.Module) -> nn.Module:
    """The final norm of a timm model that keeps it behind its pooling; identity if tokens are normed already."""
    if not isinstance(getattr(network, "norm", nn.Identity()), nn.Identity):
        return nn.Identity()
    for owner, name in ((network, "fc_norm"), (getattr(network, "head", None), "norm")):
        norm = getattr(owner, name, None)
        if isinstance(norm, nn.Module):
            return norm
    return nn.Identity()


def num_prefix_tokens(network: nn.Module) -> int:
    """Prefix tokens handed on: none without a class token, even if the network has registers."""
    count = int(getattr(network, "num_prefix_tokens", 0))
    owner = getattr(network, "embeds", network)  # where a NaFlex ViT keeps its class token
    return count if getattr(owner, "cls_token", None) is not None else 0


def stride(network: Any) -> int:
    """Input pixels between neighbouring final tokens."""
    info = getattr(network, "feature_info", None)
    if info:
        reduction = info[-1]["reduction"]
        return int(reduction[0] if isinstance(reduction, (tuple, list)) else reduction)
    if hasattr(network, "patch_embed"):
        return int(network.patch_embed.patch_size[0])
    raise ConfigError(f"{type(network).__name__} does not say how many pixels lie between its tokens")
