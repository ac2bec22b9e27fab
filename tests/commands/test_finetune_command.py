"""`fdkit finetune` as a user types it: what a run leaves behind, what is refused before training, and exact resume."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import fdkit
from fdkit.cli import main
from fdkit.commands._classification import open_images
from fdkit.commands.finetune import FinetuneConfig
from fdkit.data.sources import open_source
from fdkit.models.libraries import build_timm, load_backbone, save_backbone

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
BEIT: dict[str, Any] = {
    **VIT, "global_pool": "token", "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False
}  # fmt: skip
FAST: dict[str, Any] = {
    "device": "cpu",
    "loader": {"workers": 0},
    "monitor": {"collapse_every_epochs": 0},
    "train": {"batch_size": 32, "epochs": 0.5, "log_every_steps": 1, "precision": "fp32"},
    "optim": {"lr": 3e-3, "lr_reference_batch": None, "warmup_epochs": 0.1},
    "views": {"min_scale": 0.6, "flip": False, "randaugment": None},
    "supervised": {"head_scale": 1.0, "drop_path": 0.1},
}


def save_model(folder: Path, name: str, args: dict[str, Any]) -> Path:
    torch.manual_seed(3)
    save_backbone(build_timm(name, args), folder)
    return folder


@pytest.fixture(scope="module")
def beit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "beit", "beit_base_patch16_224", BEIT)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "vit", "vit_tiny_patch16_224", VIT)
    taught = {"teacher": {"name": "mae_vitb", "license": "cc-by-nc-4.0", "is_noncommercial": True}}
    (folder / "run.json").write_text(json.dumps(taught))
    return folder


@pytest.fixture(scope="module")
def finished(beit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    plain = {"mixup": 0.0, "cutmix": 0.0, "erase_probability": 0.0, "head_scale": 1.0, "drop_path": 0.1}
    fields = FAST | {
        "supervised": plain,
        "train": FAST["train"] | {"epochs": 1},
        "optim": FAST["optim"] | {"layer_decay": 0.95},
    }
    return folder, fdkit.finetune(beit, "digits", **fields, output=folder)


def test_the_result_holds_what_the_run_is_worth(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = finished
    assert json.loads((folder / "results" / "finetune-test.json").read_text()) == json.loads(
        json.dumps(numbers)
    )
    assert numbers["num_images"] == 450
    assert numbers["num_train"] + numbers["num_validation"] == 1347
    assert list(numbers["per_class"]) == numbers["classes"] == [str(digit) for digit in range(10)]
    assert numbers["top1"] <= numbers["top5"] <= 1
    assert numbers["top1_interval"][0] <= numbers["top1"] <= numbers["top1_interval"][1]
    both = json.loads((folder / "results" / "finetune-test-predictions.json").read_text())
    labels, predicted = np.array(both["labels"]), np.array(both["predicted"])
    assert numbers["top1"] == (labels == predicted).mean()
    assert np.array_equal(labels, open_source("digits", "test").labels)
    for digit in range(10):
        assert numbers["per_class"][str(digit)] == (predicted[labels == digit] == digit).mean()
    assert numbers["settings"]["optim"]["layer_decay"] == 0.95


def test_the_run_is_a_model_with_logits_and_loads_into_timm(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = finished
    recipe = json.loads((folder / "student.json").read_text())
    assert recipe["classes"] == numbers["classes"]
    network = timm.create_model(recipe["architecture"], **recipe["model_args"]).eval()
    network.load_state_dict(safetensors.torch.load_file(folder / "student.safetensors"), strict=True)
    source = open_source("digits", "test")
    teacher = fdkit.load_teacher(str(folder), keep_head=True)
    images = torch.stack([torch.from_numpy(np.array(source.read(index))) for index in range(40)])
    images = images.permute(0, 3, 1, 2).float() / 255
    backbone = teacher.backbone
    with torch.no_grad():
        logits = backbone.logits(images)
        mean, std = (torch.tensor(recipe["preprocessing"][key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(logits, network((images - mean) / std), rtol=1e-4, atol=1e-5)
    assert teacher.encode(images).patches.shape == (40, 16, 24)
    assert fdkit.evaluate("knn", folder, "digits", device="cpu")["top1"] > 0.15
    tables = [key for key in network.state_dict() if key.endswith("relative_position_bias_table")]
    assert tables == [f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("monitor/validation_top1" in row for row in rows)
    assert all("train_top1" in row for row in rows if "loss" in row)


def test_the_demo_model_learns_to_name_the_demo_images_within_a_minute(tmp_path: Path) -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "erase_probability": 0.0, "head_scale": 1.0, "drop_path": 0.0}
    fields = FAST | {"supervised": plain, "train": {"batch_size": 64, "epochs": 0.5, "precision": "fp32"}}
    assert fdkit.finetune("demo", "demo", **fields, output=tmp_path / "run")["top1"] > 0.4


def test_a_fine_tuned_run_is_fine_tuned_again_and_at_another_size(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Its bias tables are resampled from 4x4 to 6x6, and its own head is replaced."""
    folder, _ = finished
    numbers = fdkit.finetune(
        folder,
        "demo",
        **FAST | {"train": {"batch_size": 32, "epochs": 0.01}},
        image_size=48,
        output=tmp_path / "run",
    )
    recipe = json.loads((tmp_path / "run" / "student.json").read_text())
    assert (recipe["preprocessing"]["image_size"], recipe["model_args"]["img_size"]) == (48, 48)
    state = safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")
    assert state["blocks.0.attn.relative_position_bias_table"].shape == (11 * 11 + 3, 3)
    assert numbers["num_images"] == 900


