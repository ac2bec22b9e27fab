"""MoCo v1: a query must find the key of its image's other view among the keys of many earlier batches.

The student makes queries, a slow copy of it makes keys, and a queue of 65,536 earlier keys holds the wrong answers,
so that their number does not hang on the batch. One linear layer projects features; one direction alone is compared.
Source: He et al. 2019 (arXiv 1911.05722); what the paper leaves open follows facebookresearch/moco at 132aea9.
"""

from typing import Any

from fdkit.data.views import TwoViewsConfig
from fdkit.methods._momentum_contrast import (
    MomentumContrast,
    MomentumContrastConfig,
    build_momentum_contrast,
)
from fdkit.methods._network import NetworkConfig

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"architecture": "resnet50", "pooling": "patches"},
    "views": {
        "min_scale": 0.2,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.4,
        "jitter_probability": 1.0,
        "grayscale_first": True,
        "blur_probability": (0.0, 0.0),
        "solarize_probability": (0.0, 0.0),
    },
}


class MoCoV1Config(MomentumContrastConfig):
    """MoCo v1; the defaults are those of the paper."""

    SECTION = "mocov1"


def build(
    config: MoCoV1Config, views: TwoViewsConfig, network: NetworkConfig, *, seed: int
) -> MomentumContrast:
    """MoCo v1 on two equally augmented views of each image."""
    return build_momentum_contrast(config, views, network, seed=seed)
