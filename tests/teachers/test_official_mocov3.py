"""MoCo v3 and ExtreMA: seeded files in the official layout against their forward written out."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_vits import (
    IMAGES,
    LARGER_IMAGES,
    Shapes,
    State,
    assert_holds_whole,
    fixed_table,
    hollow,
    layer_norm,
    linear_shapes,
    load,
    normalised,
    patches_of,
    prefixed,
    run_blocks,
    seeded,
    vit_shapes,
    vit_tokens,
)
from torch import Tensor

from fdkit.teachers.official._layout import Change


def mlp_shapes(name: str, widths: tuple[int, ...]) -> Shapes:
    """MoCo v3's heads: matrices without bias, BatchNorm between, and a last one without weights."""
    shapes: Shapes = {}
    for index, (before, after) in enumerate(pairwise(widths)):
        shapes[f"{name}.{3 * index}.weight"] = (after, before)
        norm = f"{name}.{3 * index + 1}"
        shapes |= linear_shapes(norm, after) if index < len(widths) - 2 else {}
        shapes |= {f"{norm}.{leaf}": (after,) for leaf in ("running_mean", "running_var")}
        shapes |= {f"{norm}.num_batches_tracked": ()}
    return shapes


def stem_shapes(width: int) -> Shapes:
    """The convolutions of vits.py: 3x3 at 0, 3, 6 and 9, each with its BatchNorm, and 1x1 at 12."""
    shapes: Shapes = {}
    channels = (3, width // 8, width // 4, width // 2, width)
    for index, (before, after) in enumerate(pairwise(channels)):
        shapes[f"patch_embed.proj.{3 * index}.weight"] = (after, before, 3, 3)
        norm = f"patch_embed.proj.{3 * index + 1}"
        shapes |= linear_shapes(norm, after)
        shapes |= {f"{norm}.{leaf}": (after,) for leaf in ("running_mean", "running_var")}
        shapes |= {f"{norm}.num_batches_tracked": ()}
    return shapes | linear_shapes("patch_embed.proj.12", width, width, 1, 1)


def encoder_shapes(
    width: int, depth: int = 2, *, rows: int = 17, conv: bool = False, hidden: int = 32
) -> Shapes:
    shapes = vit_shapes(width, depth, rows=rows) | mlp_shapes("head", (width, hidden, hidden, 8))
    if conv:
        plain = linear_shapes("patch_embed.proj", width, 3, 16, 16)
        shapes = {name: shape for name, shape in shapes.items() if name not in plain} | stem_shapes(width)
    return shapes


def encoder(width: int, *, conv: bool = False) -> State:
    state = seeded(encoder_shapes(width, conv=conv))
    return state | {"pos_embed": fixed_table(4, width, "rc")}


def checkpoint(width: int = 384, *, conv: bool = False) -> dict[str, Any]:
    """What main_moco.py saves."""
    base = encoder(width, conv=conv)
    momentum = {
        name: value if name == "pos_embed" else value * 0.9
        for name, value in encoder(width, conv=conv).items()
    }
    state = prefixed(base, "base_encoder.") | prefixed(momentum, "momentum_encoder.")
    state |= seeded(mlp_shapes("predictor", (8, 32, 8)))
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"params": list(range(90))}]}
    return {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": prefixed(state, "module."),
        "optimizer": optimizer,
        "scaler": {"scale": 2.0},
    }


def stem_patches(state: State, images: Tensor) -> Tensor:
    x = normalised(images)
    for index in (0, 3, 6, 9):
        at = f"patch_embed.proj.{index + 1}."
        x = F.conv2d(x, state[f"patch_embed.proj.{index}.weight"], stride=2, padding=1)
        x = F.batch_norm(
            x, state[at + "running_mean"], state[at + "running_var"], state[at + "weight"], state[at + "bias"]
        ).relu()
    x = F.conv2d(x, state["patch_embed.proj.12.weight"], state["patch_embed.proj.12.bias"])
    return x.flatten(2).transpose(1, 2)


