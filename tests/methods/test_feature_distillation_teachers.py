"""One student, several teachers: weights, teacher dropping, and layers as targets."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import ConfigError
from fdkit.methods import _several_teachers
from fdkit.methods._several_teachers import dropped_mean, keep_teachers, normalised_weights
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.backbone import Backbone
from fdkit.models.distillation_target import whiten
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.teacher import Teacher
from fdkit.training.generators import seed_generators

VIT: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 48}
SWIN: dict[str, Any] = {
    "embed_dim": 12,
    "depths": (1, 1, 1),
    "num_heads": (1, 2, 3),
    "img_size": 64,
    "window_size": 4,
}


def _teacher(name: str = "vit", model: str = "vit_tiny_patch16_224", **args: Any) -> Teacher:
    backbone = build_timm(model, {**VIT, **args} if model != "resnet10t" else args)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 3)
    return Teacher(backbone, name=name)


def _three() -> list[Teacher]:
    """Teachers of other widths, grids, sizes and statistics; the second has no class token."""
    return [
        _teacher(),
        _teacher("resnet", "resnet10t", channels=(6, 8, 10, 14), img_size=96),
        _teacher("clip", "vit_base_patch16_clip_quickgelu_224", embed_dim=18, patch_size=8, depth=2),
    ]


def _student(**config: Any) -> Backbone:
    config = {"drop_path": 0, "depth": 2, **config}
    return build_student(StudentConfig(**config), _teacher().backbone, image_size=48, seed=1)


def _method(teachers: Any, student: Backbone | None = None, **config: Any) -> FeatureDistillation:
    settings = FeatureDistillationConfig(**config)
    return FeatureDistillation(
        teachers, student or _student(), RandomCrop(CropConfig(image_size=48)), settings
    ).train()


def _images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 48, 48, generator=torch.Generator().manual_seed(5))


def _alone(method: FeatureDistillation, number: int, **config: Any) -> FeatureDistillation:
    """What the method would be with one of its teachers alone."""
    alone = _method(method.teachers[number], method.student, **config)
    alone.projector.load_state_dict([method.projector, *method.further_projectors][number].state_dict())
    return alone


# One teacher


def test_one_teacher_gives_the_bits_of_the_plain_formula() -> None:
    """Written out for one teacher: projector from the seed, whitened target, one smooth-L1 over every token."""
    teacher, student = _teacher(), _student()
    method = FeatureDistillation(
        [teacher],
        copy.deepcopy(student),
        RandomCrop(CropConfig(image_size=48)),
        FeatureDistillationConfig(),
        seed=7,
    )
    found = method([_images()], 0.0)
    found["loss"].backward()
    assert list(found) == ["loss", "explained_variance"]
    assert {name.partition(".")[0] for name in method.state_dict()} == {"student", "projector"}

    torch.manual_seed(7)
    projector = torch.nn.Linear(24, 24)
    target = whiten(teacher.encode(_images()).all(), "layernorm")
    loss = F.smooth_l1_loss(projector(student(_images()).all()), target, beta=2.0)
    loss.backward()
    assert torch.equal(found["loss"], loss)
    assert torch.equal(method.projector.weight.grad, projector.weight.grad)  # type: ignore[arg-type]
    for one, other in zip(method.student.parameters(), student.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


# Several teachers


@pytest.mark.parametrize("weights", [None, (3.0, 1.0, 0.5)])
@pytest.mark.parametrize("target", ["feature_map", "pooled"])
def test_the_loss_is_the_weighted_mean_of_each_teachers_own(
    weights: tuple[float, ...] | None, target: str
) -> None:
    method = _method(_three(), teacher_weights=weights, target=target, whitening="batch")
    found = method([_images()], 0.0)
    shares = weights or (1.0, 1.0, 1.0)
    single = [
        _alone(method, number, target=target, whitening="batch")([_images()], 0.0) for number in range(3)
    ]
    for name in ("loss", "explained_variance"):
        mean = sum(share * one[name].item() for share, one in zip(shares, single, strict=True)) / sum(shares)
        assert found[name].item() == pytest.approx(mean, rel=1e-5)
        for teacher, one in zip(("vit", "resnet", "clip"), single, strict=True):
            assert found[f"{name}/{teacher}"].item() == pytest.approx(one[name].item(), rel=1e-5)
            assert not found[f"{name}/{teacher}"].requires_grad
    assert len(found) == 8


def test_each_teacher_has_a_projector_and_the_first_is_that_of_one_teacher() -> None:
    method = _method(_three())
    assert [teacher.name for teacher in method.teachers] == ["vit", "resnet", "clip"]
    widths = [projector.out_features for projector in (method.projector, *method.further_projectors)]  # type: ignore[union-attr]
    assert widths == [24, 14, 18]
    assert torch.equal(method.projector.weight, _method(_teacher()).projector.weight)
    groups = {name.partition(".")[0] for name in method.state_dict()}
    assert groups == {"student", "projector", "further_projectors"}
    method([_images()], 0.0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)
    assert all(weight.grad is None for teacher in method.teachers for weight in teacher.backbone.parameters())


def test_logits_and_stochastic_depth_go_with_several_teachers() -> None:
    teachers = [_teacher(num_classes=6), _teacher("b", num_classes=4, depth=2)]
    method = _method(teachers, target="logits", teacher_drop_path=0.4)
    assert (method.projector.out_features, method.further_projectors[0].out_features) == (6, 4)
    drawn = [method([_images(8)], 0.0)["loss/b"] for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(teachers[1].encode(_images()).patches, teachers[1].encode(_images()).patches)


def test_all_teachers_move_with_the_method() -> None:
    method = _method(_three()).double()
    assert {teacher.backbone.mean.dtype for teacher in method.teachers} == {torch.float64}


# Teacher dropping


def test_the_worst_imitated_teacher_is_never_dropped_and_others_as_often_as_asked() -> None:
    losses = torch.rand(4, 6000)
    kept = keep_teachers(losses, 0.7)
    worst = losses.argmax(dim=0)
    assert kept[worst, torch.arange(6000)].all()
    others = torch.ones_like(kept).scatter(0, worst[None], False)
    assert kept[others].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(kept[0], kept[1]), "each teacher is drawn for itself"
    assert keep_teachers(losses, 0.0).all()


def test_the_mean_is_over_what_is_kept_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.5, 8.0]])
    kept = torch.tensor([[True, True, False], [True, False, True]])
    monkeypatch.setattr(_several_teachers, "keep_teachers", lambda losses, probability: kept)
    weights = normalised_weights((3, 1), 2)
    expected = (3 * 1.0 + 3 * 4.0 + 1 * 3.0 + 1 * 8.0) / (3 + 3 + 1 + 1)
    assert dropped_mean(losses, weights, 0.5).item() == pytest.approx(expected)
    monkeypatch.setattr(_several_teachers, "keep_teachers", lambda losses, probability: torch.ones_like(kept))
    assert dropped_mean(losses, weights, 0.5).item() == pytest.approx((3 * 7.0 + 1 * 11.5) / (3 * 4))


def test_dropping_keeps_each_images_worst_teacher_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every other teacher dropped, the loss is the mean of each image's largest."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    method = _method(_three(), teacher_dropping=0.9)
    found = method([_images()], 0.0)
    single = torch.tensor(
        [[_alone(method, t)([_images()[i : i + 1]], 0.0)["loss"].item() for i in range(3)] for t in range(3)]
    )
    assert found["loss"].item() == pytest.approx(single.amax(dim=0).mean().item(), rel=1e-5)
    for teacher, losses in zip(("vit", "resnet", "clip"), single, strict=True):
        assert found[f"loss/{teacher}"].item() == pytest.approx(losses.mean().item(), rel=1e-5)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)


def test_dropping_draws_from_the_ranks_own_saved_generator() -> None:
    method, drawn = _method(_three(), teacher_dropping=0.5), []
    for rank in (0, 1, 0):
        seed_generators(3, rank)
        drawn.append(method([_images(8)], 0.0)["loss"].item())
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]


def test_without_dropping_and_in_evaluation_nothing_is_drawn() -> None:
    dropping = _method(_three(), teacher_dropping=0.5)
    plain = _method(dropping.teachers, dropping.student)
    state = torch.get_rng_state()
    losses = [method([_images()], 0.0)["loss"].item() for method in (plain, dropping.eval())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def _kept() -> Tensor:
    return torch.tensor([[True, True, False, True], [True, False, True, False]])


def _losses() -> Tensor:
    return torch.tensor([[1.0, 4.0, 2.0, 3.0], [3.0, 0.5, 8.0, 1.0]])


def _mean_of_half(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _several_teachers.keep_teachers = lambda losses, probability: _kept().chunk(2, dim=1)[rank]
    torch.save(dropped_mean(_losses().chunk(2, dim=1)[rank], (0.75, 0.25), 0.5), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_dropping_on_two_ranks_means_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over ranks, which data-parallel training takes of gradients, is the loss of the whole batch."""
    torch.multiprocessing.spawn(_mean_of_half, args=(str(tmp_path),), nprocs=2)
    halves = torch.stack([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])
    monkeypatch.setattr(_several_teachers, "keep_teachers", lambda losses, probability: _kept())
    torch.testing.assert_close(halves.mean(), dropped_mean(_losses(), (0.75, 0.25), 0.5))


