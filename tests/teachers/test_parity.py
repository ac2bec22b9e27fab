"""Teachers against the outputs of the official implementations, and the libraries against each other."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import Tensor, nn

from fdkit.errors import WeightsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import _open_clip_backbone, build_backbone, build_timm
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher
from fdkit.teachers.weights import fit_library


def every_seventh(teacher: Teacher, images: Tensor) -> Tensor:
    return teacher.encode(images).all()[:, ::7]


def last_attention(teacher: Teacher, images: Tensor) -> Tensor:
    """(B, heads, N, N): attention of the last block."""
    attention = teacher.backbone.network.blocks[-1].attn
    attention.fused_attn = False
    seen: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    teacher.encode(images)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def dino(golden: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    values = golden("dino_vits", 5)
    path = tmp_path_factory.mktemp("dino") / "dino_deitsmall16_pretrain.pth"
    torch.save(values.state, path)
    return values, path


def test_dino_tokens_and_attention_equal_the_official_ones(dino: tuple, golden_images: Tensor) -> None:
    values, path = dino
    teacher = load_teacher(str(path))
    assert (every_seventh(teacher, golden_images) - values["tokens"]).abs().max() < 2e-4
    row = last_attention(teacher, golden_images)[:, :, 0, ::7]
    assert (row - values["last_attn_row"]).abs().max() < 2e-4


def test_dino_with_other_heads_or_statistics_fails_the_golden_test(
    dino: tuple, golden_images: Tensor
) -> None:
    values, path = dino
    state = {f"module.base_encoder.{key}": value for key, value in values.state.items()}
    torch.save({"state_dict": state}, path.with_name("twelve_heads.pth"))
    wrong = load_teacher(str(path.with_name("twelve_heads.pth")))
    assert (every_seventh(wrong, golden_images) - values["tokens"]).abs().max() > 1e-2
    half = load_teacher(str(path), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert (every_seventh(half, golden_images) - values["tokens"]).abs().max() > 1e-2


@pytest.mark.slow
def test_mae_tokens_equal_the_official_ones_from_the_whole_file(
    golden: Callable, golden_images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = golden("mae_vitb", 7)
    for key, width in (("pos_embed", 768), ("decoder_pos_embed", 512)):
        values.state[key] = torch.cat([torch.zeros(1, width), mae_positions(width)]).unsqueeze(0)
    torch.save({"model": values.state}, tmp_path / "mae_visualize_vit_base.pth")
    caplog.set_level("INFO", logger="fdkit")
    teacher = load_teacher(str(tmp_path / "mae_visualize_vit_base.pth"))
    assert "(decoder of masked patches)" in caplog.text
    assert (every_seventh(teacher, golden_images) - values["tokens"]).abs().max() < 2e-4
    teacher.backbone.network.norm = nn.Identity()
    assert (every_seventh(teacher, golden_images) - values["tokens"]).abs().max() > 1e-2


def mae_positions(width: int) -> Tensor:
    """MAE's fixed table: for patch (row, column), sin and cos of the column, then sin and cos of the row."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    angles = [position.reshape(-1, 1).double() * frequency for position in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


SMALL = {"depth": 2, "img_size": 48}


def randomised(backbone: Backbone) -> Backbone:
    generator = torch.Generator().manual_seed(3)
    for parameter in backbone.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator) * 0.05 + (parameter.data == 1).float()
        )
    return backbone.eval()


@pytest.fixture
def clip_tower() -> Backbone:
    """open_clip's own QuickGELU visual tower, two layers deep, as CLIP files name it."""
    config = {"image_size": 48, "layers": 2, "width": 768, "patch_size": 16}
    network = _build_vision_tower(512, CLIPVisionCfg(**config), quick_gelu=True)
    preprocessing = build_timm("vit_base_patch16_clip_quickgelu_224.openai", SMALL).preprocessing
    return randomised(
        _open_clip_backbone(network, recipe={"library": "open_clip"}, preprocessing=preprocessing)
    )


