from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.backbone import Preprocessing
from fdkit.models.libraries import build_open_clip, build_timm, save_backbone
from fdkit.models.vit import fix_position, sincos_position
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.official.bias_tables import geometric_bias

OWN = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 32, crop_ratio=1.0, interpolation="bilinear")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False}


def saved(folder: Path, name: str, args: dict[str, Any]) -> torch.nn.Module:
    backbone = build_timm(name, args, preprocessing=OWN)
    for key, parameter in backbone.network.named_parameters():
        if "table" in key or "pos_embed" in key:
            torch.nn.init.normal_(parameter, std=0.5)
    save_backbone(backbone, folder)
    return backbone


def test_the_preprocessing_is_the_runs_own(tmp_path: Path) -> None:
    backbone = saved(tmp_path, "beit_base_patch16_224", {**SMALL, **SHARED, "global_pool": "token"})
    teacher = load_teacher(str(tmp_path))
    assert teacher.backbone.preprocessing == OWN
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(teacher.encode(images).all(), backbone.eval()(images).all(), atol=1e-5)
    assert load_teacher(str(tmp_path / "student.safetensors")).backbone.preprocessing == OWN


def test_a_shared_bias_table_is_resampled_as_the_method_does(tmp_path: Path) -> None:
    backbone = saved(tmp_path, "beit_base_patch16_224", {**SMALL, **SHARED, "global_pool": "token"})
    table = backbone.network.rel_pos_bias.relative_position_bias_table.detach()
    teacher = load_teacher(str(tmp_path), image_size=48)
    found = teacher.backbone.network.rel_pos_bias.relative_position_bias_table
    assert found.shape == (11 * 11 + 3, 3)
    assert torch.allclose(found, geometric_bias(table, (4, 4), (6, 6)), atol=1e-6)
    assert torch.equal(found[-3:], table[-3:])
    assert teacher.encode(torch.rand(1, 3, 48, 48)).grid == (6, 6)


def test_absolute_positions_are_resampled_as_timm_does_and_fixed_ones_made_anew(tmp_path: Path) -> None:
    learned = saved(tmp_path / "learned", "vit_tiny_patch16_224", SMALL)
    found = load_teacher(str(tmp_path / "learned"), image_size=48).backbone.network.pos_embed
    expected = timm.layers.resample_abs_pos_embed(learned.network.pos_embed, [6, 6])
    assert torch.allclose(found, expected, atol=1e-6)
    fixed = build_timm("vit_tiny_patch16_224", SMALL, preprocessing=OWN)
    fix_position(fixed.network, first="row")
    save_backbone(fixed, tmp_path / "fixed")
    found = load_teacher(str(tmp_path / "fixed"), image_size=48).backbone.network.pos_embed
    assert torch.allclose(found[0, 1:], sincos_position((6, 6), 48, first="row"), atol=1e-6)


def test_what_takes_its_own_size_alone_says_so(tmp_path: Path) -> None:
    args = {
        "img_size": 64,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
    }
    backbone = build_timm("swinv2_tiny_window8_256", args, preprocessing=OWN._replace(image_size=64))
    save_backbone(backbone, tmp_path / "swin")
    assert load_teacher(str(tmp_path / "swin"), image_size=64).image_size == 64
    with pytest.raises(ConfigError, match="takes 64 pixels"):
        load_teacher(str(tmp_path / "swin"), image_size=128)
    save_backbone(build_open_clip("ViT-S-32", {"image_size": 64}), tmp_path / "clip")
    assert load_teacher(str(tmp_path / "clip")).image_size == 64
    with pytest.raises(ConfigError, match="takes 64 pixels"):
        load_teacher(str(tmp_path / "clip"), image_size=96)


def test_a_convolutional_student_keeps_its_image_size(tmp_path: Path) -> None:
    save_backbone(build_timm("convnext_atto", {"img_size": 64}), tmp_path)
    assert load_teacher(str(tmp_path)).image_size == 64
    assert load_teacher(str(tmp_path), image_size=96).image_size == 96


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", "vit_tiny_patch16_224", SMALL)
    saved(tmp_path / "b", "vit_tiny_patch16_224", {**SMALL, "depth": 3})
    (tmp_path / "b/student.safetensors").replace(tmp_path / "a/student.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected 12: blocks\.2"):
        load_teacher(str(tmp_path / "a"))
