"""`fdkit compare` beside its controls on a few small images, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fdkit
from fdkit.commands.compare import CompareConfig, read_distillation, untrained_student
from fdkit.errors import ConfigError
from fdkit.models.student import build_student
from fdkit.teachers.loading import load_teacher


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for number, name in enumerate(("ant", "bee", "cat")):
            (folder / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8) // 2
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{image}.png")
    return folder


@pytest.fixture(scope="module")
def distilled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "distilled"
    return fdkit.distill(
        "demo",
        photos,
        output=folder,
        device="cpu",
        train={"epochs": 1, "batch_size": 12},
        optim={"warmup_epochs": 0},
        monitor={"every_epochs": 0},
        loader={"workers": 0},
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_student_stands_beside_every_control(distilled: Path, photos: Path, tmp_path: Path) -> None:
    settings = {
        "output": tmp_path / "compared",
        "device": "cpu",
        "lr_factors": (0.5, 1.0),
        "k": 3,
        "train": {"epochs": 1, "batch_size": 12},
        "optim": {"warmup_epochs": 0},
        "loader": {"workers": 0},
    }
    numbers = fdkit.compare(distilled, photos, **settings)
    rows = {row["candidate"]: row for row in numbers["candidates"]}
    assert {name: set(row) - {"candidate"} for name, row in rows.items()} == {
        "student": {"knn", "logistic", "finetune"},
        "teacher": {"knn", "logistic", "finetune"},
        "untrained": {"knn", "logistic"},
        "scratch": {"finetune"},
    }
    assert numbers["verdict"].startswith("Distillation ")
    assert len(numbers["comparisons"]) == 6
    assert numbers["num_test"] == 15
    # From scratch sees the images of distillation and fine-tuning: 36 and, but for those held out, 1 epoch.
    held_in = json.loads((tmp_path / "compared/student-lr0.5/results/finetune-test.json").read_text())[
        "num_train"
    ]
    assert numbers["finetuning"]["scratch"]["epochs"] == pytest.approx(1 + 36 / held_in)
    for candidate in ("student", "teacher", "scratch"):
        tuned = numbers["finetuning"][candidate]
        assert [one["lr"] for one in tuned["tried"]] == pytest.approx([2.5e-4, 5e-4])
        best = max(one["validation_top1"] for one in tuned["tried"])
        assert tuned["chosen"]["validation_top1"] == best
        assert tuned["chosen"]["top1"] == pytest.approx(rows[candidate]["finetune"]["top1"])
    assert json.loads((tmp_path / "compared/compare.json").read_text())["verdict"] == numbers["verdict"]
    assert (tmp_path / "compared/compare.png").stat().st_size > 1000
    again = fdkit.compare(distilled, photos, **settings)
    assert again["candidates"] == numbers["candidates"]


@pytest.mark.slow
def test_frozen_features_alone(distilled: Path, photos: Path, tmp_path: Path) -> None:
    numbers = fdkit.compare(distilled, photos, frozen_only=True, output=tmp_path / "c", k=3, device="cpu")
    assert numbers["finetuning"] == {}
    assert [row["candidate"] for row in numbers["candidates"]] == ["student", "teacher", "untrained"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "compare.json",
        "compare.png",
        "compare.svg",
    ]


def test_the_untrained_control_is_the_student_before_its_first_step(distilled: Path) -> None:
    distillation = read_distillation(CompareConfig(run=str(distilled), data="demo"))
    teacher = load_teacher("demo")
    control = untrained_student(distillation, teacher).backbone.network.state_dict()
    settings = distillation.config
    start = build_student(
        settings.student, teacher.backbone, image_size=settings.views.image_size, seed=settings.seed
    )
    trained = load_teacher(str(distilled)).backbone.network.state_dict()
    assert all(torch.equal(control[name], value) for name, value in start.network.state_dict().items())
    assert any(not torch.equal(control[name], trained[name]) for name in control)


def test_a_folder_that_is_no_distillation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder of a distillation"):
        read_distillation(CompareConfig(run=str(tmp_path), data="demo"))
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("method: mae\n")
    with pytest.raises(ConfigError, match=r"(?s)not distilled from one teacher.*--teacher"):
        read_distillation(CompareConfig(run=str(tmp_path), data="demo"))


def test_several_rates_need_images_to_choose_by() -> None:
    with pytest.raises(ConfigError, match="holds out no images to choose by"):
        CompareConfig(run="runs/a", data="demo", validate_every_epochs=0)
    CompareConfig(run="runs/a", data="demo", validate_every_epochs=0, lr_factors=(1.0,))
