import copy

import pytest
import torch
from torch import nn

from fdkit.errors import ConfigError
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


def test_encode_gives_any_layers_in_the_order_asked_for(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 32, 40)
    final = teacher.encode(images)
    first, last = teacher.encode(images, layer=(0, -1))
    assert teacher.num_layers == 2
    assert torch.equal(last.all(), final.all())
    assert torch.equal(teacher.encode(images, layer=1).all(), final.all())
    assert torch.equal(teacher.encode(images, layer=-2).all(), first.all())
    assert teacher.encode(images, layer=[0])[0].patches.shape == (2, 16, 48)
    assert first.prefix.shape == (2, 3, 48)
    assert not torch.allclose(first.patches, final.patches)


def test_without_the_norm_tokens_are_as_the_last_block_leaves_them(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 32, 32)
    network = teacher.backbone.network
    seen: list[torch.Tensor] = []
    hook = network.blocks[-1].register_forward_hook(lambda *call: seen.append(call[2]))  # type: ignore[union-attr, index, operator]
    raw = teacher.encode(images, norm=False)
    hook.remove()
    assert torch.equal(raw.all(), seen[0])
    assert torch.equal(network.norm(raw.all()), teacher.encode(images).all())  # type: ignore[operator]


def test_layers_too_are_without_gradient_and_resized(teacher: Teacher) -> None:
    Holder(teacher).train()
    images = torch.rand(2, 3, 64, 24, requires_grad=True)
    for tokens in teacher.encode(images, layer=(0, 1)):
        assert not tokens.patches.requires_grad
        assert not tokens.patches.is_inference()
        assert tokens.grid == (4, 4)
    assert torch.equal(teacher.encode(images, layer=1).patches, teacher.encode(images).patches)


def test_folded_statistics_and_bfloat16_give_the_same_last_layer(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 32, 32)
    assert teacher.backbone.fold_statistics()
    for dtype in (torch.float32, torch.bfloat16):
        tokens = teacher.to(dtype).encode(images, layer=1)
        assert tokens.patches.dtype == dtype
        assert torch.equal(tokens.all(), teacher.encode(images).all())


def test_the_width_of_a_layer_is_what_encode_gives() -> None:
    args = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 4}
    swin = Teacher(build_timm("swin_tiny_patch4_window7_224", args), name="swin")
    images = torch.rand(1, 3, 64, 64)
    for layer, norm in ((None, True), (None, False), (0, False), (1, True), (-2, False)):
        width = swin.encode(images, layer=layer, norm=norm).patches.shape[-1]
        assert swin.layer_dim(layer, norm=norm) == width
    with pytest.raises(
        ConfigError, match="layer 0: the final norm of SwinTransformer fits its last stage alone"
    ):
        swin.layer_dim(0)
    with pytest.raises(ConfigError, match="layer 2: SwinTransformer has 2 layers"):
        swin.layer_dim(2, norm=False)


def test_identity_is_plain_data(teacher: Teacher) -> None:
    identity = teacher.identity()
    assert identity["name"] == "tiny"
    assert identity["source"] == "timm:tiny"
    assert (identity["license"], identity["sha256"]) == ("mit", "ab")
    assert identity["is_noncommercial"] is False
    bound = Teacher(teacher.backbone, name="bound", license="cc-by-nc-4.0", is_noncommercial=True)
    assert bound.identity()["is_noncommercial"] is True
    assert identity["recipe"]["architecture"] == "vit_tiny_patch16_224"


def test_a_copy_is_a_teacher_of_its_own(teacher: Teacher) -> None:
    other = copy.deepcopy(teacher)
    images = torch.rand(1, 3, 32, 32)
    expected = teacher.encode(images).patches
    next(other.backbone.parameters()).zero_()
    other.double()
    assert torch.equal(teacher.encode(images).patches, expected)
