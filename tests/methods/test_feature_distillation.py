import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdkit.data.views import CropConfig, RandomCrop, TwoViews, TwoViewsConfig
from fdkit.errors import ConfigError
from fdkit.methods.feature_distillation import (
    FeatureDistillation,
    FeatureDistillationConfig,
    explained_variance,
)
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.distillation_target import paired_tokens, resample, whiten
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.teacher import Teacher

VIT: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 48}


def _teacher(**args: Any) -> Teacher:
    backbone = build_timm("vit_tiny_patch16_224", {**VIT, **args})
    with torch.no_grad():
        backbone.network.norm.weight.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return Teacher(backbone, name="tiny")


def _method(teacher: Teacher, student: Backbone | None = None, **config: Any) -> FeatureDistillation:
    student = student or build_student(StudentConfig(drop_path=0), teacher.backbone, image_size=48, seed=1)
    views = RandomCrop(CropConfig(image_size=48))
    return FeatureDistillation(teacher, student, views, FeatureDistillationConfig(**config)).train()


def _images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 48, 48, generator=torch.Generator().manual_seed(5))


def _naive_loss(prediction: Tensor, target: Tensor, beta: float) -> float:
    """Smooth-L1 against the whitened target, one number at a time."""
    total, count = 0.0, 0
    for guess, vector in zip(prediction.flatten(0, 1).tolist(), target.flatten(0, 1).tolist(), strict=True):
        mean = sum(vector) / len(vector)
        variance = sum((x - mean) ** 2 for x in vector) / len(vector)
        for g, x in zip(guess, vector, strict=True):
            gap = abs(g - (x - mean) / math.sqrt(variance + 1e-5))
            total += gap**2 / (2 * beta) if gap < beta else gap - beta / 2
            count += 1
    return total / count


def test_the_loss_equals_a_naive_loop_over_all_tokens() -> None:
    teacher = _teacher()
    method = _method(teacher)
    network = teacher.backbone.network
    with torch.no_grad():
        method.projector.weight.mul_(30)
        found = method([_images()], 0.0)["loss"]
        prediction = method.projector(method.student(_images()).all())
        target = network.forward_features((_images() - 0.5) / 0.5)  # type: ignore[operator]
    assert found.item() == pytest.approx(_naive_loss(prediction, target, beta=2.0), rel=1e-4)


def test_the_target_is_white_for_every_token() -> None:
    target = whiten(_teacher().encode(_images()).all(), "layernorm")
    assert target.mean(dim=-1).abs().max() < 1e-5
    assert (target.var(dim=-1, unbiased=False) - 1).abs().max() < 1e-4


def test_the_loss_ignores_the_teachers_scale_and_offset() -> None:
    teacher = _teacher()
    method = _method(teacher)
    before = method([_images()], 0.0)["loss"]
    tokens_of = teacher.backbone.tokens_of

    def scaled(network: Any, images: Tensor) -> Tokens:
        tokens = tokens_of(network, images)
        return tokens._replace(prefix=3 * tokens.prefix + 5, patches=3 * tokens.patches + 5)

    teacher.backbone.tokens_of = scaled
    torch.testing.assert_close(method([_images()], 0.0)["loss"], before, rtol=1e-4, atol=0)


def test_predicting_nothing_costs_what_a_gaussian_target_costs() -> None:
    target = whiten(torch.randn(2000, 384), "layernorm")
    loss = torch.nn.functional.smooth_l1_loss(torch.zeros_like(target), target, beta=2.0)
    assert loss.item() == pytest.approx(0.2470, abs=0.002)


def test_batch_whitening_is_per_channel_over_all_vectors() -> None:
    target = whiten(torch.randn(2, 5, 7) * torch.arange(1.0, 8) + 3, "batch").flatten(0, 1)
    assert target.mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(target.var(dim=0, unbiased=False), torch.ones(7), rtol=1e-3, atol=1e-3)


def _whiten_half(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(whiten(_uneven_target().chunk(2)[rank], "batch"), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _uneven_target() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, 7, generator=generator) + torch.arange(4.0).view(4, 1, 1)


@pytest.mark.distributed
def test_batch_whitening_on_two_ranks_equals_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_whiten_half, args=(str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), whiten(_uneven_target(), "batch"))


def test_l2_whitening_gives_unit_vectors_and_none_changes_nothing() -> None:
    target = torch.randn(2, 5, 7)
    torch.testing.assert_close(whiten(target, "l2").norm(dim=-1), torch.ones(2, 5))
    assert torch.equal(whiten(target, "none"), target)


def test_gradients_reach_the_student_and_never_the_teacher() -> None:
    teacher = _teacher()
    before = copy.deepcopy(teacher.backbone.network.state_dict())
    method = _method(teacher)
    method([_images()], 0.0)["loss"].backward()
    table = method.student.network.rel_pos_bias.relative_position_bias_table  # type: ignore[union-attr]
    assert table.grad.abs().sum() > 0  # type: ignore[union-attr, operator]
    assert all(parameter.grad is None for parameter in teacher.backbone.parameters())
    names = {name.partition(".")[0] for name in method.state_dict()}
    assert names == {"student", "projector"}
    assert all(
        torch.equal(value, before[key]) for key, value in teacher.backbone.network.state_dict().items()
    )