def test_tokens_of_the_small_model_are_the_official_ones_with_12_heads() -> None:
    loaded = load(checkpoint())
    assert loaded.reading.layout == "mocov3"
    tokens, state = loaded.tokens(IMAGES), encoder(384)
    assert loaded.reading.network.model_args["num_heads"] == 12
    assert loaded.reading.network.assumed_args == {}
    assert (tokens - vit_tokens(state, IMAGES, 12)).abs().max() < 1e-4
    transposed = fixed_table(4, 384, "cr")
    assert (tokens - vit_tokens(state, IMAGES, 6)).abs().max() > 1e-2
    assert (tokens - vit_tokens(state, IMAGES, 12, positions=transposed)).abs().max() > 1e-2
    assert (tokens - vit_tokens(state, IMAGES, 12, norm=None)).abs().max() > 1e-2
    without = run_blocks(patches_of(state, normalised(IMAGES)) + state["pos_embed"][:, 1:], state, 12)
    assert (tokens[:, 1:] - layer_norm(without, state, "norm")).abs().max() > 1e-2


def test_the_momentum_encoder_is_read_when_asked_for() -> None:
    loaded = load(checkpoint(), checkpoint_key="momentum_encoder")
    state = {name: value if name == "pos_embed" else value * 0.9 for name, value in encoder(384).items()}
    assert (loaded.tokens(IMAGES) - vit_tokens(state, IMAGES, 12)).abs().max() < 1e-4
    assert (loaded.tokens(IMAGES) - vit_tokens(encoder(384), IMAGES, 12)).abs().max() > 1e-2


def test_heads_and_the_other_networks_are_left_out_by_name() -> None:
    dropped = [change for change in load(checkpoint()).reading.audit if change.became is None]
    starts = {change.key.split(".")[0] for change in dropped}
    assert starts == {"base_encoder", "momentum_encoder", "predictor"}
    assert all(
        change.key.startswith("base_encoder.head.") for change in dropped if "projector" in change.reason
    )
    assert Change("predictor.0.weight", None, "predictor, a part of pretraining alone") in dropped


