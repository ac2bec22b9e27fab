"""MoCo v2: MoCo v1 with SimCLR's two-layer projector, its blur, a higher temperature and a cosine schedule.

The student makes queries, a slow copy of it makes keys, and a queue of 65,536 earlier keys holds the wrong answers,
so that a batch of 256 is enough. The projector is an MLP without batch norm; one direction alone is compared.
Source: Chen et al. 2020 (arXiv 2003.04297); what the paper leaves open follows facebookresearch/moco at 132aea9,
with its options --mlp --moco-t 0.2 --aug-plus --cos.
"""

from typing import Any

from pydantic import Field

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
        "saturation": 0.4,
        "blur_probability": (0.5, 0.5),
        "solarize_probability": (0.0, 0.0),
    },
}


class MoCoV2Config(MomentumContrastConfig):
    """MoCo v2; the defaults are those of the paper."""

    SECTION = "mocov2"

    num_projector_layers: int = Field(default=2, ge=1)
    """Layers of the projector: 1 in MoCo v1, 2 in MoCo v2; hidden ones are as wide as the feature, without norm."""
    temperature: float = Field(default=0.2, gt=0)
    """Divides the cosines before the softmax: 0.07 in MoCo v1, 0.2 in MoCo v2."""


def build(
    config: MoCoV2Config, views: TwoViewsConfig, network: NetworkConfig, *, seed: int
) -> MomentumContrast:
    """MoCo v2 on two equally augmented views of each image."""
    return build_momentum_contrast(config, views, network, seed=seed)
