import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.backbone import IMAGENET_MEAN, Backbone, Preprocessing
from fdkit.models.libraries import build_backbone, build_open_clip, build_timm, load_backbone, save_backbone

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any], int, tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", TINY, 1, (3, 3)),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY, 2, (3, 3)),
    "beit": ("beit_base_patch16_224", TINY, 1, (3, 3)),
    "registers": ("vit_small_patch16_dinov3", TINY, 5, (3, 3)),
    "eva": ("eva02_tiny_patch14_224", {**TINY, "img_size": 42}, 1, (3, 3)),
    "siglip": ("vit_base_patch16_siglip_224", TINY, 0, (3, 3)),
    "registers_without_class": ("vit_medium_patch16_reg4_gap_256", TINY, 0, (3, 3)),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "img_size": 56}, 0, (7, 7)),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64},
        0,
        (8, 8),
    ),
    "resnet": ("resnet18", {"img_size": 96}, 0, (3, 3)),
    "convnext": ("convnext_atto", {"img_size": 96}, 0, (3, 3)),
}


def _build(family: str) -> Backbone:
    name, args, _, _ = FAMILIES[family]
    return build_timm(name, args).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_every_family_have_the_stated_shape(family: str) -> None:
    backbone = _build(family)
    _, _, prefix, grid = FAMILIES[family]
    with torch.no_grad():
        tokens = backbone(torch.rand(2, 3, backbone.image_size, backbone.image_size))
    assert tokens.prefix.shape == (2, prefix, backbone.embed_dim)
    assert tokens.patches.shape == (2, grid[0] * grid[1], backbone.embed_dim)
    assert tokens.grid == grid
    assert backbone.num_prefix_tokens == prefix
    assert backbone.patch_size == backbone.image_size // grid[0]


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("vit", "norm"),
        ("beit", "fc_norm"),
        ("registers", "norm"),
        ("eva", "fc_norm"),
        ("siglip", "norm"),
        ("swin", "norm"),
        ("swinv2", "norm"),
        ("convnext", "head.norm"),
    ],
)
def test_tokens_went_through_the_models_own_norm(family: str, norm: str) -> None:
    """A norm with weight 0 and bias 1..C makes every token 1..C, wherever the network keeps it."""
    backbone = _build(family)
    channels = torch.arange(1.0, backbone.embed_dim + 1)
    with torch.no_grad():
        backbone.network.get_submodule(norm).weight.zero_()  # type: ignore[operator, union-attr]
        backbone.network.get_submodule(norm).bias.copy_(channels)  # type: ignore[operator, union-attr]
        tokens = backbone(torch.rand(1, 3, backbone.image_size, backbone.image_size)).all()
    torch.testing.assert_close(tokens, channels.expand_as(tokens))


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_patches_are_row_major(family: str) -> None:
    """What a bright spot low on the left changes most is the first token of the last row."""
    backbone = _build(family)
    size, (rows, columns) = backbone.image_size, FAMILIES[family][3]
    step = size // rows
    spot = torch.full((1, 3, size, size), 0.5)
    spot[..., size - step :, :step] = torch.rand(3, step, step)
    with torch.no_grad():
        change = (backbone(spot).patches - backbone(torch.full_like(spot, 0.5)).patches).norm(dim=-1)[0]
    assert change.argmax().item() == (rows - 1) * columns


def test_tokens_equal_timms_own_features() -> None:
    backbone = _build("vit")
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        expected = backbone.network.forward_features((images - 0.5) / 0.5)
        torch.testing.assert_close(backbone(images).all(), expected)


def test_a_head_is_kept_only_when_asked() -> None:
    images = torch.rand(2, 3, 48, 48)
    assert build_timm("vit_tiny_patch16_224", {**TINY, "num_classes": 5}).logits(images).shape == (2, 5)
    kept = build_timm("vit_tiny_patch16_224", TINY, keep_head=True)
    assert kept.recipe["model_args"]["num_classes"] == 1000
    with pytest.raises(ConfigError, match="no classifier"):
        build_timm("vit_tiny_patch16_224", TINY).logits(images)


def test_preprocessing_comes_from_the_weights_tag() -> None:
    mae = build_timm("vit_base_patch16_224.mae", TINY)
    assert mae.preprocessing == Preprocessing(IMAGENET_MEAN, (0.229, 0.224, 0.225), 48, 0.9, "bicubic")


