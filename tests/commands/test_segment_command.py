"""`fdkit segment` as a user types it: what a run leaves behind, what is refused, and how it goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import fdkit
from fdkit.cli import main
from fdkit.commands import segment
from fdkit.config import find_recipe, read_yaml, validate
from fdkit.teachers.loading import load_teacher
from tests.segmentation_folders import scene, write_pair, write_scenes

SHORT = ["--train.epochs", "3", "--train.batch-size", "4", "--optim.warmup-epochs", "0.5", "--optim.lr", "2e-2",
         "--train.log-every-steps", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "classes.txt").write_text("ground\nbox\nhouse\n")
    return write_scenes(folder, counts={"train": 12, "val": 3}, height=40, width=56)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["segment", *arguments])
    return int(stop.value.code or 0)


def result(folder: Path, split: str = "test") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results" / f"segmentation-{split}.json").read_text())
    return found


def test_a_run_leaves_backbone_head_numbers_and_a_figure(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert (
        run("demo", "--data", str(scenes), *SHORT, "--monitor.every-epochs", "1", "--output", str(folder))
        == 0
    )
    printed = capsys.readouterr().out
    for word in ("mIoU", "ground", "house", "linear head on frozen demo", "segmentation-test.json"):
        assert word in printed
    numbers = result(folder)
    assert numbers["miou"] > 0.5
    assert [one["name"] for one in numbers["per_class"]] == ["ground", "box", "house"]
    assert numbers["settings"] == {
        "crop_size": 32, "stride": 21, "short_side": 32, "precision": numbers["settings"]["precision"], "layers": [3],
    }  # fmt: skip
    assert numbers["data"]["num_images"] == 3
    assert numbers["command"]["segmentation"]["freeze"] is True
    with Image.open(folder / "figures" / "segmentation.png") as figure:
        assert figure.width == 1440
    before, after = (load_teacher(name).backbone.network.state_dict() for name in ("demo", str(folder)))
    assert all(torch.equal(value, before[name]) for name, value in after.items()), "the backbone was frozen"
    heads = safetensors.torch.load_file(folder / "heads.safetensors")
    assert heads["head.classifier.weight"].shape == (3, 64, 1, 1)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["state"] == "done"
    assert facts["teacher"]["name"] == "demo"
    assert facts["classes"] == ["ground", "box", "house"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    online = [row["monitor/miou"] for row in rows if "monitor/miou" in row]
    assert len(online) == 4, "before the first step, and after each epoch"
    assert online[-1] == pytest.approx(numbers["miou"]), "of all images, as they are few"


def test_json_is_all_there_is_on_standard_output(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "demo",
        "--data",
        str(scenes),
        *SHORT,
        "--ignore-label",
        "2,255",
        "--crop-size",
        "48",
        "--stride",
        "16",
    ]
    assert run(*words, "--split", "val", "--json", "--output", str(tmp_path / "run")) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["settings"]["crop_size"] == 48
    assert numbers["settings"]["stride"] == 16
    assert [one["name"] for one in numbers["per_class"]] == ["ground", "box"]
    assert numbers == result(tmp_path / "run", "val")


@pytest.mark.slow
def test_a_run_cut_short_goes_on_and_ends_in_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "device": "cpu",
        "train": {"epochs": 2, "batch_size": 4, "save_every_steps": 2, "precision": "fp32"},
        "segmentation": {"head": "upernet", "channels": 8, "freeze": False, "drop_path": 0.1},
        "optim": {"lr": 1e-3, "warmup_epochs": 0.5, "layer_decay": 0.7},
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fdkit.segment("demo", scenes, output=whole, **fields)
    fdkit.segment("demo", scenes, output=cut, **fields)
    for step in sorted((cut / "checkpoints").iterdir())[1:]:
        for file in step.iterdir():
            file.unlink()
        step.rmdir()
    fdkit.segment("demo", scenes, output=cut, resume=True, **fields)
    for name in ("student.safetensors", "heads.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert result(whole)["confusion"] == result(cut)["confusion"]
    start = load_teacher("demo").backbone.network.state_dict()
    found = safetensors.torch.load_file(whole / "student.safetensors")
    assert not torch.equal(found["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    again = fdkit.segment("demo", scenes, output=cut, resume=True, **fields)
    assert again["confusion"] == result(whole)["confusion"], "a finished run is only measured again"


@pytest.mark.slow
def test_the_control_has_random_weights(scenes: Path, tmp_path: Path) -> None:
    model = "timm:vit_tiny_patch16_224"
    fields: dict[str, Any] = {"train": {"epochs": 0.5, "batch_size": 4}, "optim": {"warmup_epochs": 0.1}}
    numbers = fdkit.segment(
        model, scenes, pretrained=False, image_size=32, device="cpu", output=tmp_path / "run", **fields
    )
    assert numbers["model"]["sha256"] is None
    assert 0 <= numbers["miou"] <= 1


def test_ade20ks_layout_trains_as_it_is(tmp_path: Path) -> None:
    for split, seeds in (("training", range(4)), ("validation", range(4, 6))):
        for seed in seeds:
            image, mask = scene(seed, 40, 48)
            stored = np.where(mask == 255, 0, mask + 1).astype(np.uint8)
            folders = tmp_path / "images" / split, tmp_path / "annotations" / split
            write_pair(*folders, f"ADE_{seed}", image, Image.fromarray(stored))
    fields: dict[str, Any] = {"train": {"epochs": 1, "batch_size": 2}, "optim": {"warmup_epochs": 0.1}}
    numbers = fdkit.segment("demo", tmp_path, device="cpu", output=tmp_path / "run", **fields)
    assert len(numbers["per_class"]) == 3
    assert sum(one["pixels"] for one in numbers["per_class"]) == 2 * 40 * 47


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--optim.layer-decay", "0.7"], 2, "optim.layer_decay has no effect on a frozen backbone"),
        (["--train.activation-checkpointing"], 2, "train.activation_checkpointing has no effect on a frozen"),
        (
            ["--train.cached-batch", "--train.accumulate", "2"],
            2,
            "train.cached_batch has no effect on segmentation",
        ),
        (["--stride", "33"], 2, "stride 33: windows of 32 pixels would leave gaps"),
        (["--crop-size", "30"], 2, "30"),
        (["--segmentation.head", "upernet", "--train.batch-size", "1"], 2, "cannot normalise a single image"),
        (["--segmentation.channels", "8"], 2, "segmentation.channels 8 has no effect on the head linear"),
        (["--split", "town"], 3, "no split town"),
        (["--ignore-label", "0,1,2"], 3, "0 classes that count"),
        (["--ignore-label", "300"], 2, "ignore_label"),
        (["--views.min-scale", "3"], 2, "views.max_scale 2.0 is smaller than views.min_scale 3.0"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(
    words: list[str],
    code: int,
    message: str,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("demo", "--data", str(scenes), *SHORT, *words, "--output", str(tmp_path / "run")) == code
    error = capsys.readouterr().err
    assert message in error
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_defaults_are_those_of_a_linear_head() -> None:
    config: Any = validate(
        segment.config_class(), {"model": "demo", "data": "x", "train": {"epochs": 5}}, "test"
    )
    assert (config.train.epochs, config.train.batch_size) == (5, 16)
    assert (config.optim.lr, config.optim.lr_reference_batch, config.optim.weight_decay) == (1e-3, None, 1e-4)
    assert (config.segmentation.freeze, config.segmentation.head) == (True, "linear")


@pytest.mark.parametrize(
    ("name", "steps", "lr", "weight_decay", "layer_decay", "freeze"),
    [("dinov2_linear", 40_000, 1e-3, 1e-4, None, True), ("vitb_upernet", 160_000, 7e-4, 0.05, 0.65, False)],
)
def test_recipes_hold_the_official_numbers(
    name: str, steps: int, lr: float, weight_decay: float, layer_decay: float | None, freeze: bool
) -> None:
    values = {"model": "demo", "data": "x", **read_yaml(find_recipe(name, "segment"))}
    config: Any = validate(segment.config_class(), values, name)
    per_epoch = 20_210 // 16  # the training images of ADE20K
    assert round(config.train.epochs * per_epoch) == pytest.approx(steps, rel=2e-3)
    assert round(config.optim.warmup_epochs * per_epoch) == pytest.approx(1500, rel=2e-3)
    optim = config.optim
    assert (optim.name, optim.lr, optim.weight_decay, optim.layer_decay) == (
        "adamw",
        lr,
        weight_decay,
        layer_decay,
    )
    assert (config.train.batch_size, config.segmentation.freeze) == (16, freeze)
    views = config.views
    assert (views.min_scale, views.max_scale, views.max_class_ratio, views.hue * 360) == (0.5, 2.0, 0.75, 18)
