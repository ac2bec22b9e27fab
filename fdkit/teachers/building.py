"""Networks for weights that are about to be loaded: of the right size, activation and preprocessing, or refused."""

from collections.abc import Mapping
from typing import Any

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.catalog import CATALOG


def build_teacher(
    name: str, image_size: int | None, args: Mapping[str, Any] | None = None, *, keep_head: bool = False
) -> Backbone:
    """A timm model with random weights, fed images of `image_size`; None is its native size.

    Raises ConfigError for a name timm does not know and a size that does not divide into patches.
    """
    size = {} if image_size is None else {"img_size": image_size}
    backbone = build_timm(name, {**(args or {}), **size}, keep_head=keep_head)
    remainder = backbone.image_size % backbone.patch_size
    if remainder and hasattr(backbone.network, "pos_embed"):
        low = backbone.image_size - remainder
        raise ConfigError(
            f"image size {backbone.image_size} does not divide into patches of {backbone.patch_size} ({name})",
            hint=f"use {low} or {low + backbone.patch_size}",
        )
    return backbone


def build_open_clip_teacher(arch: str, tag: str, image_size: int | None) -> Backbone:
    """The visual tower of open_clip's `ARCH/TAG`, refused if tag and architecture disagree on the activation."""
    import open_clip

    if tag:
        has_quick_gelu = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu"))
        stated = open_clip.get_pretrained_cfg(arch, tag)
        if stated and bool(stated.get("quick_gelu")) != has_quick_gelu:
            other = arch.removesuffix("-quickgelu") if has_quick_gelu else f"{arch}-quickgelu"
            raise _wrong_activation(f"open_clip:{arch}/{tag}", f"open_clip:{other}/{tag}")
    size = {} if image_size is None else {"image_size": image_size}
    backbone = build_open_clip(arch, size, tag=tag or None)
    if backbone.image_size % backbone.patch_size:
        raise ConfigError(
            f"image size {image_size} does not divide into patches of {backbone.patch_size} (open_clip:{arch})"
        )
    return backbone


def with_preprocessing(backbone: Backbone, changes: dict[str, Any]) -> Backbone:
    """The same network behind changed preprocessing."""
    return Backbone(
        backbone.network,
        backbone.tokens_of,
        embed_dim=backbone.embed_dim,
        patch_size=backbone.patch_size,
        num_prefix_tokens=backbone.num_prefix_tokens,
        preprocessing=backbone.preprocessing._replace(**changes),
        recipe=backbone.recipe,
        logits_of=backbone.logits_of,
    )


def refuse_wrong_activation(name: str) -> None:
    """Refuses CLIP weights trained with QuickGELU under timm's plain-GELU name of the same tag.

    timm keeps both names for the same files; under the plain one the features are others than the model's own.
    """
    import timm

    architecture, _, tag = name.partition(".")
    quick = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{tag}"
    if tag and quick != name and quick in timm.list_pretrained("*quickgelu*"):
        raise _wrong_activation(f"timm:{name}", f"timm:{quick}")


def _wrong_activation(given: str, right: str) -> WeightsError:
    short = next((entry.name for entry in CATALOG.values() if entry.model == right), None)
    return WeightsError(
        f"{given} would run with another activation than its weights were trained with",
        hint=f"use {right}" + (f" (short name {short})" if short else ""),
    )