def test_a_resumed_run_ends_in_the_same_bits(vit: Path, tmp_path: Path) -> None:
    """With all that is random: RandAugment, mixtures, boxes, stochastic depth, the average and the best so far."""
    fields = FAST | {
        "train": FAST["train"] | {"save_every_steps": 5, "keep_checkpoints": 9},
        "views": {"repeats": 2},
        "supervised": {"ema_decay": 0.5, "drop_path": 0.3},
        "validate_every_epochs": 0.1,
        "keep_best": True,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = fdkit.finetune(vit, "digits", **fields, output=whole)
    shutil.copytree(whole, broken)
    steps = sorted((broken / "checkpoints").iterdir())
    assert len(steps) == 4
    for path in steps[2:]:
        shutil.rmtree(path)
    shutil.rmtree(broken / "results")
    (broken / "student.safetensors").unlink()
    second = fdkit.finetune(vit, "digits", **fields, output=broken, resume=True)
    for file in (
        "student.safetensors",
        "heads.safetensors",
        "best/student.safetensors",
        "best/validation.json",
    ):
        assert (whole / file).read_bytes() == (broken / file).read_bytes(), file
    assert first | {"run": ""} == second | {"run": ""}


def test_the_best_is_exported_and_tested_and_the_average_and_the_raw_weights_are_kept(
    vit: Path, tmp_path: Path
) -> None:
    fields = FAST | {"supervised": {"ema_decay": 0.9}, "validate_every_epochs": 0.05, "keep_best": True}
    folder = tmp_path / "run"
    fdkit.finetune(vit, "digits", **fields, output=folder)
    best = json.loads((folder / "best" / "validation.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [
        (row["monitor/validation_top1"], -row["step"]) for row in rows if "monitor/validation_top1" in row
    ]
    assert (best["top1"], -best["step"]) == max(found)
    states = [safetensors.torch.load_file(folder / name / "student.safetensors") for name in ("", "best")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    raw = safetensors.torch.load_file(folder / "heads.safetensors")
    assert {f"student.network.{key}" for key in states[0]} == raw.keys()
    assert any(not torch.equal(value, raw[f"student.network.{key}"]) for key, value in states[0].items())
    assert load_backbone(folder / "best").recipe["architecture"] == "vit_tiny_patch16_224"


def test_from_scratch_is_the_same_network_without_its_weights_and_its_licence(
    vit: Path, tmp_path: Path
) -> None:
    still = FAST | {"optim": {"lr": 1e-9, "weight_decay": 0.0, "layer_decay": None}}
    states = {}
    for pretrained in (True, False):
        folder = tmp_path / str(pretrained)
        fdkit.finetune(vit, "digits", **still, pretrained=pretrained, output=folder)
        states[pretrained] = safetensors.torch.load_file(folder / "student.safetensors")
        facts = json.loads((folder / "run.json").read_text())
        assert ("teacher" in facts) == pretrained
        if pretrained:
            assert facts["teacher"]["license"] == "cc-by-nc-4.0"
    before = safetensors.torch.load_file(vit / "student.safetensors")
    assert states[True].keys() == states[False].keys()
    for key in ("patch_embed.proj.weight", "blocks.1.mlp.fc2.weight"):
        torch.testing.assert_close(states[True][key], before[key], rtol=0, atol=1e-6)
        assert not torch.allclose(states[False][key], before[key], atol=1e-3)


def test_from_scratch_with_layer_decay_is_warned_of(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = FAST | {
        "train": {"batch_size": 8, "epochs": 0.006},
        "validate_every_epochs": 0,
        "pretrained": False,
    }
    caplog.set_level(logging.WARNING, logger="fdkit")
    fdkit.finetune(vit, "digits", **short, output=tmp_path / "decayed")
    assert "from scratch with optim.layer_decay 0.65: the first layers hardly learn" in caplog.text
    caplog.clear()
    fdkit.finetune(vit, "digits", **short | {"optim": {"layer_decay": None}}, output=tmp_path / "even")
    assert "layer_decay" not in caplog.text


def test_a_named_network_is_built_from_scratch_without_its_weights(tmp_path: Path) -> None:
    fields = FAST | {"train": {"batch_size": 4, "epochs": 0.004}, "validate_every_epochs": 0}
    numbers = fdkit.finetune("timm:vit_tiny_patch16_224", "digits", **fields, image_size=32, pretrained=False,
                             output=tmp_path / "run")  # fmt: skip
    assert numbers["num_validation"] == 0
    assert numbers["num_train"] == 1347


def test_json_is_the_one_thing_on_standard_output(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(vit), "--data", "digits", "--output", str(tmp_path / "run"), "--json", "--device", "cpu",
             "--train.batch-size", "64", "--train.epochs", "0.1", "--supervised.trained-blocks", "0.5",
             "--views.randaugment", "None", "--optim.layer-decay", "0.7"]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "results" / "finetune-test.json").read_text())
    assert printed["settings"]["supervised"]["trained_blocks"] == 0.5
    before, after = (
        safetensors.torch.load_file(path / "student.safetensors") for path in (vit, tmp_path / "run")
    )
    changed = {key for key in before if key in after and not torch.equal(before[key], after[key])}
    assert {key.rpartition(".")[0] for key in changed} == {
        "blocks.1.norm2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2",
    }  # fmt: skip


# Labelled folders


def write_images(root: Path, split: str, counts: dict[str, int]) -> None:
    random = np.random.default_rng(len(split))
    for name, count in counts.items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
                folder / f"{number}.png"
            )


def open_with(root: Path, split: str | None = None, *, validates: bool = True, ratio: float = 0.25) -> Any:
    return open_images(str(root), split=split, ratio=ratio, validates=validates, test_split="test", seed=1)


def test_validation_is_a_part_of_train_or_a_split_of_its_own(tmp_path: Path) -> None:
    write_images(tmp_path, "train", {"a": 8, "b": 4, "c": 1})
    write_images(tmp_path, "val", {"a": 2, "b": 3})
    write_images(tmp_path, "test", {"b": 2})
    images = open_with(tmp_path)
    assert images.classes == ("a", "b", "c")
    assert np.bincount(images.validation.labels).tolist() == [2, 1]
    assert np.bincount(images.train.labels).tolist() == [6, 3, 1]
    names = [
        source.describe(index) for source in (images.train, images.validation) for index in range(len(source))
    ]
    assert len(set(names)) == 13
    assert images.test.labels.tolist() == [1, 1]
    own = open_with(tmp_path, "val")
    assert (len(own.train), len(own.validation)) == (13, 5)
    without = open_with(tmp_path, validates=False)
    assert (len(without.train), without.validation) == (13, None)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


TRAIN = {"a": 6, "b": 6}


SOUND = {"train": TRAIN, "test": TRAIN}
NO_VALIDATION = ["--validate-every-epochs", "0"]


@pytest.mark.parametrize(
    ("splits", "arguments", "code", "message"),
    [
        ({"train": {"": 6}, "test": TRAIN}, [], 3, "has no labels, and fine-tuning needs them"),
        ({"train": {"a": 6}, "test": {"a": 2}}, [], 3, "has 1 class in its training images"),
        ({"train": TRAIN, "test": {"a": 1, "z": 1}}, [], 3, "has classes without training images: z"),
        ({"train": TRAIN}, [], 3, "no split 'test'"),
        ({"train": TRAIN, "test": {"": 2}}, [], 3, "no labels"),
        ({"train": {"a": 1, "b": 1}, "test": TRAIN}, [], 3, "no class of {data} has two images"),
        (
            {"train": TRAIN, "val": TRAIN},
            ["--validation-split", "val"],
            2,
            "validation_split val holds the test",
        ),
        (SOUND, ["--train.batch-size", "1"], 2, "a process takes one at a time"),
        (SOUND, ["--train.batch-size", "64"], 2, "batch size 64 is more than the 10 images"),
        (SOUND, ["--supervised.trained-blocks", "9"], 2, "trained_blocks 9: VisionTransformer has 2"),
        (SOUND, ["--image-size", "30"], 2, "image size 30 does not divide"),
        (SOUND, ["--keep-best", *NO_VALIDATION], 2, "keep_best needs a validation"),
        (SOUND, ["--validation-split", "val", *NO_VALIDATION], 2, "validation_split val has no effect"),
        (SOUND, ["--views.min-scale", "0.9", "--views.max-scale", "0.5"], 2, "views.max_scale 0.5"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence_before_training(
    splits: dict[str, dict[str, int]], arguments: list[str], code: int, message: str, vit: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = tmp_path / "data"
    for split, counts in splits.items():
        write_images(data, split, counts)
    words = [
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--train.batch-size",
        "4",
    ]
    found = run("finetune", str(vit), *words, *arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert found == code, errors
    assert len(errors) == 1
    assert message.format(data=data) in errors[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("model", "arguments", "code", "message"),
    [
        ("timm:levit_128s", ["--pretrained", "false", "--supervised.drop-path", "0"], 2, "no linear classifier"),
        ("timm:resnet10t", ["--pretrained", "false", "--supervised.pooling", "cls"], 2, "cls: resnet10t"),
        ("timm:resnet10t", ["--pretrained", "false", "--supervised.trained-blocks", "1"], 2, "ResNet has no"),
        ("empty.pth", [], 4, "holds no weights"),
        ("nowhere/run", [], 4, "there is no file or folder nowhere/run"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_fine_tuned_are_refused_too(
    model: str, arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": {"lr": 0.1}, "epoch": 3}, "empty.pth")
    words = ["--data", "digits", "--output", "run", "--device", "cpu", "--train.batch-size", "4"]
    assert run("finetune", model, *words, *arguments) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not Path("run/metrics.jsonl").exists()


def test_the_dropped_norm_and_the_licence_are_said(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fdkit")
    fields = FAST | {"train": {"batch_size": 8, "epochs": 0.006}, "validate_every_epochs": 0}
    fdkit.finetune(vit, "digits", **fields, output=tmp_path / "run")
    said = caplog.text
    assert "fc_norm begins anew; the pretrained final norm is left out" in said
    assert f"non-commercial: {vit} (cc-by-nc-4.0)" in said


def test_flags_and_a_saved_configuration_agree(tmp_path: Path) -> None:
    from fdkit.commands._flags import parse_flags
    from fdkit.config import parse_yaml, to_yaml, validate

    words = ["demo", "--data", "demo", "--optim.layer-decay", "0.7", "--supervised.trained-blocks", "0.5",
             "--supervised.ema-decay", "0.99", "--views.randaugment", "None", "--validation-split", "val"]  # fmt: skip
    config = validate(FinetuneConfig, parse_flags(FinetuneConfig, words, {}, "fdkit finetune"), "flags")
    assert (config.model, config.supervised.trained_blocks, config.views.randaugment) == ("demo", 0.5, None)
    assert validate(FinetuneConfig, parse_yaml(to_yaml(config), "config.yaml"), "config.yaml") == config