# Layers as targets


@pytest.mark.parametrize(("layer", "norm"), [(1, True), (1, False), (-3, True), (None, False)])
def test_the_target_is_the_layers_own_output(layer: int | None, norm: bool) -> None:
    teacher = _teacher()
    method = _method(teacher, layer=layer, norm=norm)
    network: Any = teacher.backbone.network
    seen: list[Tensor] = []
    number = -1 if layer is None else layer
    hook = network.blocks[number].register_forward_hook(lambda *call: seen.append(call[2].clone()))
    found = method([_images()], 0.0)["loss"]
    hook.remove()
    target = F.layer_norm(seen[0], (24,), network.norm.weight, network.norm.bias, 1e-6) if norm else seen[0]
    prediction = method.projector(method.student(_images()).all())
    expected = F.smooth_l1_loss(prediction, F.layer_norm(target, (24,)), beta=2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    final = _method(teacher, method.student)([_images()], 0.0)["loss"]
    assert not math.isclose(found.item(), final.item(), rel_tol=1e-4)


def test_an_earlier_stage_of_swin_is_a_target_of_its_own_width_and_grid() -> None:
    backbone = build_timm("swin_tiny_patch4_window7_224", SWIN)
    teacher = Teacher(backbone, name="swin")
    method = _method(teacher, layer=1, norm=False)
    assert method.projector.out_features == 24
    assert method([_images()], 0.0)["loss"].isfinite()
    with pytest.raises(
        ConfigError, match="layer 1: the final norm of SwinTransformer fits its last stage alone"
    ):
        _method(teacher, layer=1)


# What cannot be


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target": "logits", "layer": 1}, "distillation.layer 1 has no effect on the target logits"),
        ({"target": "logits", "norm": False}, "distillation.norm false has no effect on the target logits"),
        ({"layer": 3}, "layer 3: VisionTransformer has 3 layers"),
        ({"teacher_dropping": 0.5}, "distillation.teacher_dropping has no effect on one teacher"),
        ({"teacher_weights": (1.0,)}, "distillation.teacher_weights has no effect on one teacher"),
    ],
)
def test_settings_without_effect_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _method(_teacher(num_classes=5), **config)


def test_weights_and_names_must_suit_the_teachers() -> None:
    with pytest.raises(ConfigError, match=r"has 2 numbers for 3 teachers \(vit, resnet, clip\)"):
        _method(_three(), teacher_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="teacher vit is named twice"):
        _method([_teacher(), _teacher()])
    for wrong in ({"teacher_weights": (1.0, 0.0)}, {"teacher_dropping": 1.0}):
        with pytest.raises(ValueError, match=r"greater than 0|less than 1"):
            FeatureDistillationConfig(**wrong)  # type: ignore[arg-type]