@pytest.mark.parametrize(
    ("name", "is_right"),
    [("vit_base_patch16_clip_quickgelu_224.openai", True), ("vit_base_patch16_clip_224.openai", False)],
)
def test_clip_tokens_of_timm_equal_open_clips(clip_tower: Backbone, name: str, is_right: bool) -> None:
    state = {f"visual.{key}": value for key, value in clip_tower.network.state_dict().items()}
    state["logit_scale"] = torch.tensor(4.6)
    backbone = build_timm(name, SMALL)
    fit_library(backbone, state, source="clip")
    images = torch.rand(2, 3, 48, 48)
    teacher = Teacher(backbone, name="timm")
    expected = Teacher(clip_tower, name="open_clip").encode(images)
    difference = (teacher.encode(images).all() - expected.all()).abs().max()
    assert (difference < 1e-4) == is_right
    by_hand = clip_tower.network
    raw = by_hand.transformer(by_hand._embeds(clip_tower.normalise(images)))
    assert torch.allclose(expected.all(), by_hand.ln_post(raw), atol=1e-5)


def test_open_clip_tower_loads_from_a_whole_clip_file(clip_tower: Backbone) -> None:
    state = {f"visual.{key}": value for key, value in clip_tower.network.state_dict().items()}
    # The text tower's names equal the image tower's without its prefix; these shapes too.
    state |= {"transformer.resblocks.0.ln_1.bias": torch.full((768,), 9.0), "ln_final.bias": torch.ones(8)}
    state |= {"logit_scale": torch.tensor(4.6), "text_projection": torch.ones(8, 8)}
    target = copy.deepcopy(clip_tower)
    for parameter in target.parameters():
        parameter.data.zero_()
    fit_library(target, state, source="clip")
    images = torch.rand(1, 3, 48, 48)
    pooled = Teacher(target, name="x").encode(images).prefix[:, 0] @ clip_tower.network.proj
    assert torch.allclose(pooled, clip_tower.network(clip_tower.normalise(images)), atol=1e-5)
    with pytest.raises(WeightsError, match=r"a CLIP model and 1 unknown tensors: other.weight"):
        fit_library(target, state | {"other.weight": torch.ones(1)}, source="clip")


@pytest.mark.parametrize(
    ("name", "args", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", {"depth": 2, "img_size": 56}, 5),
        (
            "vit_base_patch16_siglip_224.v2_webli",
            {"depth": 2, "img_size": 48, "embed_dim": 192, "num_heads": 3},
            0,
        ),
        ("deit_tiny_distilled_patch16_224.fb_in1k", {"depth": 2, "img_size": 48}, 2),
    ],
)
def test_tokens_are_those_of_timm_in_any_prefix(name: str, args: dict, prefix: int, tmp_path: Path) -> None:
    source = randomised(build_timm(name, args))
    target = build_backbone(source.recipe)
    fit_library(target, source.network.state_dict(), source="x")
    images = torch.rand(2, 3, args["img_size"], args["img_size"])
    tokens = Teacher(target, name="x").encode(images)
    assert tokens.prefix.shape[1] == prefix
    assert torch.allclose(tokens.all(), source.network.forward_features(source.normalise(images)), atol=1e-5)


def test_official_dinov2_file_with_registers_folds_the_class_position(tmp_path: Path) -> None:
    args = {"depth": 2, "img_size": 56, "reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}
    source = randomised(build_timm("vit_small_patch14_dinov2.lvd142m", args))
    state = dict(source.network.state_dict())
    class_position = torch.randn(1, 1, 384)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - class_position
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    teacher = load_teacher(str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    images = torch.rand(1, 3, 56, 56)
    assert teacher.num_prefix_tokens == 5
    assert torch.allclose(teacher.encode(images).all(), source(images).all(), atol=1e-5)


def test_real_vit_tiny_loads_whole(shared: Path) -> None:
    path = shared / "weights/vit_tiny_patch16_224/vit_tiny_patch16_224.safetensors"
    teacher = load_teacher(str(path))
    assert teacher.backbone.preprocessing.mean == teacher.backbone.preprocessing.std == (0.5, 0.5, 0.5)
    expected = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path)).eval()
    images = torch.rand(2, 3, 224, 224)
    tokens = teacher.encode(images).all()
    assert tokens.isfinite().all()
    wanted = expected.forward_features((images - 0.5) / 0.5)
    # The folded statistics round otherwise; how much depends on the processor's vector instructions.
    assert (tokens - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert teacher.sha256 in path.with_name("SHA256SUMS").read_text()
