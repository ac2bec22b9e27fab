from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.teachers.diagnosis import Check, built_in_images, diagnose, formula_images, golden_feature
from fdkit.teachers.official import Change
from fdkit.teachers.request import Loaded
from fdkit.teachers.teacher import Teacher

CPU = torch.device("cpu")


def trained_vit() -> Backbone:
    """A small ViT whose every parameter has left its initial value."""
    backbone = build_timm(
        "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 48}
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def checks_of(backbone: Backbone, golden: dict[str, Any] | None = None, **facts: Any) -> dict[str, Check]:
    loaded = Loaded(backbone, "here", **{"license": "MIT", "sha256": "ab" * 32, **facts})
    teacher = Teacher(backbone, name="x")
    return {check.name: check for check in diagnose(loaded, teacher, golden=golden or {}, device=CPU)}


def statuses(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "wrong"}


def test_a_sound_teacher_has_nothing_wrong() -> None:
    checks = checks_of(trained_vit())
    assert statuses(checks) == set()
    assert checks["golden feature"].status == "note"
    assert checks["licence"] == Check("licence", "ok", "MIT")


def test_random_weights_are_not_to_be_trusted() -> None:
    fresh = build_timm("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 48})
    assert statuses(checks_of(fresh, sha256=None)) == {"weights", "tensors", "training"}
    assert statuses(checks_of(fresh)) == {"training"}


def constant(network: Any) -> None:
    """Features that do not see the image: a patch embedding of zeros."""
    network.patch_embed.proj.weight.data.zero_()


def one_direction(network: Any) -> None:
    """Every token a multiple of one vector."""
    network.norm = nn.Sequential(network.norm, nn.Linear(48, 1, bias=False), nn.Linear(1, 48, bias=False))


def infinite(network: Any) -> None:
    network.blocks[1].mlp.fc2.bias.data[3] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (constant, {"tells images apart", "tells images (class token) apart"}),
        (one_direction, {"tells patches apart"}),
        (infinite, {"finite"}),
    ],
)
def test_degenerate_features_are_found(spoil: Callable[[Any], None], wrong: set[str]) -> None:
    backbone = trained_vit()
    spoil(backbone.network)
    checks = checks_of(backbone)
    assert statuses(checks) >= wrong
    assert all(checks[name].remedy for name in wrong)


def test_the_golden_feature_tells_the_right_network_from_a_wrong_one() -> None:
    backbone = trained_vit()
    stored = {"ab" * 32: golden_feature(Teacher(backbone, name="x"), CPU)}
    assert checks_of(backbone, stored)["golden feature"].status == "ok"
    backbone.network.blocks[0].attn.num_heads = 6  # loads as well, and means something else
    backbone.network.blocks[0].attn.head_dim = 8
    backbone.network.blocks[0].attn.scale = 8**-0.5
    wrong = checks_of(backbone, stored)["golden feature"]
    assert wrong.status == "wrong"
    assert "differ from the stored ones" in wrong.detail
    other_size = {"ab" * 32: {**stored["ab" * 32], "image_size": 224}}
    assert checks_of(trained_vit(), other_size)["golden feature"].detail.endswith("at this image size")


def test_assumptions_audit_and_licences_are_told() -> None:
    audit = (Change("a", "a", ""), Change("b", "c", "renamed"), Change("head.weight", None, "classifier"))
    checks = checks_of(
        trained_vit(), audit=audit, assumption="3 heads", license="cc-by-nc-4.0", is_noncommercial=True
    )
    assert checks["tensors"].detail.startswith("1 used as they stand, 1 renamed or converted, 1 left out")
    assert checks["assumed"].detail == "3 heads"
    assert "non-commercial" in checks["licence"].detail
    assert checks_of(trained_vit(), license="unstated")["licence"].status == "note"


def test_built_in_images_are_images_and_differ() -> None:
    images = built_in_images(40)
    assert images.shape == (6, 3, 40, 40)
    assert images.min() >= 0
    assert images.max() <= 1
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(6)
    assert distances.min() > 5


def test_formula_images_are_the_formula() -> None:
    def value(number: int, channel: int, y: float, x: float) -> Tensor:
        angle = 2 * torch.pi * ((1 + number) * x + (channel + 1) * (0.5 + number) * y * x) + number + channel
        return 0.5 + 0.5 * torch.tensor(angle, dtype=torch.float64).sin()

    images = formula_images(5)
    assert float(images[3, 2, 1, 4]) == pytest.approx(float(value(3, 2, 0.25, 1.0)), abs=1e-6)
    assert float(images[0, 1, 4, 2]) == pytest.approx(float(value(0, 1, 1.0, 0.5)), abs=1e-6)
