import logging
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.teachers import building, model
from fdkit.teachers.files import sha256_of
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.origin import Fetched

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def vit_file(tmp_path: Path, small_vit: torch.nn.Module) -> Path:
    torch.save({"model": small_vit.state_dict(), "epoch": 1}, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return (images - mean) / std


def test_a_plain_vit_is_recognised_and_says_what_it_assumes(
    vit_file: Path, small_vit: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fdkit"):
        teacher = load_teacher(str(vit_file))
    images = torch.rand(2, 3, 32, 32)
    tokens = teacher.encode(images)
    expected = small_vit.forward_features(normalised(images))
    assert torch.allclose(tokens.all(), expected, atol=1e-5)
    assert tokens.grid == (4, 4)
    assert "3 heads, the standard for width 192" in caplog.text
    assert "assuming mean (0.485, 0.456, 0.406)" in caplog.text
    assert "left out 2 tensors (classifier), such as head.bias" in caplog.text
    assert teacher.sha256 is not None
    assert teacher.source == str(vit_file)


def test_loading_leaves_the_global_random_state_alone(vit_file: Path) -> None:
    before = torch.get_rng_state()
    load_teacher(str(vit_file))
    assert torch.equal(torch.get_rng_state(), before)
    load_teacher("timm:vit_tiny_patch16_224", pretrained=False, image_size=32)
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_can_be_stated(vit_file: Path) -> None:
    teacher = load_teacher(str(vit_file), mean=(0.5, 0.4, 0.3))
    assert teacher.backbone.preprocessing.mean == (0.5, 0.4, 0.3)
    assert teacher.backbone.preprocessing.std == IMAGENET[1]
    assert teacher.backbone.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert teacher.identity()["recipe"]["preprocessing"]["mean"] == [0.5, 0.4, 0.3]


def test_another_image_size_resamples_positions_as_timm_does(
    vit_file: Path, small_vit: torch.nn.Module
) -> None:
    teacher = load_teacher(str(vit_file), image_size=48)
    small_vit.set_input_size(img_size=48)
    images = torch.rand(1, 3, 48, 48)
    expected = small_vit.forward_features(normalised(images))
    assert torch.allclose(teacher.encode(images).all(), expected, atol=1e-4)
    assert teacher.encode(torch.rand(1, 3, 32, 32)).grid == (6, 6)
    with pytest.raises(ConfigError, match="image size 50 does not divide"):
        load_teacher("timm:vit_tiny_patch16_224", image_size=50, pretrained=False)


@pytest.mark.parametrize("stem", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_a_file_named_after_a_timm_model_takes_its_statistics(tmp_path: Path, stem: str) -> None:
    network = timm.create_model("vit_tiny_patch16_224")
    safetensors.torch.save_file(network.state_dict(), tmp_path / f"{stem}.safetensors")
    teacher = load_teacher(str(tmp_path / f"{stem}.safetensors"))
    assert teacher.backbone.preprocessing == build_timm(stem, {}).preprocessing
    assert teacher.backbone.preprocessing.mean == (0.5, 0.5, 0.5)
    assert teacher.image_size == 224
    other = load_teacher(
        str(tmp_path / f"{stem}.safetensors"), architecture="deit_tiny_patch16_224.fb_in1k", image_size=64
    )
    assert other.backbone.preprocessing.mean == IMAGENET[0]


def test_mocov3_small_has_twelve_heads(tmp_path: Path) -> None:
    args = {"depth": 1, "img_size": 32, "patch_size": 16, "num_heads": 12}
    network = timm.create_model("vit_small_patch16_224", **args).eval()
    state = {f"module.base_encoder.{key}": value for key, value in network.state_dict().items()}
    state["module.momentum_encoder.norm.weight"] = torch.zeros(384)
    state["module.predictor.0.weight"] = torch.zeros(1, 1)
    torch.save({"state_dict": state}, tmp_path / "vit-s-300ep.pth.tar")
    images = torch.rand(1, 3, 32, 32)
    teacher = load_teacher(str(tmp_path / "vit-s-300ep.pth.tar"))
    assert torch.allclose(
        teacher.encode(images).all(), network.forward_features(normalised(images)), atol=1e-5
    )


def test_wrong_architecture_is_refused_with_what_it_looks_like(tmp_path: Path) -> None:
    state = timm.create_model("vit_small_patch16_224", depth=2, img_size=32).state_dict()
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"patch_embed.proj.weight \(384, 3, 16, 16\)") as raised:
        load_teacher(str(tmp_path / "x.pth"), architecture="vit_base_patch16_224")
    assert "384 wide, 2 deep, patch 16, 32 px" in raised.value.hint
    assert "plain ViT" in raised.value.hint
    with pytest.raises(WeightsError, match=r"missing \d+: blocks.10.attn.proj.bias"):
        load_teacher(str(tmp_path / "x.pth"), architecture="vit_small_patch16_224")


def test_another_patch_size_is_never_resampled_in_silence(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=64, depth=12).state_dict()
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="wrong shape"):
        load_teacher(str(tmp_path / "x.pth"), architecture="vit_tiny_patch16_224")


def test_missing_final_norm_and_nan_are_refused(tmp_path: Path, small_vit: torch.nn.Module) -> None:
    state = small_vit.state_dict()
    torch.save({key: value for key, value in state.items() if key != "norm.bias"}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"missing 1: norm.bias"):
        load_teacher(str(tmp_path / "x.pth"))
    state["blocks.1.mlp.fc1.weight"][3, 4] = torch.nan
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(WeightsError, match=r"blocks.1.mlp.fc1.weight holds 1 values that are not finite"):
        load_teacher(str(tmp_path / "y.pth"))
    state = {k: v for k, v in state.items() if "fc1" not in k} | {"blocks.0.extra": torch.zeros(1)}
    torch.save(state, tmp_path / "z.pth")
    with pytest.raises(WeightsError, match=r"cannot tell what .*z\.pth is") as raised:
        load_teacher(str(tmp_path / "z.pth"))
    assert "nearest known layout" in raised.value.hint
    assert "cls_token (1, 1, 192)" in raised.value.message


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("timm:vit_base_patch16_clip_224.openai", "timm:vit_base_patch16_clip_quickgelu_224.openai"),
        ("timm:vit_large_patch14_clip_336.openai", "short name clip_vitl336"),
        ("timm:vit_large_patch14_clip_224.dfn2b", "timm:vit_large_patch14_clip_quickgelu_224.dfn2b"),
        ("open_clip:ViT-B-16/openai", "open_clip:ViT-B-16-quickgelu/openai"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_clip_weights_with_the_wrong_activation_are_refused(given: str, right: str, pretrained: bool) -> None:
    with pytest.raises(WeightsError, match="another activation") as raised:
        load_teacher(given, pretrained=pretrained)
    assert right in raised.value.hint


def test_random_weights_only_when_asked_and_loudly(caplog: pytest.LogCaptureFixture, vit_file: Path) -> None:
    teacher = load_teacher("timm:vit_tiny_patch16_224", pretrained=False, image_size=32)
    assert "RANDOM WEIGHTS" in caplog.text
    assert teacher.sha256 is None
    assert teacher.license == "apache-2.0"
    assert teacher.source == "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(ConfigError, match="cannot be built without"):
        load_teacher(str(vit_file), pretrained=False)


def test_convolutional_teachers_take_any_size() -> None:
    teacher = load_teacher("timm:convnext_atto", pretrained=False, image_size=96)
    assert teacher.encode(torch.rand(1, 3, 64, 64)).grid == (3, 3)
    assert teacher.num_prefix_tokens == 0


def test_catalog_sizes_and_licences_reach_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, object]] = []

    def build(name: str, args: dict[str, object], **options: object) -> object:
        built.append({"name": name, **args})
        return build_timm("vit_tiny_patch16_224", {"img_size": 32, "depth": 1})

    monkeypatch.setattr(building, "build_timm", build)
    assert load_teacher("mae_vitb", pretrained=False).license == "cc-by-nc-4.0"
    load_teacher("dinov2_vits", pretrained=False)
    load_teacher("dinov2_vits", pretrained=False, image_size=518)
    assert [entry.get("img_size") for entry in built] == [224, 224, 518]


