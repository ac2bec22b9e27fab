"""DeiT, distilled DeiT and DeiT III: seeded files in the official layout against their forward written out."""

import pytest
import torch
import torch.nn.functional as F
from official_vits import (
    IMAGES,
    LARGER_IMAGES,
    Shapes,
    assert_holds_whole,
    hollow,
    layer_norm,
    linear_shapes,
    load,
    normalised,
    patches_of,
    run_blocks,
    seeded,
    vit_shapes,
    vit_tokens,
)

from fdkit.models.tokens import timm_tokens
from fdkit.teachers.official._layout import Change


def deit_shapes(width: int, depth: int = 2, *, rows: int = 17, patch: int = 16) -> Shapes:
    return vit_shapes(width, depth, rows=rows, patch=patch) | linear_shapes("head", 1000, width)


def distilled_shapes(width: int, depth: int = 2, *, rows: int = 18) -> Shapes:
    shapes = deit_shapes(width, depth, rows=rows) | {"dist_token": (1, 1, width)}
    return shapes | linear_shapes("head_dist", 1000, width)


def deit3_shapes(width: int, depth: int = 2, *, rows: int = 16, patch: int = 16) -> Shapes:
    shapes = deit_shapes(width, depth, rows=rows, patch=patch)
    return shapes | {f"blocks.{index}.gamma_{i}": (width,) for index in range(depth) for i in (1, 2)}


def test_tokens_of_deit_are_the_official_ones() -> None:
    state = seeded(deit_shapes(384))
    loaded = load({"model": state})
    assert loaded.reading.layout == "deit"
    assert (loaded.tokens(IMAGES) - vit_tokens(state, IMAGES, 6)).abs().max() < 1e-4
    assert (loaded.tokens(IMAGES) - vit_tokens(state, IMAGES, 12)).abs().max() > 1e-2
    assert loaded.reading.network.assumed_args == {"num_heads": 6}
    assert loaded.reading.network.assumption.startswith("6 heads, the standard for width 384")
    assert Change("head.bias", None, "classifier") in loaded.reading.audit


def test_tokens_of_a_distilled_deit_are_the_official_ones() -> None:
    state = seeded(distilled_shapes(192))
    loaded = load({"model": state})
    assert loaded.reading.layout == "deit_distilled"
    tokens = [state[name].expand(2, -1, -1) for name in ("cls_token", "dist_token")]
    x = torch.cat([*tokens, patches_of(state, normalised(IMAGES))], dim=1) + state["pos_embed"]
    expected = layer_norm(run_blocks(x, state, 3), state, "norm")
    assert (loaded.tokens(IMAGES) - expected).abs().max() < 1e-4
    assert timm_tokens(loaded.backbone.network, IMAGES).prefix.shape == (2, 2, 192)
    swapped = torch.cat([tokens[1], tokens[0], x[:, 2:]], dim=1)
    assert (expected - layer_norm(run_blocks(swapped, state, 3), state, "norm")).abs().max() > 1e-2


def test_tokens_of_deit3_are_the_official_ones() -> None:
    state = seeded(deit3_shapes(192))
    loaded = load({"model": state})
    assert loaded.reading.layout == "deit3"
    patches = patches_of(state, normalised(IMAGES)) + state["pos_embed"]
    x = torch.cat([state["cls_token"].expand(2, -1, -1), patches], dim=1)
    tokens = loaded.tokens(IMAGES)
    assert (tokens - layer_norm(run_blocks(x, state, 3), state, "norm")).abs().max() < 1e-4
    unscaled = {name: value for name, value in state.items() if ".gamma_" not in name}
    assert (tokens - layer_norm(run_blocks(x, unscaled, 3), state, "norm")).abs().max() > 1e-2


@pytest.mark.parametrize("size", [6, 3])
def test_positions_for_another_size_are_resampled_as_in_its_fine_tuning_code(size: int) -> None:
    state = seeded(distilled_shapes(192))
    images = LARGER_IMAGES[:, :, : 16 * size, : 16 * size]
    tokens = load({"model": state}, image_size=16 * size).tokens(images)
    rows = state["pos_embed"][0, 2:].T.reshape(1, 192, 4, 4)
    resized = F.interpolate(rows, size=(size, size), mode="bicubic", align_corners=False)
    positions = torch.cat([state["pos_embed"][:, :2], resized.flatten(2).mT], dim=1)
    prefix = [state[name].expand(2, -1, -1) for name in ("cls_token", "dist_token")]
    x = torch.cat([*prefix, patches_of(state, normalised(images))], dim=1) + positions
    assert (tokens - layer_norm(run_blocks(x, state, 3), state, "norm")).abs().max() < 1e-4


def test_files_of_real_size_are_held_whole() -> None:
    reading = assert_holds_whole({"model": hollow(deit_shapes(768, 12, rows=577))}, "deit")
    assert reading.network.model_args["img_size"] == 384
    assert_holds_whole({"model": hollow(distilled_shapes(384, 12, rows=198))}, "deit_distilled")
    reading = assert_holds_whole({"model": hollow(deit3_shapes(512, 12, rows=196))}, "deit3")
    assert reading.network.assumed_args == {"num_heads": 8}
    assert_holds_whole({"model": hollow(deit3_shapes(1280, 32, rows=256, patch=14))}, "deit3")
