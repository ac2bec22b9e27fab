"""An open_clip image tower as the timm network that computes the same, so that it can be given a classifier."""

from typing import Any

import torch

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.teachers.official import LAYOUTS
from fdkit.teachers.official._layout import match
from fdkit.teachers.weights import load_whole

TOLERANCE = 1e-3
"""Largest difference, as a share of the largest token, between both networks on a random image."""


def as_timm(backbone: Backbone) -> Backbone:
    """The backbone itself if it is timm's; else its tower rebuilt in timm, checked on one random image.

    Raises ConfigError for a tower that timm does not have, or that says something else there.
    """
    recipe = backbone.recipe
    if recipe["library"] == "timm":
        return backbone
    name = recipe["architecture"]
    refusal = ConfigError(
        f"open_clip:{name} has no counterpart in timm that a classifier could be put on",
        "use a CLIP of timm's, such as timm:vit_base_patch16_clip_224.laion2b",
    )
    network: Any = backbone.network
    trunk = getattr(network, "trunk", None)
    if trunk is not None:
        twin = build_timm(
            trunk.pretrained_cfg["architecture"],
            {"img_size": backbone.image_size},
            preprocessing=backbone.preprocessing,
        )
        state = {key: value for key, value in trunk.state_dict().items() if key in twin.network.state_dict()}
    else:
        quick = "_quickgelu" if recipe["model_args"]["quick_gelu"] else ""
        reading = match(network.state_dict(), LAYOUTS, architecture=f"vit_base_patch16_clip{quick}_224")
        if reading is None or not hasattr(network, "transformer"):
            raise refusal
        args = {**reading.network.assumed_args, **reading.network.model_args}
        args |= {
            "num_heads": network.transformer.resblocks[0].attn.num_heads,
            "img_size": backbone.image_size,
        }
        twin = build_timm(reading.network.architecture, args, preprocessing=backbone.preprocessing)
        state = reading.state
    load_whole(twin.network, state, source=f"open_clip:{name}")
    if not _agree(backbone, twin):
        raise refusal
    return twin


@torch.no_grad()
def _agree(first: Backbone, second: Backbone) -> bool:
    image = torch.rand(1, 3, first.image_size, first.image_size, generator=torch.Generator().manual_seed(0))
    modes = [(backbone, backbone.training) for backbone in (first, second)]
    one, other = (backbone.eval()(image).all() for backbone, _ in modes)
    for backbone, training in modes:
        backbone.train(training)
    return one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