def test_tokens_behind_a_convolutional_stem_are_the_official_ones() -> None:
    state = encoder(384, conv=True)
    loaded = load(checkpoint(conv=True))
    x = (
        torch.cat([state["cls_token"].expand(2, -1, -1), stem_patches(state, IMAGES)], dim=1)
        + state["pos_embed"]
    )
    expected = layer_norm(run_blocks(x, state, 12), state, "norm")
    assert (loaded.tokens(IMAGES) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("width", [384, 768])
def test_an_encoder_alone_is_known_by_its_positions(width: int) -> None:
    state = {name: value for name, value in encoder(width).items() if not name.startswith("head.")}
    loaded = load({"model": state})
    assert (loaded.reading.layout, loaded.reading.network.model_args["num_heads"]) == ("mocov3", 12)
    other = load({"model": state | {"pos_embed": fixed_table(4, width, "cr")}})
    assert other.reading.layout == "mae"


def test_at_another_size_the_positions_are_made_anew() -> None:
    state = encoder(384)
    tokens = load(checkpoint(), image_size=96).tokens(LARGER_IMAGES)
    expected = vit_tokens(state, LARGER_IMAGES, 12, positions=fixed_table(6, 384, "rc"))
    assert (tokens - expected).abs().max() < 1e-4
    resampled = F.interpolate(state["pos_embed"][:, 1:].mT.unflatten(-1, (4, 4)), size=6, mode="bicubic")
    wrong = torch.cat([torch.zeros(1, 1, 384), resampled.flatten(2).mT], dim=1)
    assert (tokens - vit_tokens(state, LARGER_IMAGES, 12, positions=wrong)).abs().max() > 1e-2


def test_positions_that_are_not_the_fixed_table_take_no_other_size() -> None:
    content = checkpoint()
    content["state_dict"]["module.base_encoder.pos_embed"] += 0.1
    assert load(content).reading.network.resample_positions is None


@pytest.mark.parametrize(
    ("width", "depth", "conv"), [(384, 12, False), (768, 12, False), (384, 11, True), (768, 11, True)]
)
def test_files_of_real_size_are_held_whole(width: int, depth: int, conv: bool) -> None:
    shapes = encoder_shapes(width, depth, rows=197, conv=conv, hidden=4096)
    state = hollow(prefixed(shapes, "module.base_encoder.") | prefixed(shapes, "module.momentum_encoder."))
    reading = assert_holds_whole({"state_dict": state}, "mocov3")
    assert reading.network.model_args["img_size"] == 224
    assert reading.network.model_args["depth"] == depth


def extrema_shapes(width: int, depth: int = 2, *, rows: int = 16, hidden: int = 32) -> Shapes:
    shapes = vit_shapes(width, depth, rows=rows)
    for index in range(2):
        at = f"blocks_token.{index}."
        shapes |= {f"{at}gamma_{i}": (width,) for i in (1, 2)}
        for part in ("norm1", "norm2"):
            shapes |= linear_shapes(at + part, width)
        for part in ("q", "k", "v", "proj"):
            shapes |= linear_shapes(f"{at}attn.{part}", width, width)
        shapes |= linear_shapes(f"{at}mlp.fc1", 4 * width, width) | linear_shapes(
            f"{at}mlp.fc2", width, 4 * width
        )
    for index, (before, after) in enumerate(((width, hidden), (hidden, hidden), (hidden, 8))):
        shapes |= linear_shapes(f"head.{3 * index}", after, before)
        shapes |= linear_shapes(f"head.{3 * index + 1}", after) if index < 2 else {}
    return shapes


def extrema_checkpoint() -> dict[str, Any]:
    """What ExtreMA's main.py saves; the two encoders differ."""
    state = seeded(extrema_shapes(192)) | {"pos_embed": fixed_table(4, 192, "cr", num_prefix=0)}
    base = {name: value if name == "pos_embed" else value * 0.9 for name, value in state.items()}
    both = prefixed(base, "base_encoder.") | prefixed(state, "momentum_encoder.")
    both |= seeded(linear_shapes("predictor.0", 32, 8) | linear_shapes("predictor.3", 8, 32))
    return {"epoch": 300, "state_dict": prefixed(both, "module."), "scaler": {"scale": 1.0}}


def test_extrema_gives_the_normed_patches_its_class_attention_reads() -> None:
    loaded = load(extrema_checkpoint())
    assert loaded.reading.layout == "extrema"
    state = seeded(extrema_shapes(192)) | {"pos_embed": fixed_table(4, 192, "cr", num_prefix=0)}
    raw = run_blocks(patches_of(state, normalised(IMAGES)) + state["pos_embed"], state, 3)
    tokens = loaded.tokens(IMAGES)
    assert tokens.shape == (2, 16, 192)
    assert (tokens - layer_norm(raw, state, "norm")).abs().max() < 1e-4
    assert (tokens - raw).abs().max() > 1e-2
    assert (
        load(extrema_checkpoint(), checkpoint_key="base_encoder").tokens(IMAGES) - tokens
    ).abs().max() > 1e-2
    reasons = {change.key: change.reason for change in loaded.reading.audit if change.became is None}
    assert "read the patch tokens" in reasons["momentum_encoder.blocks_token.1.attn.q.weight"]


def test_extremas_file_of_real_size_is_held_whole() -> None:
    shapes = extrema_shapes(768, 12, rows=196, hidden=4096)
    assert_holds_whole({"state_dict": hollow(prefixed(shapes, "module.momentum_encoder."))}, "extrema")
