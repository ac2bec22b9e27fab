"""`fdkit pretrain` as a user types it: what is refused before training, and what a run leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import fdkit
from fdkit.cli import main
from fdkit.models.libraries import save_backbone
from fdkit.teachers.loading import load_teacher

TINY = '{"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}'
VIT = [
    "--network.architecture",
    "vit_tiny_patch16_224",
    "--network.model-args",
    TINY,
    "--network.pooling",
    "cls",
]
SMALL = ["--views.image-size", "32", "--train.batch-size", "64", "--train.epochs", "0.1", "--device", "cpu"]
HEADS = ["--mocov3.hidden-dim", "16", "--mocov3.output-dim", "8"]
LOCAL = ["--views.local-size", "16"]
RESNET = [
    "--network.architecture",
    "resnet10t",
    "--network.pooling",
    "patches",
    "--network.position",
    "learned",
]
SWIN_ARGS = '{"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}'
SWIN = ["--network.architecture", "swin_tiny_patch4_window7_224", "--network.model-args", SWIN_ARGS]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simsiam", *SMALL, *RESNET, "--train.batch-size", "1"], "cannot normalise a single image"),
        (["mocov2", *SMALL, *VIT, "--mocov2.queue-size", "100"], "mocov2.queue_size 100"),
        (["mae", *SMALL, *VIT, "--mae.mask-ratio", "0.99"], "0.99"),
        (
            ["mocov3", *SMALL, *VIT, *HEADS, "--views.image-size", "64"],
            "views.image_size 64 is larger than the images",
        ),
        (
            ["mocov3", *SMALL, *VIT, *HEADS, "--views.image-size", "28"],
            "views.image_size 28 is no multiple of the 8 pixels",
        ),
        (["dino", *SMALL, *VIT, "--views.local-size", "48"], "local_size 48"),
        (["dino", *SMALL, *VIT, "--views.local-size", "20"], "20"),
        (["esvit", *SMALL, *SWIN, "--network.pooling", "patches", "--views.local-size", "15"], "15"),
        (
            ["mocov3", *SMALL, *VIT, *HEADS, "--monitor.every-epochs", "1", "--monitor.num-classes", "11"],
            "monitor.num_classes 11 is more than the 10 classes",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence_before_training(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("pretrain", *arguments, "--data", "digits", "--output", str(tmp_path / "run"))
    error = capsys.readouterr().err
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2, error
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def pretrained(folder: Path, *arguments: str, seed: int = 0) -> Path:
    """A short run of MoCo v3 on digits."""
    words = [
        "pretrain",
        "mocov3",
        *SMALL,
        *VIT,
        *HEADS,
        "--data",
        "digits",
        "--output",
        str(folder),
        *arguments,
    ]
    assert run(*words, "--seed", str(seed)) == 0
    return folder


def test_a_run_is_a_teacher_a_model_and_an_export_at_once(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run", "--train.log-every-steps", "1")
    recipe = json.loads((folder / "student.json").read_text())
    network = timm.create_model(recipe["architecture"], **recipe["model_args"])
    network.load_state_dict(safetensors.torch.load_file(folder / "student.safetensors"), strict=True)
    images = torch.rand(2, 3, 32, 32)
    teacher = load_teacher(str(folder))
    mean, std = (torch.tensor(recipe["preprocessing"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        features = network.eval().forward_features((images - mean) / std)
    torch.testing.assert_close(teacher.encode(images).all(), features, rtol=1e-4, atol=1e-5)
    assert fdkit.evaluate("knn", folder, "digits")["top1"] > 0.2
    assert (folder / "figures" / "training.svg").is_file()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured: dict[str, Any] = next(row for row in rows if "monitor/effective_rank" in row)
    assert {"monitor/channel_std_ratio", "monitor/alignment", "monitor/uniformity"} <= measured.keys()
    assert all("grad_norm_max" in row for row in rows if "loss" in row)
    words = [
        "distill",
        "--teacher",
        str(folder),
        "--data",
        "digits",
        "--train.epochs",
        "0.1",
        "--views.image-size",
        "32",
    ]
    assert (
        run(*words, "--train.batch-size", "64", "--device", "cpu", "--output", str(tmp_path / "student")) == 0
    )


def test_a_run_starts_from_a_file_or_a_run(tmp_path: Path) -> None:
    first = pretrained(tmp_path / "first")
    nothing = ["--optim.lr", "1e-12", "--optim.weight-decay", "0"]
    second = pretrained(tmp_path / "second", "--init", str(first), *nothing, seed=5)
    states = [safetensors.torch.load_file(folder / "student.safetensors") for folder in (first, second)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6, msg=name)


def test_a_start_from_another_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=24, depth=2
    )
    torch.save(other.state_dict(), tmp_path / "other.pth")
    words = [
        "pretrain",
        "mocov3",
        *SMALL,
        *VIT,
        *HEADS,
        "--data",
        "digits",
        "--init",
        str(tmp_path / "other.pth"),
    ]
    assert run(*words, "--output", str(tmp_path / "run")) in {2, 4}
    assert "error: " in capsys.readouterr().err


def test_small_images_are_enlarged_if_asked_for(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run", "--views.image-size", "40", "--upscale")
    assert load_teacher(str(folder)).image_size == 40


def test_a_run_that_collapses_stops_in_words_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fdkit.models import representation

    calls = iter(range(1000))
    healthy = representation.channel_std
    monkeypatch.setattr(
        "fdkit.commands._monitor.channel_std",
        lambda features: healthy(features) * (1.0 if next(calls) < 3 else 1e-6),
    )
    words = [
        "pretrain",
        "mocov3",
        *SMALL,
        *VIT,
        *HEADS,
        "--data",
        "digits",
        "--output",
        str(tmp_path / "run"),
    ]
    words += ["--train.epochs", "2", "--train.save-every-steps", "3", "--train.keep-checkpoints", "1"]
    assert run(*words, "--monitor.collapse-every-epochs", "0.15", "--train.log-every-steps", "1") == 7
    error = capsys.readouterr().err
    assert "training has collapsed at step" in error
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    good = error.rpartition("kept: ")[2].split()[0]
    assert Path(good).is_dir()
    assert Path(good).name in kept
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("failed", 7)
    assert (tmp_path / "run" / "figures" / "training.png").is_file()


def test_the_student_saved_by_hand_is_an_init_too(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run")
    save_backbone(load_teacher(str(folder)).backbone, tmp_path / "copy")
    nothing = ["--optim.lr", "1e-12", "--optim.weight-decay", "0"]
    again = pretrained(tmp_path / "again", "--init", str(tmp_path / "copy"), *nothing, seed=5)
    states = [safetensors.torch.load_file(one / "student.safetensors") for one in (folder, again)]
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)
