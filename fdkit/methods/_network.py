"""The network a pretraining method trains: any timm model, from random weights or from those of a MODEL."""

from typing import Any, Literal

from pydantic import Field
from torch import nn

from fdkit.config import Config
from fdkit.data.views import Interpolation
from fdkit.errors import ConfigError, WeightsError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Pooling, Preprocessing
from fdkit.models.batch_norm import synchronise_batch_norm
from fdkit.models.libraries import build_timm, check_state
from fdkit.models.vit import (
    dino_initialise,
    fix_position,
    mae_initialise,
    patch_projection,
    xavier_initialise,
)
from fdkit.teachers.loading import load_teacher


class NetworkConfig(Config):
    """The network that is pretrained and exported."""

    architecture: str = "vit_small_patch16_224"
    """timm name of the network; it is built at the size of the views."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the timm model, such as embed_dim, depth, num_heads, patch_size, class_token."""
    init: str | None = None
    """MODEL to start from, such as an official checkpoint file or a run folder; left out, random weights.
    --init for short."""
    stem: Literal["patch", "conv"] = "patch"
    """How a vision transformer reads pixels: one projection a patch, or MoCo v3's convolutions (patch size 16)."""
    position: Literal["learned", "sincos", "none"] = "learned"
    """Positions of a vision transformer: learned, fixed 2-D sine-cosine, or none; other networks keep their own."""
    sincos_first: Literal["row", "column"] = "row"
    """Which axis has the first half of the sine-cosine channels: row in MoCo v3, column in MAE."""
    initialisation: Literal["timm", "xavier", "mae", "dino"] = "timm"
    """Random start: timm's own, or for a vision transformer as MoCo v3 (xavier), MAE or DINO draws it."""
    freeze_patch_projection: bool = False
    """Keep the patch projection of a vision transformer at its start, as MoCo v3 does for stability."""
    pooling: Pooling = "cls"
    """What heads read: the class token, or the mean of the patches (the map of ResNet and Swin)."""
    final_norm: bool = True
    """Keep the norm behind the last block of a vision transformer."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the last block in training, growing linearly from 0 at the first."""
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    """image_size / short side when the trained network is evaluated; 1 for images that are as small as the input."""
    interpolation: Interpolation = "bilinear"
    """How images are resized when the trained network is evaluated."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of RGB in [0, 1] that is subtracted inside the network."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of RGB that the network divides by."""


def build_network(
    config: NetworkConfig, *, image_size: int, sizes: tuple[int, ...] = (), synchronise: bool = True
) -> Backbone:
    """The network to pretrain; random weights come from the global generator.

    image_size: of the views, in pixels; sizes: of further views, which the network takes as they are. Batch norms are
    synchronised already, whether or not a process group runs; synchronise false leaves them to each rank alone.
    Raises ConfigError if the configuration asks of the network what it does not have, or for image sizes it does not
    take; what `load_teacher` raises, and WeightsError if `init` is of another network.
    """
    backbone = _build(config, image_size)
    network: Any = backbone.network
    if _is_vit(config):
        _prepare_vit(network, config)
    else:
        _refuse_vit_options(backbone, config)
    if config.pooling == "cls" and backbone.num_prefix_tokens == 0:
        raise ConfigError(
            f"network.pooling cls: {config.architecture} has no class token",
            "use --network.pooling patches",
        )
    _check_size(backbone, config, image_size)
    if sizes:
        from fdkit.models.any_size import take_any_size

        take_any_size(backbone, sizes)
    if config.init is not None:
        _start_from(config.init, backbone)
    return synchronise_batch_norm(backbone) if synchronise else backbone


def _is_vit(config: NetworkConfig) -> bool:
    return config.architecture.startswith("vit_")


def _build(config: NetworkConfig, image_size: int) -> Backbone:
    args: dict[str, Any] = {"img_size": image_size}
    if config.drop_path or config.architecture.startswith("swin"):  # whose own default in timm is 0.1
        args["drop_path_rate"] = config.drop_path
    if _is_vit(config):
        args |= {"pos_embed": "none"} if config.position == "none" else {}
        args |= {"stem": "conv"} if config.stem == "conv" else {}
        args |= {} if config.final_norm else {"final_norm": False}
    args |= config.model_args
    if args["img_size"] != image_size:
        raise ConfigError(
            f"network.model_args.img_size is {args['img_size']}, but the views are {image_size} pixels wide",
            "set views.image_size alone",
        )
    if args.get("num_classes"):
        raise ConfigError(
            f"network.model_args.num_classes is {args['num_classes']}: pretraining has no classes",
            "leave it out; fdkit evaluate adds a classifier to the trained features",
        )
    preprocessing = Preprocessing(
        config.mean, config.std, image_size, config.crop_ratio, interpolation=config.interpolation
    )
    return build_timm(config.architecture, args, preprocessing=preprocessing)


def _prepare_vit(network: nn.Module, config: NetworkConfig) -> None:
    """Initialise a vision transformer, fix its positions and freeze its patch projection, as configured."""
    if config.initialisation == "xavier":
        xavier_initialise(network)
    elif config.initialisation == "mae":
        mae_initialise(network)
    elif config.initialisation == "dino":
        dino_initialise(network)
    if config.position == "sincos":
        fix_position(network, first=config.sincos_first)
    if not config.freeze_patch_projection:
        return
    projection = patch_projection(network)
    if projection is None:
        raise ConfigError(
            f"{config.architecture} with stem {config.stem} has no single patch projection to freeze",
            "use --network.no-freeze-patch-projection",
        )
    projection.requires_grad_(False)


def _refuse_vit_options(backbone: Backbone, config: NetworkConfig) -> None:
    """Raises ConfigError naming every option that means nothing for a network that is no vision transformer."""
    wrong = {
        "stem: patch": config.stem != "patch",
        "position: none": config.position == "sincos",
        "initialisation: timm": config.initialisation != "timm",
        "freeze_patch_projection: false": config.freeze_patch_projection,
        "final_norm: true": not config.final_norm,
        "pooling: patches": config.pooling == "cls" and backbone.num_prefix_tokens == 0,
    }
    if any(wrong.values()):
        needed = ", ".join(setting for setting, is_wrong in wrong.items() if is_wrong)
        raise ConfigError(
            f"network.architecture {config.architecture} is no vision transformer; it needs {needed}",
            "the recipe pretrain/mocov3_r50 shows all settings of a ResNet-50",
        )


def _check_size(backbone: Backbone, config: NetworkConfig, image_size: int) -> None:
    if hasattr(backbone.network, "patch_embed") and image_size % backbone.patch_size:
        near = max(1, round(image_size / backbone.patch_size)) * backbone.patch_size
        raise ConfigError(
            f"views.image_size {image_size} is no multiple of the {backbone.patch_size} pixels of a patch of "
            f"{config.architecture}",
            f"use --views.image-size {near}",
        )


def _start_from(model: str, backbone: Backbone) -> None:
    """Give the network the weights of a MODEL of the same architecture."""
    loaded = load_teacher(model, image_size=backbone.image_size).backbone
    heads = [
        [part.num_heads for part in network.modules() if isinstance(getattr(part, "num_heads", None), int)]
        for network in (loaded.network, backbone.network)
    ]
    if heads[0] != heads[1]:  # weights fit any number of heads, and mean something else
        raise WeightsError(
            f"network.init {model}: its attention has {heads[0][:1]} heads in a block, this network {heads[1][:1]}",
            "name the number with --network.model-args",
        )
    state = loaded.network.state_dict()
    check_state(backbone.network, state, source=f"network.init {model}")
    backbone.network.load_state_dict(state)
