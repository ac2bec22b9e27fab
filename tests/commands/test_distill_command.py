import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fdkit.commands.distill import distill
from fdkit.errors import ConfigError

TINY: dict[str, Any] = {
    "teacher": "timm:vit_tiny_patch16_224",
    "data": "digits",
    "pretrained": False,
    "image_size": 32,
    "views": {"image_size": 32},
    "train": {"batch_size": 8, "epochs": 0.012},
    "optim": {"warmup_epochs": 0.006},
    "loader": {"workers": 0},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the default choices."""
    return distill(**TINY, student={"depth": 2}, output=tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "choice",
    [
        {"distillation": {"target": "pooled"}},
        {"distillation": {"target": "logits"}},
        {"distillation": {"whitening": "none"}},
        {"distillation": {"whitening": "l2"}},
        {"distillation": {"whitening": "batch"}},
        {"distillation": {"teacher_drop_path": 0.1}},
        {"student": {"position": "rpb", "depth": 2}},
        {"student": {"position": "absolute", "depth": 2}},
        {"student": {"depth": 2, "drop_path": 0.0, "width": 96, "num_heads": 3}},
        {"student": "resnet10t"},
    ],
    ids=str,
)
def test_every_design_choice_trains_and_differs_from_the_default(
    choice: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    varied = distill(**TINY, **({"student": {"depth": 2}} | choice), output=tmp_path / "varied")
    losses = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in (plain, varied)
    ]
    weights = [safetensors.torch.load_file(run / "student.safetensors") for run in (plain, varied)]
    changed = weights[0].keys() != weights[1].keys() or any(
        not weights[0][key].equal(weights[1][key]) for key in weights[0]
    )
    assert changed or losses[0] != losses[1]


def test_a_swin_teacher_makes_a_swin_v2_student(tmp_path: Path) -> None:
    values = TINY | {
        "teacher": "timm:swin_tiny_patch4_window7_224",
        "image_size": 64,
        "views": {"image_size": 64},
        "train": {"batch_size": 2, "epochs": 0.002},
    }
    folder = distill(**values, output=tmp_path / "run")
    assert "swinv2" in json.loads((folder / "student.json").read_text())["architecture"]


def test_teacher_and_student_may_have_different_patches_and_sizes(tmp_path: Path) -> None:
    values = TINY | {
        "teacher": "timm:vit_small_patch14_dinov2",
        "image_size": 42,
        "views": {"image_size": 64},
    }
    student = {"depth": 2, "width": 96, "num_heads": 3, "patch_size": 16}
    folder = distill(**values, student=student, output=tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    assert facts["state"] == "done"
    assert facts["attention"] == "matmul"
    assert facts["teacher"]["name"] == "timm:vit_small_patch14_dinov2"


def test_an_option_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resnet10t"):
        distill(**TINY, student={"name": "resnet10t", "position": "rpb"}, output=tmp_path / "run")


def test_logits_of_a_teacher_without_a_head_are_refused(plain: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in TINY.items() if key not in ("pretrained", "image_size", "teacher")}
    with pytest.raises(ConfigError, match="logits"):
        distill(teacher=plain, **values, distillation={"target": "logits"}, output=tmp_path / "run")