def test_unknown_names_and_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean vit_tiny_patch16_224"):
        build_timm("vit_tini_patch16_224", {})
    with pytest.raises(ConfigError, match="no weights mea"):
        build_timm("vit_base_patch16_224.mea", {})
    with pytest.raises(ConfigError, match="resnet18 refuses"):
        build_timm("resnet18", {"mlp_ratio": 4})
    with pytest.raises(ConfigError, match=r"image size \(48, 64\) is not one number"):
        build_timm("vit_tiny_patch16_224", {"img_size": (48, 64)})
    with pytest.raises(ConfigError, match="did you mean ViT-B-32"):
        build_open_clip("ViT-B-3")
    with pytest.raises(ConfigError, match="no weights opena"):
        build_open_clip("ViT-B-32", tag="opena")
    with pytest.raises(ConfigError, match="no token map"):
        build_open_clip("coca_ViT-B-32")
    with pytest.raises(ConfigError, match="comes from timm or open_clip"):
        build_backbone(
            {"library": "torchvision", "preprocessing": {"mean": [0], "std": [1], "image_size": 8}}
        )


@pytest.fixture(scope="module")
def clip() -> Backbone:
    return build_open_clip("ViT-B-32", {"image_size": 64}, tag="openai").eval()


def test_clip_normalises_every_token_and_leaves_the_projection_out(clip: Backbone) -> None:
    images = torch.rand(2, 3, 64, 64)
    seen: list[Tensor] = []
    hook = clip.network.transformer.register_forward_hook(lambda *call: seen.append(call[2]))  # type: ignore[union-attr]
    with torch.no_grad():
        tokens = clip(images)
        projected = clip.logits(images)
        expected = torch.stack([clip.network.ln_post(token) for token in seen[0].unbind(1)], dim=1)  # type: ignore[operator]
    hook.remove()
    torch.testing.assert_close(tokens.all(), expected)
    assert tokens.patches.shape == (2, 4, 768)
    torch.testing.assert_close(projected, tokens.prefix[:, 0] @ clip.network.proj)  # type: ignore[operator]


def test_clips_statistics_and_activation_follow_the_weights(clip: Backbone) -> None:
    assert clip.preprocessing.mean[0] == pytest.approx(0.48145466)
    assert clip.recipe["model_args"] == {"quick_gelu": True, "image_size": 64}


def test_clip_resnet_gives_its_last_map() -> None:
    tokens = build_open_clip("RN50", {"image_size": 96}).eval()(torch.rand(1, 3, 96, 96))
    assert tokens.patches.shape == (1, 9, 2048)


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_a_saved_backbone_comes_back_equal(family: str, tmp_path: Path) -> None:
    backbone = _build(family)
    save_backbone(backbone, tmp_path)
    loaded = load_backbone(tmp_path)
    images = torch.rand(1, 3, backbone.image_size, backbone.image_size)
    assert not loaded.training
    assert loaded.recipe == json.loads(json.dumps(backbone.recipe))
    assert loaded.preprocessing == backbone.preprocessing
    with torch.no_grad():
        assert torch.equal(loaded(images).all(), backbone(images).all())


def test_saved_files_load_into_timm_alone(tmp_path: Path) -> None:
    backbone = _build("beit")
    save_backbone(backbone, tmp_path)
    recipe = json.loads((tmp_path / "student.json").read_text())
    weights = str(tmp_path / "student.safetensors")
    model = timm.create_model(recipe["architecture"], **recipe["model_args"], checkpoint_path=weights)
    for key, value in model.state_dict().items():
        assert torch.equal(value, backbone.network.state_dict()[key]), key


def test_saved_files_follow_the_umask_and_leave_nothing_else(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        save_backbone(_build("vit"), tmp_path / "run")
    finally:
        os.umask(previous)
    files = sorted((tmp_path / "run").iterdir())
    assert [file.name for file in files] == ["student.json", "student.safetensors"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o640, 0o640]


def test_loading_names_what_does_not_fit(tmp_path: Path) -> None:
    backbone = _build("vit")
    save_backbone(backbone, tmp_path)
    path = tmp_path / "student.safetensors"
    state = safetensors.torch.load_file(path)
    state["extra"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 9)
    del state["norm.bias"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(
        WeightsError, match=r"missing 1: norm\.bias; unexpected 1: extra; wrong shape 1: cls_token"
    ):
        load_backbone(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot read the weights"):
        load_backbone(tmp_path)
    (tmp_path / "student.json").write_text("{}")
    with pytest.raises(WeightsError, match="lacks library, architecture"):
        load_backbone(tmp_path)
    with pytest.raises(WeightsError, match="cannot read the model recipe"):
        load_backbone(tmp_path / "nowhere")
