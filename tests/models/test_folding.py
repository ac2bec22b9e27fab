"""Statistics folded into the first convolution, held against the same network on images normalised by hand."""

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fdkit.analysis.observe import observe_attention
from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Preprocessing, Tokens
from fdkit.models.folding import PixelConv2d, Statistics, fold, folded_statistics
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.teacher import Teacher

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 48}
MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.4, 1.6)


def _timm(name: str, **args: Any) -> Backbone:
    size = args.get("img_size", 64)
    return build_timm(name, args, preprocessing=Preprocessing(MEAN, STD, size))


FOLDABLE: dict[str, Callable[[], Backbone]] = {
    "vit": lambda: _timm("vit_tiny_patch16_224", **TINY),
    "clip_without_bias": lambda: _timm("vit_base_patch16_clip_quickgelu_224", **TINY),
    "beit": lambda: _timm("beit_base_patch16_224", **TINY),
    "eva": lambda: _timm("eva02_tiny_patch14_224", **{**TINY, "img_size": 56}),
    "swin": lambda: _timm("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), img_size=56),
    "mixer": lambda: _timm("mixer_s32_224", img_size=64),
    "convnext": lambda: _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
    "open_clip": lambda: build_open_clip(
        "ViT-B-32", {"image_size": 64}, preprocessing=Preprocessing(MEAN, STD, 64)
    ),
}
UNFOLDABLE: dict[str, Callable[[], Backbone]] = {
    "resnet": lambda: _timm("resnet18"),
    "overlapping_stem": lambda: _timm("convnext_atto_ols", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
    "clip_resnet": lambda: build_open_clip("RN50", {"image_size": 64}),
}
COMPILERS = ("g++", "clang++", os.environ.get("CXX", "c++"))


def _seeded(make: Callable[[], Backbone]) -> Backbone:
    torch.manual_seed(0)
    backbone = make().eval()
    for name, parameter in backbone.network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return backbone


def _images(backbone: Backbone, count: int = 2) -> Tensor:
    return torch.rand(count, 3, backbone.image_size, backbone.image_size)


def _by_hand(backbone: Backbone, images: Tensor) -> Tokens:
    """What a plain network says of images normalised in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    tokens: Tokens = backbone.tokens_of(
        copy.deepcopy(backbone.network).double(), (images.double() - mean) / std
    )
    return tokens


def _distance(tokens: Tokens, expected: Tokens) -> float:
    difference = (tokens.all().double() - expected.all()).norm() / expected.all().norm()
    return float(difference)


@pytest.mark.parametrize("family", FOLDABLE)
@torch.no_grad()
def test_folded_tokens_are_those_of_normalised_images(family: str) -> None:
    backbone = _seeded(FOLDABLE[family])
    images = _images(backbone)
    expected = _by_hand(backbone, images)
    assert backbone.fold_statistics()
    assert _distance(backbone(images), expected) < 1e-5
    assert _distance(copy.deepcopy(backbone)(images), expected) < 1e-5
    assert _distance(copy.deepcopy(backbone).double()(images), expected) < 1e-12


@pytest.mark.parametrize("family", UNFOLDABLE)
@torch.no_grad()
def test_a_convolution_that_pads_is_left_alone(family: str) -> None:
    backbone = _seeded(UNFOLDABLE[family])
    images = _images(backbone)
    before = backbone(images).all()
    assert not backbone.fold_statistics()
    assert folded_statistics(backbone.network) is None
    assert torch.equal(backbone(images).all(), before)


def test_patch_embeddings_that_pad_are_left_alone() -> None:
    statistics = Statistics(MEAN, STD)
    padding = timm.create_model("vit_tiny_patch16_224", **TINY)
    padding.patch_embed.proj = nn.Conv2d(3, 24, 16, 16, padding=1)
    assert not fold(padding, statistics)
    assert not fold(timm.create_model("vit_tiny_patch16_224", **TINY, dynamic_img_pad=True), statistics)
    assert not fold(timm.create_model("vit_tiny_patch16_224", **TINY, in_chans=1), statistics)
    assert not fold(nn.Conv2d(3, 4, 2), statistics)


@torch.no_grad()
def test_folding_twice_is_folding_once() -> None:
    backbone = _seeded(FOLDABLE["vit"])
    images = _images(backbone)
    assert backbone.fold_statistics()
    tokens = backbone(images).all()
    assert backbone.fold_statistics()
    assert torch.equal(backbone(images).all(), tokens)


@torch.no_grad()
def test_the_state_dict_stays_and_new_weights_count() -> None:
    backbone, other = _seeded(FOLDABLE["vit"]), FOLDABLE["vit"]().eval()
    plain = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    images = _images(backbone)
    backbone.fold_statistics()
    folded = backbone.network.state_dict()
    assert folded.keys() == plain.keys()
    assert all(torch.equal(folded[key], plain[key]) for key in plain)
    backbone.network.load_state_dict(other.network.state_dict())
    assert _distance(backbone(images), _by_hand(other, images)) < 1e-5


def test_gradients_are_those_of_the_plain_network() -> None:
    backbone = _seeded(FOLDABLE["vit"])
    plain = copy.deepcopy(backbone)
    images = _images(backbone)
    backbone.fold_statistics()
    for model in (backbone, plain):
        model(images).all().square().sum().backward()
    for name in ("weight", "bias"):
        ours, theirs = (getattr(model.network.patch_embed.proj, name).grad for model in (backbone, plain))  # type: ignore[union-attr]
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@torch.no_grad()
def test_every_way_into_the_network_knows_that_it_is_folded() -> None:
    backbone = _seeded(lambda: _timm("vit_tiny_patch16_224", **TINY, num_classes=5))
    images = _images(backbone)
    plain = copy.deepcopy(backbone)
    backbone.fold_statistics()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(backbone.logits(images), plain.logits(images), **close)
    torch.testing.assert_close(backbone.normalise(images), plain.normalise(images))
    teachers = [Teacher(model, name="tiny") for model in (backbone, plain)]
    ours, theirs = (teacher.encode(images, layer=[0, -1]) for teacher in teachers)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.all(), other.all(), **close)
    seen: list[list[Tensor]] = [[], []]
    for teacher, attention in zip(teachers, seen, strict=True):
        observe_attention(teacher, images, lambda _, values, kept=attention: kept.append(values))  # type: ignore[misc]
    torch.testing.assert_close(seen[0], seen[1], **close)


def test_other_statistics_for_a_folded_network_are_refused() -> None:
    backbone = _seeded(FOLDABLE["vit"])
    backbone.fold_statistics()
    other = Backbone(
        backbone.network,
        backbone.tokens_of,
        embed_dim=24,
        patch_size=16,
        num_prefix_tokens=1,
        preprocessing=backbone.preprocessing._replace(mean=(0.5, 0.5, 0.5)),
        recipe={},
    )
    assert not other.fold_statistics()
    with pytest.raises(ConfigError, match=r"folded as .*0\.9.*this backbone states .*0\.5"):
        other(_images(backbone))


@pytest.mark.parametrize("family", ["vit", "clip_without_bias"])
@torch.no_grad()
def test_in_half_precision_images_are_normalised_before_they_are_rounded(family: str) -> None:
    plain = _seeded(FOLDABLE[family])
    folded = copy.deepcopy(plain)
    folded.fold_statistics()
    images = _images(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(images).all(), plain(images).all())
    plain, folded = plain.to(torch.bfloat16), folded.to(torch.bfloat16)
    assert torch.equal(folded(images).all(), plain(images).all())
    conv = next(module for module in folded.modules() if isinstance(module, PixelConv2d))
    assert conv.statistics.mean.dtype == torch.float32


def test_shapes_are_told_without_memory() -> None:
    backbone = FOLDABLE["vit"]().eval()
    backbone.fold_statistics()
    assert backbone.to("meta")(_images(backbone).to("meta")).patches.shape == (2, 9, 24)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_teacher_compiles_whole(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    backbone = _seeded(FOLDABLE["vit"])
    backbone.fold_statistics()
    teacher = Teacher(backbone, name="tiny").to(dtype)
    images = _images(backbone)
    eager = teacher.encode(images)
    backbone.compile(fullgraph=True)
    compiled = teacher.encode(images)
    assert (compiled.grid, compiled.patches.dtype) == (eager.grid, dtype)
    difference = (compiled.all() - eager.all()).norm() / eager.all().norm()
    assert difference < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(copy.deepcopy(teacher).encode(images).patches, eager.patches)
