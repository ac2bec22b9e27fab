import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.schedule import build_schedule


def test_equals_timms_scheduler_as_feature_distillation_sets_it_up() -> None:
    config = OptimizerConfig(lr=3e-4, lr_reference_batch=512, warmup_epochs=3, warmup_lr=5e-7, min_lr=5e-6)
    schedule = build_schedule(config, batch_size=2048, steps_per_epoch=7, num_steps=70)
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = CosineLRScheduler(
        torch.optim.SGD([parameter], lr=4 * 3e-4),
        t_initial=70 - 21, lr_min=4 * 5e-6, warmup_lr_init=4 * 5e-7, warmup_t=21, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    for step in range(70):
        assert schedule(step) == pytest.approx(theirs._get_lr(step)[0], rel=1e-12), step


def test_equals_moco_v3s_formula_by_fractional_epochs() -> None:
    config = OptimizerConfig(lr=1.5e-4, lr_reference_batch=256, warmup_epochs=40, warmup_lr=0, min_lr=0)
    schedule = build_schedule(config, batch_size=4096, steps_per_epoch=312, num_steps=312 * 300)
    peak = 1.5e-4 * 4096 / 256
    for epoch, index in [(0, 0), (0, 1), (17, 200), (39, 311), (40, 0), (155, 77), (299, 311)]:
        now = epoch + index / 312
        expected = peak * now / 40 if now < 40 else peak * 0.5 * (1 + math.cos(math.pi * (now - 40) / 260))
        assert schedule(epoch * 312 + index) == pytest.approx(expected, rel=1e-9)


def test_rises_then_falls_and_scales_all_three_rates_alike() -> None:
    config = OptimizerConfig(lr=1.0, lr_reference_batch=8, warmup_epochs=2, warmup_lr=0.5, min_lr=0.25)
    one = build_schedule(config, batch_size=8, steps_per_epoch=5, num_steps=40)
    three = build_schedule(config, batch_size=24, steps_per_epoch=5, num_steps=40)
    values = [one(step) for step in range(40)]
    assert values[0] == 0.5
    assert values[10] == 1.0 == max(values)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0.25 < values[-1] < 0.26
    assert [three(step) for step in range(40)] == pytest.approx([3 * value for value in values])


def test_no_reference_batch_means_rates_as_given_and_no_warm_up_starts_at_the_peak() -> None:
    config = OptimizerConfig(lr=0.1, lr_reference_batch=None, warmup_epochs=0)
    assert build_schedule(config, batch_size=4096, steps_per_epoch=5, num_steps=10)(0) == 0.1
