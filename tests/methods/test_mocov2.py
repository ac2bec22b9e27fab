"""What MoCo v2 says itself; what it shares with v1 is in test_momentum_contrast."""

import math
from typing import Any

import pytest
from torch import nn

from fdkit.commands.pretrain import config_class
from fdkit.config import find_recipe, read_yaml, validate
from fdkit.data.views import TwoViewsConfig
from fdkit.methods._momentum_contrast import MomentumContrast
from fdkit.methods._network import NetworkConfig
from fdkit.methods.mocov2 import MoCoV2Config, build
from fdkit.training.schedule import build_schedule

SIZES = {"output_dim": 6, "queue_size": 24}


def build_resnet(**model_args: Any) -> MomentumContrast:
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16], **model_args}
    network = NetworkConfig(architecture="resnet18", model_args=small, pooling="patches")
    return build(MoCoV2Config(**SIZES), TwoViewsConfig(image_size=24), network, seed=0)


def test_the_projector_is_an_mlp_without_batch_norm() -> None:
    projector = build_resnet().projector
    assert [type(layer).__name__ for layer in projector] == ["Linear", "ReLU", "Linear"]
    assert [tuple(layer.weight.shape) for layer in projector if isinstance(layer, nn.Linear)] == [
        (16, 16),
        (6, 16),
    ]
    assert all(layer.bias is not None for layer in projector if isinstance(layer, nn.Linear))


def test_residuals_start_as_torchvision_starts_them_unless_told_otherwise() -> None:
    assert (build_resnet().student.network.layer1[0].bn2.weight == 1).all()
    assert (build_resnet(zero_init_last=True).student.network.layer1[0].bn2.weight == 0).all()


def test_build_takes_the_image_size_from_the_views() -> None:
    method = build_resnet()
    assert method.student.image_size == method.views.image_size == 24


def test_the_published_values_are_the_defaults() -> None:
    config: Any = validate(config_class("mocov2"), {"data": "x"}, "test")
    assert config.mocov2.model_dump() == {
        "num_projector_layers": 2,
        "output_dim": 128,
        "queue_size": 65536,
        "temperature": 0.2,
        "momentum": 0.999,
        "num_splits": 8,
    }
    assert (config.network.architecture, config.network.pooling) == ("resnet50", "patches")
    views = config.views
    assert (views.min_scale, views.brightness, views.contrast, views.saturation, views.hue) == (
        0.2,
        0.4,
        0.4,
        0.4,
        0.1,
    )
    assert (views.jitter_probability, views.blur_probability) == (0.8, (0.5, 0.5))
    assert (views.solarize_probability, views.grayscale_first) == ((0.0, 0.0), False)


@pytest.mark.parametrize("name", ["mocov1", "mocov2", "mocov2_800ep"])
def test_the_recipes_have_the_official_learning_rates(name: str) -> None:
    method = name.partition("_")[0]
    values = {"data": "x", **read_yaml(find_recipe(name, "pretrain"))}
    config: Any = validate(config_class(method), values, name)
    epochs = {"mocov2_800ep": 800}.get(name, 200)
    assert (config.train.epochs, config.train.batch_size) == (epochs, 256)
    schedule = build_schedule(config.optim, batch_size=256, steps_per_epoch=10, num_steps=10 * epochs)
    for epoch in (0, 1, 119, 120, 160, epochs - 1):
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        if name == "mocov1":
            expected = 0.03 * 0.1 ** ((epoch >= 120) + (epoch >= 160))
        for step in (10 * epoch, 10 * epoch + 9):
            assert schedule(step) == pytest.approx(expected), epoch
