import copy

import pytest
import torch
from torch import nn

from fdkit.models.libraries import build_timm
from fdkit.teachers.teacher import Teacher

ARGS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "reg_tokens": 2}


@pytest.fixture
def teacher() -> Teacher:
    backbone = build_timm("vit_tiny_patch16_224", {**ARGS, "drop_path_rate": 0.5})
    return Teacher(backbone, name="tiny", source="timm:tiny", license="mit", sha256="ab")


class Holder(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = nn.Linear(2, 2)


def test_a_method_with_a_teacher_has_only_its_own_parameters(teacher: Teacher) -> None:
    holder = Holder(teacher)
    assert list(teacher.parameters()) == []
    assert teacher.state_dict() == {}
    assert list(teacher.buffers()) == []
    assert {name for name, _ in holder.named_parameters()} == {"student.weight", "student.bias"}
    assert holder.state_dict().keys() == {"student.weight", "student.bias"}
    assert not any(parameter.requires_grad for parameter in teacher.backbone.parameters())


def test_stays_in_eval_and_so_is_deterministic(teacher: Teacher) -> None:
    holder = Holder(teacher).train()
    assert holder.student.training
    assert not any(module.training for module in [teacher, *teacher.backbone.modules()])
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(teacher.encode(images).patches, teacher.encode(images).patches)


def test_moves_with_its_holder(teacher: Teacher) -> None:
    Holder(teacher).double()
    kinds = {tensor.dtype for tensor in [*teacher.backbone.parameters(), teacher.backbone.mean]}
    assert kinds == {torch.float64}
    assert teacher.encode(torch.rand(1, 3, 32, 32)).patches.dtype == torch.float64
    Holder(teacher).to("meta")
    assert teacher.backbone.std.is_meta
    assert next(teacher.backbone.parameters()).is_meta


def test_encode_gives_targets_that_backward_may_keep(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 32, 40, requires_grad=True)
    tokens = teacher.encode(images)
    assert tokens.prefix.shape == (2, teacher.num_prefix_tokens, 48)
    assert tokens.patches.shape == (2, 16, 48)
    assert (teacher.embed_dim, teacher.patch_size, teacher.image_size) == (48, 8, 32)
    assert teacher.num_prefix_tokens == 3
    assert not tokens.patches.requires_grad
    assert not tokens.patches.is_inference()
    weight = torch.ones(48, requires_grad=True)
    (weight * tokens.patches).sum().backward()
    assert weight.grad is not None


def test_identity_is_plain_data(teacher: Teacher) -> None:
    identity = teacher.identity()
    assert identity["name"] == "tiny"
    assert identity["source"] == "timm:tiny"
    assert (identity["license"], identity["sha256"]) == ("mit", "ab")
    assert identity["recipe"]["architecture"] == "vit_tiny_patch16_224"


def test_a_copy_is_a_teacher_of_its_own(teacher: Teacher) -> None:
    other = copy.deepcopy(teacher)
    images = torch.rand(1, 3, 32, 32)
    expected = teacher.encode(images).patches
    next(other.backbone.parameters()).zero_()
    other.double()
    assert torch.equal(teacher.encode(images).patches, expected)
