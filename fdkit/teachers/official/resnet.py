"""ResNets under torchvision's names: supervised, MoCo v1 to v3, SimSiam, SwAV, Fast-MoCo and DINO.

timm's ResNets have the same names and compute the same (SwAV pads before its first convolution instead of in it).
Verified against facebookresearch/moco, moco-v3, simsiam (their builder.py), swav (src/resnet50.py, eval_linear.py),
dino and microsoft/esvit (utils.py, MultiCropWrapper) and orashi/Fast-MoCo (core/utils/fastmoco_builder.py).
"""

import re
from functools import partial
from typing import Any, Literal

import torch

from fdkit.errors import WeightsError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from fdkit.teachers.official._layout import Conversion, Layout, Network, State

SWAV_STD = (0.228, 0.224, 0.225)
"""SwAV's training and its linear evaluation both divide red by 0.228, where others have 0.229."""
STEM_WIDTH = 64
KNOWN = {
    (False, 3, 4, 6, 3): "resnet34",
    (True, 3, 4, 23, 3): "resnet101",
    (True, 3, 8, 36, 3): "resnet152",
}
"""Names in timm by whether blocks are bottlenecks, and blocks a stage; others are resnet18 or 50 of other sizes."""
FAST_MOCO_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Fast-MoCo keeps the children of its ResNet in a row; those without weights have numbers too."""
_COUNTER = "num_batches_tracked"

Interpolation = Literal["bilinear", "bicubic"]


def _convert(
    conversion: Conversion, *, head: str, why: str, interpolation: Interpolation = "bilinear"
) -> Network:
    """A ResNet of the tensors left once those matching `head` are dropped.

    interpolation: how the official evaluation resizes images, to 256 pixels before cutting 224.
    """
    conversion.drop(head, why)
    _add_counters(conversion)
    return _network(conversion.state)._replace(interpolation=interpolation)


def _convert_swav(conversion: Conversion) -> Network:
    conversion.drop(r"prototypes\..*", "prototypes, used in pretraining alone")
    network = _convert(conversion, head=r"projection_head\..*", why="projection head")
    return network._replace(std=SWAV_STD)


def _convert_fast_moco(conversion: Conversion) -> Network:
    conversion.drop(r"1\..*", "projector")
    for number, name in FAST_MOCO_CHILDREN.items():
        conversion.rename(rf"^0\.{number}\.", f"{name}.", "children of the ResNet by number")
    return _convert(conversion, head=r"fc\..*", why="classifier", interpolation="bicubic")


def _add_counters(conversion: Conversion) -> None:
    """The batch counters of BatchNorm, 0 where the file is older than they are; evaluation does not use them."""
    for key in [key for key in conversion.state if key.endswith(".running_mean")]:
        counter = key.replace("running_mean", _COUNTER)
        if counter not in conversion.state:
            parts = {key: conversion.state[key], counter: torch.tensor(0)}
            conversion.split(key, parts, f"the file is older than {_COUNTER}, which starts at 0")


def _network(state: State) -> Network:
    """The ResNet of timm of these sizes; WeightsError for a stem it does not have, such as SwAV's wide ones."""
    stem = tuple(state["conv1.weight"].shape)
    if stem != (STEM_WIDTH, 3, 7, 7):
        raise WeightsError(f"timm has no such ResNet: its first convolution is {stem}, not (64, 3, 7, 7)")
    is_bottleneck = "layer1.0.conv3.weight" in state
    inner = state["layer1.0.conv1.weight"].shape[0]
    groups = inner // state["layer1.0.conv2.weight"].shape[1]
    args: dict[str, Any] = {
        "layers": [_num_blocks(state, stage) for stage in range(1, 5)],
        "cardinality": groups,
        "base_width": inner // groups,
    }
    name = KNOWN.get((is_bottleneck, *args["layers"]), "resnet50" if is_bottleneck else "resnet18")
    return Network(f"{name}.tv_in1k", args, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_ratio=0.875)


def _num_blocks(state: State, stage: int) -> int:
    return 1 + max(int(m[1]) for key in state if (m := re.match(rf"layer{stage}\.(\d+)\.", key)))


_RESNET = (r"conv1\.weight", r"bn1\.running_mean", *(rf"layer{n}\.0\.conv1\.weight" for n in (1, 2, 3, 4)))
_MOMENTUM = "momentum encoder, an average of the encoder's past"
_ONLINE = "encoder, of which the momentum encoder is an average"
_PREDICTOR = (r"predictor\..*", "predictor, used in pretraining alone")

LAYOUTS = (
    Layout(
        name="resnet",
        title="ResNet (torchvision names)",
        requires=_RESNET,
        forbids=(r"projection_head\..*", r"prototypes\..*"),
        convert=partial(_convert, head=r"fc\..*", why="classifier or projector"),
    ),
    Layout(
        name="mocov3_resnet",
        title="MoCo v3 (ResNet)",
        requires=_RESNET,
        convert=partial(_convert, head=r"fc\..*", why="projector"),
        prefixes=("base_encoder.", "momentum_encoder."),
        outside=((r"momentum_encoder\..*", _MOMENTUM), (r"base_encoder\..*", _ONLINE), _PREDICTOR),
    ),
    Layout(
        name="moco",
        title="MoCo v1 or v2 (ResNet)",
        requires=_RESNET,
        convert=partial(_convert, head=r"fc\..*", why="projector"),
        prefixes=("encoder_q.", "encoder_k."),
        outside=(
            (r"encoder_k\..*", _MOMENTUM),
            (r"encoder_q\..*", _ONLINE),
            (r"queue(_ptr)?", "queue of keys, used in pretraining alone"),
        ),
    ),
    Layout(
        name="simsiam",
        title="SimSiam (ResNet)",
        requires=_RESNET,
        convert=partial(_convert, head=r"fc\..*", why="projector"),
        prefixes=("encoder.",),
        outside=(_PREDICTOR,),
    ),
    Layout(
        name="swav",
        title="SwAV (ResNet)",
        requires=(*_RESNET, r"(projection_head|prototypes)\..*"),
        convert=_convert_swav,
    ),
    Layout(
        name="fastmoco",
        title="Fast-MoCo (ResNet)",
        requires=(r"0\.0\.weight", r"0\.1\.running_mean", r"0\.4\.0\.conv1\.weight"),
        convert=_convert_fast_moco,
        prefixes=("encoder.", "encoder_ema."),
        outside=(
            (r"encoder_ema\..*", _MOMENTUM),
            (r"encoder\..*", _ONLINE),
            (r"(backbone|bbone_ema)\..*", "a second name for the tensors of an encoder"),
            _PREDICTOR,
        ),
    ),
    Layout(
        name="dino_resnet",
        title="DINO or EsViT (ResNet)",
        requires=_RESNET,
        convert=partial(_convert, head=r"fc\..*", why="classifier", interpolation="bicubic"),
        prefixes=("backbone.", "backbone.backbone."),
        outside=((r"head(_dense)?\..*", "projection head"),),
    ),
)
