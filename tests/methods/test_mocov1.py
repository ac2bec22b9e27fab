"""What MoCo v1 says itself; what it shares with v2 is in test_momentum_contrast."""

from typing import Any

import torch
from torch import nn

from fdkit.commands.pretrain import build_method, config_class
from fdkit.config import validate


def config(**sections: Any) -> Any:
    return validate(config_class("mocov1"), {"data": "x", **sections}, "test")


def test_one_linear_layer_projects_features() -> None:
    vit = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    }
    small = config(network=vit, views={"image_size": 16}, mocov1={"queue_size": 8, "output_dim": 6})
    method: Any = build_method(small)
    (layer,) = method.projector
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (6, 16)
    assert layer.bias is not None
    loss = method([torch.rand(4, 3, 16, 16) for _ in range(2)], 0.0)["loss"]
    loss.backward()
    assert layer.weight.grad.abs().sum() > 0


def test_the_published_values_are_the_defaults() -> None:
    published = config()
    assert published.mocov1.model_dump() == {
        "num_projector_layers": 1,
        "output_dim": 128,
        "queue_size": 65536,
        "temperature": 0.07,
        "momentum": 0.999,
        "num_splits": 8,
    }
    assert (published.network.architecture, published.network.pooling) == ("resnet50", "patches")
    views = published.views
    assert (views.min_scale, views.brightness, views.contrast, views.saturation, views.hue) == (
        0.2,
        0.4,
        0.4,
        0.4,
        0.4,
    )
    assert (views.jitter_probability, views.grayscale_probability, views.grayscale_first) == (1.0, 0.2, True)
    assert (views.blur_probability, views.solarize_probability) == ((0.0, 0.0), (0.0, 0.0))
