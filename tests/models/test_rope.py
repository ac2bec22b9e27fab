import copy
import math

import pytest
import timm
import torch

from fdkit.errors import ConfigError
from fdkit.models.rope import state_periods

ARGS = {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 0}
PERIODS = [1.0, 1.5, 2.5, 3.0, 5.0, 8.0, 9.0, 20.0]


def rotary_vit() -> torch.nn.Module:
    return timm.create_model("vit_small_patch16_dinov3", **ARGS).eval()


def test_angles_follow_the_periods_given_in_copies_and_after_halving_too() -> None:
    network = rotary_vit()
    state_periods(network, PERIODS)
    for one in (network, copy.deepcopy(network), copy.deepcopy(network).half().float()):
        sines = one.rope.get_embed((2, 3))[:, :32]
        row, column = 1, 2
        places = (2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1)
        expected = [math.sin(2 * math.pi * place / period) for place in places for period in PERIODS]
        assert sines[3 * row + column].tolist() == pytest.approx(expected * 2, abs=1e-6)
    assert rotary_vit().rope.periods.tolist() != PERIODS
    assert not any("rope" in key for key in network.state_dict())


def test_periods_of_other_heads_and_networks_without_rotary_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 periods of rotary positions do not fit Eva"):
        state_periods(rotary_vit(), PERIODS[:7])
    with pytest.raises(ConfigError, match="8 periods of rotary positions do not fit ResNet"):
        state_periods(timm.create_model("resnet18"), PERIODS)