def test_bfloat16_autocast_leaves_target_and_loss_in_float32() -> None:
    method = _method(_teacher())
    exact = method([_images()], 0.0)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        scalars = method([_images()], 0.0)
    assert scalars["loss"].dtype == torch.float32
    torch.testing.assert_close(scalars["loss"], exact, rtol=0.02, atol=0)


def test_explained_variance_is_1_for_the_target_and_0_for_its_mean() -> None:
    target = torch.randn(2, 5, 7) + 4
    assert explained_variance(target, target).item() == pytest.approx(1)
    mean = target.flatten(0, 1).mean(dim=0).expand_as(target)
    assert explained_variance(mean, target).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(torch.zeros_like(target), target) < 0


@pytest.mark.parametrize("registers", [0, 4])
def test_registers_take_no_part_and_class_tokens_meet(registers: int) -> None:
    student = Tokens(torch.ones(2, 1, 7), torch.zeros(2, 15, 7), (3, 5))
    teacher = Tokens(
        torch.arange(1.0 + registers).view(1, -1, 1).expand(2, -1, 9), torch.zeros(2, 15, 9), (3, 5)
    )
    first, second = paired_tokens(student, teacher)
    assert first.shape == (2, 16, 7)
    assert second.shape == (2, 16, 9)
    assert second[:, 0].abs().sum() == 0


def test_without_a_class_token_on_either_side_only_patches_meet() -> None:
    student = Tokens(torch.ones(2, 1, 7), torch.zeros(2, 15, 7), (3, 5))
    teacher = Tokens(torch.ones(2, 0, 9), torch.zeros(2, 15, 9), (3, 5))
    assert [x.shape[1] for x in paired_tokens(student, teacher)] == [15, 15]


def test_resampling_keeps_rows_and_columns_apart() -> None:
    """A ramp down the rows stays a ramp down the rows, and its mean stays."""
    ramp = torch.arange(3.0).repeat_interleave(5).view(1, 15, 1)
    resized = resample(Tokens(ramp[:, :0], ramp, (3, 5)), (6, 5)).view(6, 5)
    assert (resized.std(dim=1) < 1e-6).all()
    assert (resized[:, 0].diff() >= 0).all()
    assert resized.mean().item() == pytest.approx(1)


def test_a_swin_sized_grid_meets_a_vit_grid() -> None:
    teacher = _teacher()
    student = build_timm("resnet18", {"img_size": 64})
    method = _method(teacher, student)
    assert method([_images()], 0.0)["loss"].isfinite()


def test_pooled_and_logits_targets_are_one_vector_an_image() -> None:
    teacher = _teacher(num_classes=6)
    for target, width in (("pooled", 24), ("logits", 6)):
        method = _method(teacher, target=target)
        assert method.projector.out_features == width
        loss = method([_images()], 0.0)["loss"]
        expected = (
            teacher.encode(_images()).patches.mean(1)
            if target == "pooled"
            else teacher.backbone.logits(_images())
        )
        prediction = method.projector(method.student(_images()).patches.mean(dim=1))
        naive = _naive_loss(prediction[None].detach(), expected[None].detach(), beta=2.0)
        assert loss.item() == pytest.approx(naive, rel=1e-4)


def test_teacher_drop_path_makes_targets_random_and_spares_the_original() -> None:
    teacher = _teacher()
    method = _method(teacher, teacher_drop_path=0.5)
    targets = [method.teacher.encode(_images(8)).patches for _ in range(2)]
    assert not torch.equal(*targets)
    assert torch.equal(teacher.encode(_images()).patches, teacher.encode(_images()).patches)
    assert not method.teacher.training


def test_the_projector_starts_like_pytorchs_from_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again = _method(_teacher()), _method(_teacher())
    assert torch.equal(first.projector.weight, again.projector.weight)
    assert first.projector.weight.abs().max() <= 1 / math.sqrt(24)
    assert not torch.equal(torch.random.get_rng_state(), state)  # _teacher itself draws


def test_settings_that_cannot_work_are_refused() -> None:
    teacher = _teacher()
    with pytest.raises(ConfigError, match="no classifier or projection"):
        _method(teacher, target="logits")
    student = build_student(StudentConfig(), teacher.backbone, image_size=48, seed=1)
    with pytest.raises(ConfigError, match="1 view; the views make 2"):
        FeatureDistillation(teacher, student, TwoViews(TwoViewsConfig()), FeatureDistillationConfig())
    convolutional = Teacher(build_timm("resnet18", {}), name="resnet18")
    with pytest.raises(ConfigError, match="stochastic depth"):
        _method(convolutional, student, teacher_drop_path=0.1)
