"""Any other plain ViT in timm's names, and the golden files of DINO and MAE through their layouts."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from official_vits import (
    IMAGES,
    LARGER_IMAGES,
    Loaded,
    assert_holds_whole,
    fixed_table,
    hollow,
    linear_shapes,
    load,
    normalised,
    seeded,
    vit_shapes,
)
from torch import Tensor, nn

from fdkit.errors import WeightsError
from fdkit.teachers.official._layout import Change
from fdkit.teachers.official._plain_vit import STANDARD_HEADS, measure, ratio_for
from fdkit.teachers.official.vit import LAYOUTS
from tests.official_files import read

BASE = {"embed_dim": 192, "depth": 2, "num_heads": 3, "img_size": 64, "patch_size": 16, "num_classes": 0}
ARGS: list[dict[str, Any]] = [
    {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
    {"reg_tokens": 3},
    {"class_token": False, "global_pool": "avg", "fc_norm": False},
    {"class_token": False, "global_pool": "avg", "fc_norm": True},
    {"mlp_ratio": 2.7, "qkv_bias": False, "depth": 3},
    {"no_embed_class": True, "num_classes": 10},
    {"init_values": 0.1, "embed_dim": 128, "num_heads": 2},
    {"num_classes": 10},
]


def timm_vit(**args: Any) -> nn.Module:
    """timm's own, with weights that are not those of its initialisation."""
    network = timm.create_model("vit_tiny_patch16_224", **{**BASE, **args}).eval()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(seeded(shapes))
    return network


@pytest.mark.parametrize("args", ARGS)
def test_a_vit_in_timms_names_is_timms_own(args: dict[str, Any]) -> None:
    source = timm_vit(**args)
    loaded = load(source.state_dict())
    assert loaded.reading.layout == "vit"
    expected = source.fc_norm(source.forward_features(normalised(IMAGES)))
    tokens = loaded.tokens(IMAGES)
    assert (tokens - expected[:, -tokens.shape[1] :]).abs().max() < 1e-4
    assert {change.key for change in loaded.reading.audit if change.became is None} == {
        key for key in source.state_dict() if key.startswith("head.")
    }


def test_positions_for_another_size_are_resampled_as_timm_does() -> None:
    source = timm_vit(init_values=0.1)
    tokens = load(source.state_dict(), image_size=96).tokens(LARGER_IMAGES)
    source.set_input_size((96, 96))
    assert (tokens - source.forward_features(normalised(LARGER_IMAGES))).abs().max() < 1e-4


def test_the_vit_papers_own_classes_tell_its_statistics() -> None:
    shapes = vit_shapes(192) | linear_shapes("pre_logits.fc", 192, 192)
    loaded = load(seeded(shapes | linear_shapes("head", 21843, 192)))
    assert loaded.reading.network.mean == loaded.reading.network.std == (0.5, 0.5, 0.5)
    reason = "layer between the class token and the classifier"
    assert Change("pre_logits.fc.weight", None, reason) in loaded.reading.audit
    assert load(seeded(shapes | linear_shapes("head", 10, 192))).reading.network.mean[0] == 0.485


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_so400m_patch14_siglip_224"]
)
def test_standard_heads_are_timms(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    assert STANDARD_HEADS[network.embed_dim] == network.blocks[0].attn.num_heads


def test_a_width_no_standard_knows_is_refused() -> None:
    with pytest.raises(WeightsError, match="no standard says how many heads a ViT of width 100 has"):
        load(seeded(vit_shapes(100) | linear_shapes("head", 10, 100)))


@pytest.mark.parametrize(("hidden", "width"), [(4304, 1152), (768, 192), (519, 192), (3, 7), (6144, 1408)])
def test_the_mlp_ratio_gives_timm_the_very_number_of_rows(hidden: int, width: int) -> None:
    assert int(width * ratio_for(hidden, width)) == hidden


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
        "vit_giant_patch14_dinov2",
        "vit_small_patch16_18x2_224",
        "beit_base_patch16_224",
        "swin_tiny_patch4_window7_224",
        "resnet18",
    ],
)
def test_what_is_no_plain_vit_is_not_taken_for_one(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    real = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    assert read(real, LAYOUTS, source="x.pth") is None


def test_patches_and_grids_that_are_not_square_are_not_guessed() -> None:
    state = seeded(vit_shapes(192))
    assert read(state | {"pos_embed": torch.zeros(1, 23, 192)}, LAYOUTS, source="x") is None
    assert measure(state | {"patch_embed.proj.weight": torch.zeros(192, 3, 16, 8)}) is None


def test_a_tensor_no_rule_names_remains_for_the_loader_to_refuse() -> None:
    for extra in ({"surprise.weight": torch.zeros(2)}, {"blocks.0.adapter.weight": torch.zeros(2)}):
        reading = read(seeded(vit_shapes(192)) | extra, LAYOUTS, source="x")
        assert reading is not None
        assert extra.keys() <= reading.state.keys()


def test_a_real_size_augreg_file_is_held_whole() -> None:
    shapes = vit_shapes(1024, 24, rows=577) | linear_shapes("head", 21843, 1024)
    assert_holds_whole(hollow(shapes), "vit")


def sampled(loaded: Loaded, images: Tensor) -> Tensor:
    return loaded.tokens(images)[:, ::7]


def test_dinos_golden_tokens_and_attention_come_out(golden: Callable, golden_images: Tensor) -> None:
    values = golden("dino_vits", 5)
    loaded = load(values.state)
    assert loaded.reading.layout == "dino"
    attention = loaded.backbone.network.blocks[-1].attn
    attention.fused_attn = False
    seen: list[Tensor] = []
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert (sampled(loaded, golden_images) - values["tokens"]).abs().max() < 2e-4
    assert (seen[0][:, :, 0, ::7] - values["last_attn_row"]).abs().max() < 2e-4
    as_mocov3 = load({"state_dict": {f"module.base_encoder.{k}": v for k, v in values.state.items()}})
    assert (sampled(as_mocov3, golden_images) - values["tokens"]).abs().max() > 1e-2


@pytest.mark.slow
def test_maes_golden_tokens_come_out_of_the_whole_file(golden: Callable, golden_images: Tensor) -> None:
    values, images = golden("mae_vitb", 7), golden_images[:1]
    tables = {"pos_embed": fixed_table(14, 768, "cr"), "decoder_pos_embed": fixed_table(14, 512, "cr")}
    loaded = load({"model": values.state | tables})
    assert loaded.reading.layout == "mae"
    assert (sampled(loaded, images) - values["tokens"][:1]).abs().max() < 2e-4
    loaded.backbone.network.pos_embed.data = fixed_table(14, 768, "rc")
    assert (sampled(loaded, images) - values["tokens"][:1]).abs().max() > 1e-2
    loaded.backbone.network.pos_embed.data = tables["pos_embed"]
    loaded.backbone.network.norm = nn.Identity()
    assert (sampled(loaded, images) - values["tokens"][:1]).abs().max() > 1e-2
