import math

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.schedule import build_schedule, half_cosine


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


def dinos_scheduler(base: float, final: float, *, start: float, warmup: int, total: int) -> list[float]:
    """The values of a run, as the paper's code lists them beforehand."""
    rising = np.linspace(start, base, warmup)
    left = np.arange(total - warmup)
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))
    return [*rising.tolist(), *falling.tolist()]


def test_equals_dinos_list_whose_warm_up_ends_at_the_peak_and_whose_end_does_not_scale() -> None:
    config = OptimizerConfig(
        lr=5e-4, lr_reference_batch=256, warmup_epochs=3, warmup_lr=0, min_lr=1e-6,
        scale_min_lr=False, warmup_reaches_peak=True,
    )  # fmt: skip
    schedule = build_schedule(config, batch_size=1024, steps_per_epoch=7, num_steps=70)
    expected = dinos_scheduler(2e-3, 1e-6, start=0.0, warmup=21, total=70)
    assert [schedule(step) for step in range(70)] == pytest.approx(expected)


def test_steps_take_a_tenth_at_their_epochs() -> None:
    config = OptimizerConfig(
        lr=0.03, lr_reference_batch=None, warmup_epochs=0, lr_schedule="steps", lr_steps=(2, 3)
    )
    schedule = build_schedule(config, batch_size=8, steps_per_epoch=5, num_steps=20)
    assert [schedule(step) for step in (0, 9, 10, 14, 15, 19)] == pytest.approx(
        [0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003]
    )


def test_once_an_epoch_holds_the_cosines_value_at_its_start() -> None:
    config = OptimizerConfig(lr=0.1, lr_reference_batch=None, warmup_epochs=0, min_lr=0, lr_update="epoch")
    schedule = build_schedule(config, batch_size=8, steps_per_epoch=5, num_steps=20)
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(5)]
    assert [schedule(step) for step in range(20)] == pytest.approx(expected)


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    config = OptimizerConfig(
        lr=0.1, lr_reference_batch=None, warmup_epochs=1, warmup_lr=0, lr_schedule="constant"
    )
    schedule = build_schedule(config, batch_size=8, steps_per_epoch=2, num_steps=6)
    assert [schedule(step) for step in range(6)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1, 0.1])


def test_half_a_cosine_goes_from_start_to_end() -> None:
    assert [half_cosine(0.04, 0.4, share) for share in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
