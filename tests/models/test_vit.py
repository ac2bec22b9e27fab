import math

import pytest
import timm
import torch

from fdkit.errors import ConfigError
from fdkit.models.vit import fix_position, patch_projection, sincos_position, xavier_initialise


def table_by_loops(grid: tuple[int, int], dim: int, axes: str) -> torch.Tensor:
    table = torch.zeros(grid[0] * grid[1], dim)
    for row in range(grid[0]):
        for column in range(grid[1]):
            channels = []
            for axis in axes:
                place = {"r": row, "c": column}[axis]
                angles = [place / 10000 ** (4 * i / dim) for i in range(dim // 4)]
                channels += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            table[row * grid[1] + column] = torch.tensor(channels)
    return table


def tiny_vit(**args: object) -> torch.nn.Module:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_base_patch16_224", **{**shape, **args})


def test_sincos_positions_match_the_formula_written_as_loops() -> None:
    torch.testing.assert_close(sincos_position((2, 3), 8, first="row"), table_by_loops((2, 3), 8, "rc"))
    torch.testing.assert_close(sincos_position((2, 3), 8, first="column"), table_by_loops((2, 3), 8, "cr"))


def test_row_first_and_column_first_differ_by_the_halves_of_the_channels_only() -> None:
    row_first, column_first = (sincos_position((3, 3), 8, first=axis) for axis in ("row", "column"))
    assert not torch.allclose(row_first, column_first)
    assert torch.equal(row_first, column_first.roll(4, dims=1))


def test_a_width_that_is_not_a_multiple_of_4_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 6 is not a multiple of 4"):
        sincos_position((2, 2), 6, first="row")


def test_fixed_positions_are_frozen_and_zero_for_the_class_token() -> None:
    network = tiny_vit()
    fix_position(network, first="row")
    assert not network.pos_embed.requires_grad
    assert torch.equal(network.pos_embed[0, 0], torch.zeros(8))
    torch.testing.assert_close(network.pos_embed[0, 1:], table_by_loops((4, 4), 8, "rc"))


def test_initial_weights_fill_their_xavier_bounds() -> None:
    network = tiny_vit(embed_dim=64, img_size=32, patch_size=8)
    xavier_initialise(network)
    block = network.blocks[1]
    bounds = {
        block.attn.qkv.weight: math.sqrt(6 / (64 + 64)),  # not 64 + 3 * 64
        block.attn.proj.weight: math.sqrt(6 / (64 + 64)),
        block.mlp.fc1.weight: math.sqrt(6 / (64 + 256)),
        network.patch_embed.proj.weight: math.sqrt(6 / (3 * 8 * 8 + 64)),
    }
    for weight, bound in bounds.items():
        assert 0.98 * bound < weight.abs().max() <= bound
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    assert 0 < network.cls_token.abs().max() < 1e-5


def test_a_network_without_patch_projection_has_none() -> None:
    assert patch_projection(tiny_vit()) is not None
    assert patch_projection(timm.create_model("resnet18")) is None
