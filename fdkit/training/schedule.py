"""Learning rate and weight decay as pure functions of the step."""

import math
from typing import NamedTuple

from fdkit.training.optimizer import OptimizerConfig, Shape

STEP_FACTOR = 0.1
"""What "steps" multiplies the learning rate by at each of its epochs."""


class Schedule(NamedTuple):
    """Linear from `warmup_lr` to `peak_lr` over the warm-up, then what `shape` says over what is left.

    "cosine" is half a cosine, to `min_lr`. Source: Feature Distillation's code (timm's CosineLRScheduler over
    num_steps - warmup_steps, warmup_prefix) and MoCo v3's; both have this one form. Feature Distillation's loop applies
    each value one step late (its first value twice); here step t uses the value of t.
    """

    peak_lr: float
    """At the end of the warm-up, after scaling by the batch size."""
    warmup_lr: float
    """At step 0, scaled likewise."""
    min_lr: float
    """What the cosine tends to."""
    warmup_steps: int
    num_steps: int
    shape: Shape = "cosine"
    milestones: tuple[int, ...] = ()
    """Steps at which "steps" multiplies the rate by 0.1."""
    hold_steps: int = 1
    """Steps that share one value, that of the first of them; an epoch's, or 1."""
    warmup_reaches_peak: bool = False
    """The last step of the warm-up has the peak rate already, and so has the step after it."""

    def __call__(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished updates; 0 <= step < num_steps."""
        if step < self.warmup_steps:
            intervals = max(1, self.warmup_steps - self.warmup_reaches_peak)
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / intervals
        step -= step % self.hold_steps
        if self.shape == "steps":
            return self.peak_lr * STEP_FACTOR ** sum(step >= milestone for milestone in self.milestones)
        if self.shape == "constant":
            return self.peak_lr
        share = max(0, step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return half_cosine(self.peak_lr, self.min_lr, share)


def half_cosine(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, after a share of the way in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def build_schedule(
    config: OptimizerConfig, *, batch_size: int, steps_per_epoch: int, num_steps: int
) -> Schedule:
    """The schedule of a run of `num_steps` updates; the one place where learning rates are scaled.

    batch_size: global. The rates are multiplied by batch_size / lr_reference_batch; min_lr if scale_min_lr says so.
    """
    scale = batch_size / config.lr_reference_batch if config.lr_reference_batch else 1.0
    return Schedule(
        peak_lr=config.lr * scale,
        warmup_lr=config.warmup_lr * scale,
        min_lr=config.min_lr * (scale if config.scale_min_lr else 1.0),
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        num_steps=num_steps,
        shape=config.lr_schedule,
        milestones=tuple(round(epoch * steps_per_epoch) for epoch in config.lr_steps),
        hold_steps=steps_per_epoch if config.lr_update == "epoch" else 1,
        warmup_reaches_peak=config.warmup_reaches_peak,
    )
