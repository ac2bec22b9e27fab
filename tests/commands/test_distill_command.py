import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fdkit.commands._flags import parse_flags
from fdkit.commands.distill import DistillConfig, announce_terms, distill
from fdkit.config import parse_yaml, to_yaml, validate
from fdkit.errors import ConfigError, ResourceError
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.teachers.loading import load_teacher

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


# Several teachers


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of a ViT taught by non-commercial weights and of a wider one of unstated terms."""
    folders = []
    for name, width, patch in (("first", 24, 8), ("second", 36, 16)):
        args = {"embed_dim": width, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": patch}
        folders.append(tmp_path_factory.mktemp("teachers") / name)
        torch.manual_seed(width)
        save_backbone(build_timm("vit_tiny_patch16_224", args), folders[-1])
    taught = {"teacher": {"name": "mae_vitb", "license": "cc-by-nc-4.0", "is_noncommercial": True}}
    (folders[0] / "run.json").write_text(json.dumps(taught))
    return folders


SEVERAL: dict[str, Any] = {
    "data": "digits",
    "views": {"image_size": 32},
    "train": {
        "batch_size": 8,
        "epochs": 0.05,
        "log_every_steps": 1,
        "save_every_steps": 1,
        "keep_checkpoints": 20,
        "precision": "fp32",
    },
    "optim": {"warmup_epochs": 0.01},
    "loader": {"workers": 0},
    "distillation": {"teacher_weights": [2, 1], "teacher_dropping": 0.5},
}


@pytest.fixture(scope="module")
def taught_by_two(two_teachers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "run"
    return distill([str(path) for path in two_teachers], **SEVERAL, output=folder)


def _metrics(run: Path) -> list[dict[str, float]]:
    timings = {"images_per_second", "data_wait_ratio", "seconds"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


def test_several_teachers_make_one_student_like_the_first(
    taught_by_two: Path, two_teachers: list[Path]
) -> None:
    recipe = json.loads((taught_by_two / "student.json").read_text())
    assert (recipe["model_args"]["embed_dim"], recipe["model_args"]["patch_size"]) == (24, 8)
    last = _metrics(taught_by_two)[-1]
    for path in two_teachers:
        assert {f"loss/{path.name}", f"explained_variance/{path.name}"} <= last.keys()
    assert {"loss", "explained_variance"} <= last.keys()


def test_the_record_names_every_teacher_and_its_licence(
    taught_by_two: Path, two_teachers: list[Path]
) -> None:
    facts = json.loads((taught_by_two / "run.json").read_text())
    assert "teacher" not in facts
    assert [one["name"] for one in facts["teachers"]] == [str(path) for path in two_teachers]
    assert [one["license"] for one in facts["teachers"]] == ["cc-by-nc-4.0", "unstated"]
    assert [one["is_noncommercial"] for one in facts["teachers"]] == [True, False]
    assert facts["data"]["name"] == "digits"
    card = (taught_by_two / "MODEL_CARD.md").read_text()
    assert "## Teachers" in card
    assert all(f"| name | {path} |" in card for path in two_teachers)
    assert "the teachers' licences (cc-by-nc-4.0 AND unstated) may bind its use" in card
    assert f"**Non-commercial**: the weights of {two_teachers[0]} (cc-by-nc-4.0)" in card


def test_a_non_commercial_licence_travels_to_the_students_student(
    taught_by_two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = SEVERAL | {"distillation": {}, "train": SEVERAL["train"] | {"epochs": 0.005}}
    caplog.set_level(logging.INFO, logger="fdkit")
    folder = distill(taught_by_two, **values, output=tmp_path / "run")
    teacher = json.loads((folder / "run.json").read_text())["teacher"]
    assert (teacher["license"], teacher["is_noncommercial"]) == ("cc-by-nc-4.0 AND unstated", True)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    lines = [line for line in lines if "warmup" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"non-commercial: {taught_by_two} (cc-by-nc-4.0 AND unstated);")


def test_an_unstated_licence_is_one_quiet_line(
    two_teachers: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    teachers = [load_teacher(str(path)) for path in two_teachers]
    caplog.set_level(logging.INFO, logger="fdkit")
    announce_terms(teachers)
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in found] == ["WARNING", "INFO"]
    assert str(two_teachers[0]) in found[0][1]
    assert str(two_teachers[1]) not in found[0][1]
    assert found[1][1] == f"the licence of {two_teachers[1]} is unstated"


def test_other_processes_are_silent_about_licences(
    two_teachers: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    announce_terms([load_teacher(str(two_teachers[0]))])
    assert not caplog.records


def test_resuming_with_several_teachers_ends_in_the_same_bits(
    taught_by_two: Path, two_teachers: list[Path], tmp_path: Path
) -> None:
    """Teacher dropping and stochastic depth are drawn again as they were."""
    folder = tmp_path / "run"
    shutil.copytree(taught_by_two, folder)
    steps = sorted((folder / "checkpoints").iterdir())
    assert len(steps) == 8
    for path in [*steps[4:], folder / "student.safetensors"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    names = [str(path) for path in two_teachers]
    distill(names, **SEVERAL, output=folder, resume=True)
    for file in ("student.safetensors", f"checkpoints/{steps[-1].name}/model.safetensors"):
        assert (folder / file).read_bytes() == (taught_by_two / file).read_bytes()
    assert _metrics(folder) == _metrics(taught_by_two)


def test_dropping_and_weights_change_what_is_learned(
    taught_by_two: Path, two_teachers: list[Path], tmp_path: Path
) -> None:
    names = [str(path) for path in two_teachers]
    runs = [taught_by_two]
    for number, choice in enumerate(
        ({"teacher_weights": [2, 1]}, {"teacher_weights": [1, 2]}, {"layer": 0}, {"layer": 0, "norm": False})
    ):
        runs.append(distill(names, **SEVERAL | {"distillation": choice}, output=tmp_path / str(number)))
    assert len({(run / "student.safetensors").read_bytes() for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("demo,dino_vitb", {"architecture": "vit_tiny_patch16_224"}, "architecture vit_tiny_patch16_224 is of one"),
        ("demo,dino_vitb", {"mean": (0.5, 0.5, 0.5)}, "mean .* is of one file of weights, and 2 teachers"),
        ("demo,dino_vitb", {"distillation": {"teacher_weights": [1, 2, 3]}}, "has 3 numbers for 2 teachers"),
        ("demo,demo", {}, "teacher demo is named twice"),
        ("demo,", {}, "a name is missing between its commas"),
        (["a,b", "demo"], {}, "a path with a comma cannot be one of several"),
        ("demo", {"distillation": {"teacher_dropping": 0.1}}, "has no effect on one teacher"),
        ("demo", {"distillation": {"target": "logits", "layer": 2}}, "has no effect on the target logits"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_teachers_is_refused_before_any_is_loaded(
    teacher: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(DistillConfig, "load", lambda *args, **kwargs: pytest.fail("a teacher was loaded"))
    with pytest.raises(ConfigError, match=message):
        distill(teacher, "digits", **options, output=tmp_path / "run")


def test_a_folder_with_a_comma_in_its_name_is_one_teacher(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert DistillConfig(teacher=str(folder), data="digits").teachers == [str(folder)]
    assert DistillConfig(teacher="clip_vitb, dino_vitb", data="digits").teachers == ["clip_vitb", "dino_vitb"]


def test_flags_name_several_teachers_weights_and_layers(two_teachers: list[Path]) -> None:
    names = ",".join(str(path) for path in two_teachers)
    arguments = ["--teacher", names, "--data", "digits", "--distillation.teacher-weights", "3,1.5",
                 "--distillation.teacher-dropping", "0.25", "--distillation.layer", "-2",
                 "--distillation.norm", "false", "--arch", "x"]  # fmt: skip
    values = parse_flags(DistillConfig, arguments, {}, "fdkit distill")
    assert values["architecture"] == "x"
    config = validate(DistillConfig, values | {"architecture": None}, "flags")
    assert config.teachers == [str(path) for path in two_teachers]
    assert config.distillation.teacher_weights == (3.0, 1.5)
    assert config.distillation.teacher_dropping == 0.25
    assert (config.distillation.layer, config.distillation.norm) == (-2, False)
    again = validate(DistillConfig, parse_yaml(to_yaml(config), "config.yaml"), "config.yaml")
    assert again == config


def test_a_teacher_in_float8_needs_a_device_that_computes_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fdkit.commands import distill as command
    from fdkit.teachers import low_precision

    monkeypatch.setattr(low_precision, "find_spec", lambda name: True)
    with pytest.raises(ResourceError, match="cpu does not multiply in float8"):
        distill(**TINY, teacher_precision="fp8", device="cpu", output=tmp_path / "run")
    with pytest.raises(ConfigError, match="fp8 and teacher_cache do not go together"):
        distill(**TINY, teacher_precision="fp8", teacher_cache="auto", output=tmp_path / "run")
    seen: list[int] = []

    def admit(teacher: Any, images: torch.Tensor) -> dict[str, Any]:
        seen.append(len(images))
        assert images.shape[1] == 3
        assert 0 <= images.min() < images.max() <= 1
        assert teacher.backbone.dtype == torch.bfloat16
        return {"cosine": 0.9995}

    monkeypatch.setattr(command, "require_float8", lambda device: None)
    monkeypatch.setattr(command, "quantise_checked", admit)
    run = distill(**TINY, teacher_precision="fp8", device="cpu", output=tmp_path / "run8")
    assert seen == [64]
    facts = json.loads((run / "run.json").read_text())
    assert list(facts["float8"].values()) == [{"cosine": 0.9995}]
