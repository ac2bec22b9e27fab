"""A checkpoint of a run is a MODEL: the network that the finished run hands on, as it was at that step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkit
from fdkit.commands import pretrain
from fdkit.config import validate
from fdkit.data.segmentation_views import SegmentationCrop, SegmentationCropConfig
from fdkit.errors import ConfigError, WeightsError
from fdkit.methods._method import Method
from fdkit.methods.segmentation import Segmentation, SegmentationConfig
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.teachers.decoder import load_decoder
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.run_checkpoint import damage_of, list_checkpoints
from fdkit.training.checkpoint import Checkpoint, newest_sound, save_checkpoint
from tests.saved_mae import saved_run

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
COMMON: dict[str, Any] = {
    "device": "cpu",
    "loader": {"workers": 0},
    "train": {
        "batch_size": 16,
        "epochs": 0.05,
        "precision": "fp32",
        "save_every_steps": 1,
        "keep_checkpoints": 9,
    },
    "optim": {"lr": 0.01, "lr_reference_batch": None, "warmup_epochs": 0.01},
    "monitor": {"collapse_every_epochs": 0},
}


def build(name: str) -> Method:
    """A pretraining method of a size that is built in milliseconds."""
    kind = pretrain.config_class(name)
    own = kind.model_fields[pretrain.section(name)].annotation.model_fields
    counts = {
        field: 64
        for field, info in own.items()
        if type(default := info.get_default(call_default_factory=True)) is int and default > 64
    }
    is_swin = name == "esvit"
    network = {
        "architecture": "swin_tiny_patch4_window7_224" if is_swin else "vit_tiny_patch16_224",
        "model_args": SWIN if is_swin else VIT | {"patch_size": 4},
        **({"pooling": "patches"} if is_swin else {}),
    }
    views: dict[str, Any] = {"image_size": 16}
    if "local_size" in kind.model_fields["views"].annotation.model_fields:
        views |= {"local_size": 8}
    values = {"data": "demo", "network": network, "views": views, pretrain.section(name): counts}
    return pretrain.build_method(validate(kind, values, "test"))


def segmentation() -> Method:
    views = SegmentationCrop(SegmentationCropConfig(), 16)
    backbone = build_timm("vit_tiny_patch16_224", VIT | {"img_size": 16})
    config = SegmentationConfig(freeze=False)
    return Segmentation(backbone, views, config, num_classes=3, seed=0)


def tokens(path: Path, size: int = 16, **options: Any) -> Tensor:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return load_teacher(str(path), **options).encode(images).all()


@pytest.mark.parametrize("name", [*pretrain.choices(), "segmentation"])
def test_the_checkpoint_of_every_method_is_what_the_method_exports(name: str, tmp_path: Path) -> None:
    method = segmentation() if name == "segmentation" else build(name)
    with torch.no_grad():  # so that a student in place of its momentum copy would be found out
        for parameter in method.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_backbone(method.exported, tmp_path)
    content = Checkpoint({"model": dict(method.state_dict())}, {"step": 7})
    path = save_checkpoint(tmp_path / "checkpoints", 7, content, keep=1)
    assert torch.equal(tokens(path), tokens(tmp_path))
    assert torch.equal(tokens(path / "model.safetensors"), tokens(tmp_path))
    student = tokens(path, checkpoint_key="student")
    assert torch.equal(student, tokens(tmp_path)) == (method.exported is method.student)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    save_backbone(build_timm("vit_tiny_patch16_224", VIT | {"img_size": 32}), folder)
    (folder / "run.json").write_text(
        json.dumps({"teacher": {"name": "mae_vitb", "license": "cc-by-nc-4.0", "is_noncommercial": True}})
    )
    return folder


def trained(kind: str, vit: Path, folder: Path) -> Path:
    network = {"architecture": "vit_tiny_patch16_224", "model_args": VIT}
    views = {"image_size": 32}
    if kind == "distill":
        student = {"depth": 2, "drop_path": 0.0}
        return fdkit.distill(vit, "digits", **COMMON, views=views, student=student, output=folder)
    if kind == "finetune":
        finetuned = {"views": {"randaugment": None}, "supervised": {"ema_decay": 0.9}}
        fdkit.finetune(vit, "digits", **COMMON, **finetuned, validate_every_epochs=0, output=folder)
        return folder
    own = {
        "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
        "mocov3": {"hidden_dim": 16, "output_dim": 8},
        "dino": {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 32},
    }[kind]
    local = {"local_size": 16, "num_local": 2} if kind == "dino" else {}
    return fdkit.pretrain(
        kind, "digits", **COMMON, network=network, views=views | local, **{kind: own}, output=folder
    )


@pytest.mark.parametrize("kind", ["distill", "finetune", "mae", "mocov3", "dino"])
def test_the_last_checkpoint_of_a_finished_run_is_the_run(kind: str, vit: Path, tmp_path: Path) -> None:
    run = trained(kind, vit, tmp_path / "run")
    first, *_, last = list_checkpoints(run)
    assert torch.equal(tokens(last, 32), tokens(run, 32))
    assert not torch.equal(tokens(first, 32), tokens(run, 32))
    teacher, whole = load_teacher(str(last)), load_teacher(str(run))
    assert (teacher.license, teacher.is_noncommercial) == (whole.license, whole.is_noncommercial)
    assert teacher.backbone.recipe == whole.backbone.recipe
    if kind in ("distill", "finetune"):
        assert teacher.is_noncommercial
    if kind == "finetune":
        assert teacher.backbone.recipe["classes"] == [str(digit) for digit in range(10)]
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(teacher.backbone.logits(images), whole.backbone.logits(images))
        assert not torch.equal(tokens(last, 32, checkpoint_key="student"), tokens(last, 32))
    assert tokens(last, 48, image_size=48).shape == tokens(run, 48, image_size=48).shape


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run leaves it, with three checkpoints."""
    method = build("mocov3")
    save_backbone(method.exported, tmp_path)
    for step in (2, 10, 5):
        content = Checkpoint({"model": dict(method.state_dict())}, {"step": step})
        save_checkpoint(tmp_path / "checkpoints", step, content, keep=9)
    return tmp_path


