"""Vision transformers at several sizes, against plain loops over DINO's resampling and networks built for each size."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.any_size import AnySizeViT, resample_by_scale, take_any_size
from fdkit.models.backbone import Backbone
from fdkit.models.class_token import has_fast_class_token
from fdkit.models.layers import layer_tokens
from fdkit.models.libraries import build_timm, load_backbone, save_backbone
from fdkit.models.momentum import momentum_copy
from fdkit.models.vit import fix_position, sincos_position

NAME = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 20, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
SIZES = (12, 28)
"""Grids of 3 and 7 patches a side; the network's own has 5."""


def vit(**args: Any) -> Backbone:
    """In double precision, with positions large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_timm(NAME, {**ARGS, **args}).double().eval()
        for name, parameter in backbone.network.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.4)
    return backbone


def free(sizes: tuple[int, ...] = SIZES, **args: Any) -> Backbone:
    backbone = vit(**args)
    take_any_size(backbone, sizes)
    return backbone


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size)).double()


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def resampled_by_loops(table: Tensor, old: int, new: int, *, added: float) -> Tensor:
    """A row-major table (old * old, D) read at (i + 0.5) * old / (new + added) - 0.5, edges repeated."""
    grid = table.reshape(old, old, -1)
    result = torch.zeros(new, new, grid.shape[-1], dtype=table.dtype)
    for row in range(new):
        for column in range(new):
            y, x = ((i + 0.5) * old / (new + added) - 0.5 for i in (row, column))
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    at = grid[min(max(i, 0), old - 1), min(max(j, 0), old - 1)]
                    result[row, column] += cubic(y - i) * cubic(x - j) * at
    return result.flatten(0, 1)


# --- the table of positions


@pytest.mark.parametrize("new", [2, 3, 7, 10])
def test_a_table_is_resampled_as_the_loops_say(new: int) -> None:
    table = torch.randn(1, 25, 3, dtype=torch.float64)
    expected = resampled_by_loops(table[0], 5, new, added=0.1)
    torch.testing.assert_close(resample_by_scale(table, (5, 5), (new, new))[0], expected)
    other = resampled_by_loops(table[0], 5, new, added=0.0)  # to the size itself, as MAE does
    assert (expected - other).abs().max() > 1e-3
    antialiased = F.interpolate(
        table.view(1, 5, 5, 3).permute(0, 3, 1, 2), (new, new), mode="bicubic", antialias=True
    )
    assert (expected - antialiased[0].flatten(1).T).abs().max() > 1e-3  # as timm does


def test_a_table_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(15.0).view(1, 15, 1) // 5
    resampled = resample_by_scale(rows, (3, 5), (4, 7)).view(4, 7)
    torch.testing.assert_close(resampled, resampled[:, :1].expand(4, 7))
    assert (resampled[1:, 0] > resampled[:-1, 0]).all()


def test_a_table_at_its_own_grid_is_the_same_tensor() -> None:
    table = torch.randn(1, 25, 3)
    assert resample_by_scale(table, (5, 5), (5, 5)) is table


def test_a_table_of_half_precision_is_resampled_in_float32() -> None:
    table = torch.randn(1, 25, 3).bfloat16()
    expected = resample_by_scale(table.float(), (5, 5), (3, 3)).bfloat16()
    assert torch.equal(resample_by_scale(table, (5, 5), (3, 3)), expected)


# --- the network


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "position without class token": {"no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no positions": {"pos_embed": "none"},
    "convolutional stem": {"img_size": 80, "patch_size": 16, "stem": "conv"},
    "drop path": {"drop_path_rate": 0.3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [3, 7])
def test_another_size_gives_what_a_network_of_that_size_would(form: str, grid: int) -> None:
    args = {**ARGS, **FORMS[form]}
    size = grid * args["patch_size"]
    backbone, expected = free((size,), **FORMS[form]), vit(**{**FORMS[form], "img_size": size})
    state = backbone.network.state_dict()
    if "pos_embed" in state:
        num_prefix = state["pos_embed"].shape[1] - 25
        prefix, table = state["pos_embed"].split([num_prefix, 25], dim=1)
        other = resampled_by_loops(table[0], 5, grid, added=0.1)[None]
        state["pos_embed"] = torch.cat([prefix, other], dim=1)
    expected.network.load_state_dict(state)
    result, wanted = backbone(images(size)), expected(images(size))
    assert result.grid == (grid, grid)
    torch.testing.assert_close(result.all(), wanted.all())
    pooling = "patches" if form == "no class token" else "cls"
    torch.testing.assert_close(backbone.pooled(images(size), pooling), expected.pooled(images(size), pooling))


@pytest.mark.parametrize("form", FORMS)
def test_its_own_size_gives_what_it_always_gave(form: str) -> None:
    args = FORMS[form]
    size = {**ARGS, **args}["img_size"]
    before, after = vit(**args), free((size * 2,), **args)
    assert torch.equal(before(images(size)).all(), after(images(size)).all())


def test_only_named_sizes_are_left_as_they_are() -> None:
    backbone = free((12,))
    assert backbone(images(12)).grid == (3, 3)
    assert backbone(images(28)).grid == (5, 5)


def test_the_short_way_to_the_class_token_stays_open() -> None:
    backbone = free()
    assert has_fast_class_token(backbone.network)
    torch.testing.assert_close(backbone.pooled(images(12), "cls"), backbone(images(12)).prefix[:, 0])


def test_layers_can_be_read_at_another_size() -> None:
    backbone = free()
    last = layer_tokens(backbone.network, backbone._network_input(images(12)), [1], norm=True)[0]
    torch.testing.assert_close(last.all(), backbone(images(12)).all())


def test_the_gradient_reaches_every_position_through_the_resampling() -> None:
    backbone = free()
    backbone(images(28)).patches[..., 0].sum().backward()
    gradient = backbone.network.pos_embed.grad
    assert (gradient[:, 1:].abs().amax(dim=2) > 0).all()
    step = 1e-6 * torch.randn(gradient.shape, dtype=torch.float64)
    before = backbone(images(28)).patches[..., 0].sum()
    with torch.no_grad():
        backbone.network.pos_embed += step
    change = backbone(images(28)).patches[..., 0].sum() - before
    torch.testing.assert_close(change, (gradient * step).sum(), rtol=1e-4, atol=1e-12)


# --- fixed positions


@pytest.mark.parametrize("first", ["row", "column"])
def test_fixed_sines_and_cosines_are_made_anew(first: Any) -> None:
    backbone = vit()
    fix_position(backbone.network, first=first)
    take_any_size(backbone, SIZES)
    position = backbone.network._position(backbone.network.pos_embed[:, 1:], (5, 5), (3, 3))
    torch.testing.assert_close(position[0], sincos_position((3, 3), 8, first=first).double())
    expected = vit(img_size=12)
    state = {key: value for key, value in backbone.network.state_dict().items() if key != "pos_embed"}
    expected.network.load_state_dict(state, strict=False)
    fix_position(expected.network, first=first)
    torch.testing.assert_close(backbone(images(12)).all(), expected(images(12)).all())


def test_fixed_positions_are_those_loaded_after_the_network_was_built() -> None:
    backbone = vit()
    fix_position(backbone.network, first="row")
    take_any_size(backbone, SIZES)
    other = vit()
    fix_position(other.network, first="column")
    backbone.network.load_state_dict(other.network.state_dict())
    position = backbone.network._position(backbone.network.pos_embed[:, 1:], (5, 5), (3, 3))
    torch.testing.assert_close(position[0], sincos_position((3, 3), 8, first="column").double())


def test_another_fixed_table_is_resampled() -> None:
    backbone = vit()
    backbone.network.pos_embed.requires_grad_(False)
    take_any_size(backbone, SIZES)
    table = backbone.network.pos_embed[:, 1:]
    expected = resampled_by_loops(table[0], 5, 3, added=0.1)
    torch.testing.assert_close(backbone.network._position(table, (5, 5), (3, 3))[0], expected)


def test_fixed_positions_first_met_in_evaluation_serve_training() -> None:
    backbone = vit()
    fix_position(backbone.network, first="row")
    take_any_size(backbone, SIZES)
    with torch.inference_mode():
        backbone(images(12))
    backbone(images(12)).patches[..., 0].sum().backward()
    assert backbone.network.pos_embed.grad is None
    assert backbone.network.patch_embed.proj.weight.grad is not None


# --- copies and files


def test_a_momentum_copy_resamples_its_own_learned_table() -> None:
    backbone = free()
    teacher = momentum_copy(backbone)
    with torch.no_grad():
        backbone.network.pos_embed.zero_()
    assert type(teacher.network) is AnySizeViT
    assert teacher.sizes == SIZES
    first = teacher(images(12)).all()
    with torch.no_grad():
        teacher.network.pos_embed.mul_(2)  # as it moves in training
    assert (teacher(images(12)).all() - first).abs().max() > 1e-3
    torch.testing.assert_close(teacher(images(12)).all(), copy.deepcopy(teacher)(images(12)).all())


def test_the_export_is_a_plain_timm_model(tmp_path: Path) -> None:
    backbone = free()
    save_backbone(backbone, tmp_path)
    loaded = load_backbone(tmp_path)
    assert type(loaded.network) is timm.models.VisionTransformer
    torch.testing.assert_close(
        loaded(images(20)).all(), backbone.float()(images(20)).all(), rtol=1e-4, atol=1e-5
    )
    assert loaded.network.state_dict().keys() == vit().network.state_dict().keys()


# --- other networks


def test_a_convolutional_network_takes_any_size_as_it_is() -> None:
    backbone = build_timm("resnet10t", {"img_size": 64}).eval()
    network = type(backbone.network)
    take_any_size(backbone, (96,))
    assert type(backbone.network) is network
    assert backbone(images(96).float()).grid == (3, 3)


def test_a_swin_takes_other_sizes() -> None:
    args = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
    }
    backbone = build_timm("swin_tiny_patch4_window7_224", args).eval()
    take_any_size(backbone, (24,))
    assert backbone(images(24).float()).grid == (6, 6)


def test_a_transformer_of_one_size_is_refused() -> None:
    backbone = build_timm(
        "beit_base_patch16_224", {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2}
    )
    with pytest.raises(ConfigError, match="Beit takes images of one size alone, not of 16 pixels as well"):
        take_any_size(backbone, (16,))


@pytest.mark.parametrize(
    ("args", "patch"), [({}, 4), ({"img_size": 32, "patch_size": 16, "stem": "conv"}, 16)]
)
def test_sizes_of_no_whole_number_of_patches_are_refused(args: dict[str, Any], patch: int) -> None:
    rule = f"image size 2 and 18 is no whole number of patches: the network reads {patch}x{patch} pixels each"
    with pytest.raises(ConfigError, match=rule) as caught:
        take_any_size(vit(**args), (48, 2, 18))
    assert caught.value.hint == f"use a multiple of {patch}"


def test_timms_own_way_to_other_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match="dynamic_img_size resamples positions in timm's way"):
        take_any_size(vit(dynamic_img_size=True), (12,))