def test_a_run_folder_is_a_teacher(tmp_path: Path) -> None:
    backbone = build_timm("vit_tiny_patch16_224", {"depth": 1, "img_size": 32, "embed_dim": 48}).eval()
    save_backbone(backbone, tmp_path / "run")
    teacher = load_teacher(str(tmp_path / "run"))
    images = torch.rand(1, 3, 32, 32)
    assert torch.allclose(teacher.encode(images).patches, backbone(images).patches, atol=1e-5)
    (tmp_path / "other").mkdir()
    with pytest.raises(WeightsError, match="not the folder of a finished run"):
        load_teacher(str(tmp_path / "other"))


def test_demo_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "DEMO_FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="make demo-teacher"):
        load_teacher("demo")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("clip_vitx", ConfigError, "did you mean clip_vit"),
        ("nonsense", ConfigError, "a model is a short name"),
        ("none/here.pth", WeightsError, "there is no file"),
        ("none/here", WeightsError, "there is no file or folder"),
        ("timm:vit_bass_patch16_224", ConfigError, "unknown timm model"),
        ("timm:vit_base_patch16_224.nope", ConfigError, "has no weights nope"),
        ("open_clip:ViT-B-99/openai", ConfigError, "unknown open_clip architecture"),
        ("open_clip:ViT-B-16/nope", ConfigError, "has no weights nope"),
        ("open_clip:ViT-B-16", ConfigError, "ARCH/TAG"),
    ],
)
def test_names_that_are_none(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_teacher(name)


def test_architecture_is_for_files_only() -> None:
    with pytest.raises(ConfigError, match="states its own"):
        load_teacher("dino_vits", architecture="vit_small_patch16_224")


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"]
)
def test_published_files_load_whole_without_their_classifier(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model(name).eval()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    monkeypatch.setattr(model, "fetch_timm", lambda name, revision: Fetched(path, "somewhere"))
    teacher = load_teacher(f"timm:{name}")
    images = torch.rand(1, 3, teacher.image_size, teacher.image_size)
    plain = build_timm(name, {}).eval()
    plain.network.load_state_dict({key: network.state_dict()[key] for key in plain.network.state_dict()})
    assert torch.allclose(teacher.encode(images).all(), plain(images).all(), atol=1e-4)
    own = teacher.backbone.network.state_dict()
    assert all(torch.equal(own[key], network.state_dict()[key]) for key in own)
    assert teacher.sha256 == sha256_of(path)
    assert teacher.license == timm.get_pretrained_cfg(name).license


def test_random_weights_follow_their_seed() -> None:
    first, again, other = (
        load_teacher("timm:vit_tiny_patch16_224", image_size=32, pretrained=False, seed=seed).backbone.network
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.cls_token, again.cls_token)
    assert not torch.equal(first.cls_token, other.cls_token)
