"""The learning rate as a pure function of the step: linear warm-up, then half a cosine."""

import math
from typing import NamedTuple

from fdkit.training.optimizer import OptimizerConfig


class Schedule(NamedTuple):
    """Linear from `warmup_lr` to `peak_lr` over the warm-up, then half a cosine over what is left, to `min_lr`.

    Source: Feature Distillation's code (timm's CosineLRScheduler over num_steps - warmup_steps, warmup_prefix)
    and MoCo v3's; both have this one shape. Feature Distillation's loop applies each value one step late (its
    first value twice); here step t uses the value of t.
    """

    peak_lr: float
    """At the end of the warm-up, after scaling by the batch size."""
    warmup_lr: float
    """At step 0, scaled likewise."""
    min_lr: float
    """What the cosine tends to, scaled likewise."""
    warmup_steps: int
    num_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished updates; 0 <= step < num_steps."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def build_schedule(
    config: OptimizerConfig, *, batch_size: int, steps_per_epoch: int, num_steps: int
) -> Schedule:
    """The schedule of a run of `num_steps` updates; the one place where learning rates are scaled.

    batch_size: global. All three rates are multiplied by batch_size / lr_reference_batch.
    """
    scale = batch_size / config.lr_reference_batch if config.lr_reference_batch else 1.0
    return Schedule(
        peak_lr=config.lr * scale,
        warmup_lr=config.warmup_lr * scale,
        min_lr=config.min_lr * scale,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        num_steps=num_steps,
    )