def test_the_decoder_of_a_checkpoint_is_the_one_of_its_step(tmp_path: Path) -> None:
    made = saved_run(tmp_path, norm_pixels=False, mask_ratio=0.5)
    with torch.no_grad():
        for parameter in made.decoder.parameters():
            parameter.add_(1)  # so that the finished run's decoder would be found out
    path = save_checkpoint(
        tmp_path / "checkpoints", 3, Checkpoint({"model": dict(made.state_dict())}, {}), keep=1
    )
    trained = load_decoder(load_teacher(str(path)))
    assert (trained.norm_pixels, trained.mask_ratio) == (False, 0.5)
    for key, value in made.decoder.state_dict().items():
        assert torch.equal(trained.decoder.state_dict()[key], value), key
    other = build("mocov3")
    save_backbone(other.exported, tmp_path / "other")
    content = Checkpoint({"model": dict(other.state_dict())}, {})
    path = save_checkpoint(tmp_path / "other" / "checkpoints", 3, content, keep=1)
    with pytest.raises(ConfigError, match="has no decoder of pixels"):
        load_decoder(load_teacher(str(path)))


def test_checkpoints_are_listed_by_their_step(run: Path) -> None:
    (run / "checkpoints" / "step-00000007.corrupt-1").mkdir()
    (run / "checkpoints" / ".writing-step-00000011").mkdir()
    assert [path.name for path in list_checkpoints(run)] == [f"step-{step:08d}" for step in (2, 5, 10)]
    assert list_checkpoints(run / "nowhere") == []


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "model.safetensors").write_bytes(bytes(content))


def cut(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-10])


DAMAGES = {
    "the SHA-256 of model.safetensors is wrong": flip_a_byte,
    r"model.safetensors has [\d,]+ bytes, not": cut,
    "manifest.json: No such file": lambda path: (path / "manifest.json").unlink(),
    "model.safetensors: No such file": lambda path: (path / "model.safetensors").unlink(),
    "manifest.json cannot be read": lambda path: (path / "manifest.json").write_text("{"),
    "manifest.json is of another": lambda path: shutil.copy(
        path.parent / "step-00000005" / "manifest.json", path / "manifest.json"
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_refused_as_training_refuses_it(message: str, run: Path) -> None:
    path = run / "checkpoints" / "step-00000010"
    assert damage_of(path) is None
    DAMAGES[message](path)
    with pytest.raises(WeightsError, match=f"step-00000010 is damaged: {message}"):
        load_teacher(str(path))
    assert newest_sound(run / "checkpoints") == run / "checkpoints" / "step-00000005"
    with pytest.raises(WeightsError, match="corrupt-1 was set aside because it is damaged"):
        load_teacher(f"{path}.corrupt-1")


@pytest.mark.parametrize("name", ["step-00000003", "step-10"])
def test_a_step_that_is_not_there_names_those_that_are(name: str, run: Path) -> None:
    with pytest.raises(WeightsError, match=f"no checkpoint {name}") as caught:
        load_teacher(str(run / "checkpoints" / name))
    assert "step-00000002, step-00000005, step-00000010" in caught.value.hint


def test_what_is_no_checkpoint_of_a_finished_run_says_what_is(run: Path) -> None:
    path = run / "checkpoints" / "step-00000010"
    with pytest.raises(ConfigError, match="holds no network averaged") as caught:
        load_teacher(str(path), checkpoint_key="averaged")
    assert set(caught.value.hint.removeprefix("it holds ").split(", ")) == {"student", "momentum_student"}
    with pytest.raises(ConfigError, match="states its own"):
        load_teacher(str(path), architecture="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="cannot be built without"):
        load_teacher(str(path), pretrained=False)
    with pytest.raises(WeightsError, match="not the folder of a finished run") as caught_weights:
        load_teacher(str(run / "checkpoints"))
    assert f"such as {path}" in caught_weights.value.hint
    (run / "student.safetensors").unlink()
    with pytest.raises(WeightsError, match="not the folder of a finished run") as caught_weights:
        load_teacher(str(run))
    assert f"such as {path}" in caught_weights.value.hint
    tokens(path)  # a run whose weights are not exported yet has its checkpoints
    (run / "student.json").unlink()
    with pytest.raises(WeightsError, match=r"has no student\.json yet") as caught_weights:
        load_teacher(str(path))
    assert "--resume" in caught_weights.value.hint


def test_a_relative_path_is_taken_from_where_one_stands(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    teacher = load_teacher("step-00000010")
    assert teacher.source == str(run / "checkpoints" / "step-00000010")
