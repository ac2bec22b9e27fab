import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from fdkit.models.libraries import build_backbone, build_open_clip, build_timm, load_backbone, save_backbone
from fdkit.models.student import StudentConfig, build_student

VIT: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 48, "mlp_ratio": 3}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "img_size": 56}


@pytest.fixture(scope="module")
def teacher() -> Backbone:
    return build_timm("vit_tiny_patch16_224", VIT)


def _student(teacher: Backbone, *, image_size: int = 48, seed: int = 1, **config: Any) -> Any:
    return build_student(StudentConfig(**config), teacher, image_size=image_size, seed=seed)


def test_a_vit_student_has_the_teachers_sizes_and_its_own_position(teacher: Backbone) -> None:
    student = _student(teacher)
    network = student.network
    assert (student.embed_dim, len(network.blocks), network.blocks[0].attn.num_heads) == (24, 2, 3)
    assert network.blocks[0].mlp.fc1.out_features == 72
    assert (student.patch_size, student.num_prefix_tokens, student.image_size) == (16, 1, 48)
    assert (student.preprocessing.mean, student.preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    names = dict(network.named_parameters())
    assert not [name for name in names if "pos_embed" in name or "k_bias" in name]
    assert names["blocks.1.gamma_2"].tolist() == pytest.approx([0.1] * 24)


def test_the_shared_table_has_a_row_for_every_offset_and_three_for_the_class_token() -> None:
    teacher = build_timm("vit_tiny_patch16_224", {**VIT, "img_size": 224, "embed_dim": 12, "num_heads": 12})
    bias = _student(teacher, image_size=224).network.rel_pos_bias
    index = bias.relative_position_index
    assert bias.relative_position_bias_table.shape == (732, 12)
    assert (index[0, 0], set(index[0, 1:].tolist()), set(index[1:, 0].tolist())) == (731, {729}, {730})
    assert (index[1:, 1:].min(), index[1:, 1:].max()) == (0, 728)
    for query, key in ((0, 195), (17, 30), (100, 3)):
        rows, columns = query // 14 - key // 14, query % 14 - key % 14
        assert index[1 + query, 1 + key] == (rows + 13) * 27 + columns + 13
        assert index[1 + key, 1 + query] == 728 - index[1 + query, 1 + key]


@pytest.mark.parametrize(
    ("position", "owner"),
    [("shared_rpb", "rel_pos_bias."), ("rpb", "blocks.1.attn.relative"), ("absolute", "pos_embed")],
)
def test_each_position_has_its_parameter_and_no_other(teacher: Backbone, position: str, owner: str) -> None:
    names = [name for name, _ in _student(teacher, position=position).network.named_parameters()]
    owners = {"rel_pos_bias.", "blocks.1.attn.relative", "pos_embed"}
    assert {start for start in owners if any(name.startswith(start) for name in names)} == {owner}


def test_patches_may_be_permuted_only_while_the_bias_is_zero(teacher: Backbone) -> None:
    network = _student(teacher, drop_path=0).network.eval()
    images = torch.rand(1, 3, 48, 48)
    order = torch.tensor([4, 0, 8, 2, 1, 7, 3, 5, 6])

    def permuted(x: Tensor) -> Tensor:
        cells = x.unfold(2, 16, 16).unfold(3, 16, 16).reshape(1, 3, 9, 16, 16)[:, :, order]
        return cells.reshape(1, 3, 3, 3, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 48, 48)

    def mismatch() -> float:
        with torch.no_grad():
            moved, still = network.forward_features(permuted(images)), network.forward_features(images)
        return float((moved[:, 1:] - still[:, 1:][:, order]).abs().max())

    assert mismatch() < 1e-6
    torch.nn.init.normal_(network.rel_pos_bias.relative_position_bias_table)
    assert mismatch() > 1e-4


def test_initial_weights_are_cut_at_one_deviation_and_scaled_by_depth() -> None:
    teacher = build_timm("vit_tiny_patch16_224", {**VIT, "embed_dim": 96})
    network = _student(teacher).network
    effective = 0.02 * 0.5396  # of a unit normal cut at +-1
    for weight in (network.blocks[0].attn.qkv.weight, network.blocks[1].mlp.fc1.weight, network.cls_token):
        assert weight.abs().max() <= 0.02
    assert network.blocks[1].mlp.fc1.weight.std().item() == pytest.approx(effective, rel=0.02)
    for number, block in enumerate(network.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(effective / math.sqrt(2 * number), rel=0.03)
        assert block.attn.q_bias.abs().sum() + block.mlp.fc1.bias.abs().sum() == 0
    assert network.rel_pos_bias.relative_position_bias_table.abs().sum() == 0


def test_stochastic_depth_grows_linearly(teacher: Backbone) -> None:
    network = _student(teacher, drop_path=0.3, depth=4).network
    rates = [getattr(block.drop_path2, "drop_prob", 0) for block in network.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_weights_follow_the_seed_alone(teacher: Backbone) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (_student(teacher, seed=seed).network.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["cls_token"], other["cls_token"])


def test_sizes_may_be_chosen(teacher: Backbone) -> None:
    student = _student(teacher, width=16, depth=1, num_heads=4, patch_size=8)
    assert (student.embed_dim, len(student.network.blocks), student.patch_size) == (16, 1, 8)
    assert student.network.blocks[0].attn.num_heads == 4
    assert _student(teacher, width=16).network.blocks[0].attn.num_heads == 2


def test_a_swin_student_is_swin_v2_with_the_teachers_stages() -> None:
    teacher = build_timm("swin_tiny_patch4_window7_224", SWIN)
    student = _student(teacher, image_size=56, drop_path=0.3)
    network = student.network
    assert type(network).__name__ == "SwinTransformerV2"
    assert [len(layer.blocks) for layer in network.layers] == [1, 2]
    assert [layer.blocks[0].attn.num_heads for layer in network.layers] == [2, 4]
    assert network.layers[1].blocks[1].norm2.weight.tolist() == pytest.approx([1e-5] * 32)
    images = torch.rand(2, 3, 56, 56)
    assert student(images).grid == teacher(images).grid == (7, 7)
    assert student.embed_dim == teacher.embed_dim


def test_a_clip_teacher_gives_the_students_sizes() -> None:
    student = _student(build_open_clip("ViT-B-32"), image_size=64, depth=1)
    assert (student.embed_dim, student.patch_size, student.network.blocks[0].attn.num_heads) == (768, 32, 12)
    assert student.network.blocks[0].mlp.fc1.out_features == 3072


def test_a_named_student_is_that_timm_model(teacher: Backbone) -> None:
    student = _student(teacher, name="resnet18", drop_path=0.1, image_size=64)
    assert (student.image_size, student.embed_dim) == (64, 512)
    assert student.preprocessing.mean == IMAGENET_MEAN


def test_a_student_comes_back_from_its_folder_and_from_timm(teacher: Backbone, tmp_path: Any) -> None:
    student = _student(teacher).eval()
    torch.nn.init.normal_(student.network.rel_pos_bias.relative_position_bias_table)
    save_backbone(student, tmp_path)
    images = torch.rand(1, 3, 48, 48)
    recipe = build_backbone(student.recipe).recipe
    weights = str(tmp_path / "student.safetensors")
    alone = timm.create_model(recipe["architecture"], **recipe["model_args"], checkpoint_path=weights).eval()
    with torch.no_grad():
        expected = student(images).all()
        torch.testing.assert_close(load_backbone(tmp_path)(images).all(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            alone.forward_features(student.normalise(images)), expected, rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be_built_is_explained(teacher: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"student\.position rpb has no effect: student resnet18"):
        _student(teacher, name="resnet18", position="rpb")
    with pytest.raises(ConfigError, match=r"neither a ViT nor a Swin"):
        _student(build_timm("resnet18", {}))
    with pytest.raises(ConfigError, match=r"student\.width 8 has no effect: a student like a Swin"):
        _student(build_timm("swin_tiny_patch4_window7_224", SWIN), width=8)
    with pytest.raises(ConfigError, match="25 wide does not divide into 3 heads"):
        _student(teacher, width=25)
    with pytest.raises(ConfigError, match="50 does not divide into patches of 16"):
        _student(teacher, image_size=50)
    with pytest.raises(ConfigError, match=r"vgg11 refuses .*drop_path_rate"):
        _student(teacher, name="vgg11")
