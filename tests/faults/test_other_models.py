"""Weights of another model than they are said to be: of other shapes, or of the same ones under other arithmetic."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from faults.jobs import STUDENT
from faults.kills import wait
from faults.processes import QUICK, photos, start_rank

from fdkit.errors import WeightsError
from fdkit.teachers.loading import load_teacher

SMALL = {"depth": 2, "img_size": 32, "num_classes": 0}


def vit(**changes: int) -> dict[str, torch.Tensor]:
    return timm.create_model("vit_small_patch16_224", **{**SMALL, **changes}).state_dict()


def refusal(path: Path, content: object, **options: str) -> WeightsError:
    torch.save(content, path)
    with pytest.raises(WeightsError) as raised:
        load_teacher(str(path), **options)  # type: ignore[arg-type]
    assert raised.value.exit_code == 4
    assert str(path) in raised.value.message
    return raised.value


def test_of_what_is_missing_or_too_much_the_first_five_are_named(tmp_path: Path) -> None:
    state = vit()
    rest = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    error = refusal(tmp_path / "few.pth", rest, architecture="vit_small_patch16_224")
    assert "blocks.1.attn.proj.bias, blocks.1.attn.proj.weight, blocks.1.attn.qkv.bias" in error.message
    assert error.message.count("blocks.1.") == 5
    assert "1 deep" in error.hint, "what the file is"
    more = state | {f"adapter{number}.weight": torch.zeros(2) for number in range(9)}
    error = refusal(tmp_path / "many.pth", more, architecture="vit_small_patch16_224")
    assert "unexpected 9: adapter0.weight, adapter1.weight" in error.message
    assert error.message.count("adapter") == 5
    wide = vit(embed_dim=192, num_heads=3)
    error = refusal(tmp_path / "narrow.pth", wide, architecture="dino_vits")
    assert "192" in error.message + error.hint


@pytest.mark.slow
def test_equal_shapes_with_other_heads_keep_their_own_heads(tmp_path: Path) -> None:
    """MoCo v3's ViT-S has 12 heads where timm's has 6: the tensors fit both, and only one computes what was trained."""
    moco = {
        f"module.base_encoder.{name}": value
        for name, value in vit(depth=12, img_size=224, num_heads=12).items()
    }
    error = refusal(tmp_path / "moco.pth", {"state_dict": moco}, architecture="dino_vits")
    assert "is not dino_vits" in error.message
    named = load_teacher(str(tmp_path / "moco.pth"), architecture="vit_small_patch16_224")
    assert named.backbone.recipe["model_args"]["num_heads"] == 12


@pytest.mark.slow
def test_a_student_is_not_read_by_another_recipe(tmp_path: Path) -> None:
    """student.json with other heads fits the same tensors; run.json knows what was written."""
    assert hasattr(os, "fork")
    photos(tmp_path / "photos")
    run = tmp_path / "run"
    words = [
        "distill",
        "--teacher",
        "demo",
        "--data",
        str(tmp_path / "photos"),
        *STUDENT,
        *QUICK,
        "--output",
        str(run),
    ]
    assert wait(start_rank(words, tmp_path, tmp_path / "log", {}), 60) == 0
    assert load_teacher(str(run)).sha256
    recipe = json.loads((run / "student.json").read_text())
    recipe["model_args"]["num_heads"] *= 2
    (run / "student.json").write_text(json.dumps(recipe))
    with pytest.raises(WeightsError, match=r"student\.json"):
        load_teacher(str(run))
