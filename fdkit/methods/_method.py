"""What the training loop knows about a training method."""

from typing import NamedTuple

from torch import Tensor, nn

from fdkit.data.views import Views
from fdkit.models.backbone import Backbone


class Duration(NamedTuple):
    """How long a run is and what a step of it takes, for methods that count in epochs or rows."""

    num_steps: int = 1
    """Optimiser steps of the whole run."""
    steps_per_epoch: int = 1
    batch_size: int = 2
    """Images a step, over all processes."""
    part_size: int = 2
    """Images that one process compares with each other at once: its share of a batch, or a part of that."""
    world_size: int = 1


class Holding(nn.Module):
    """A part of a method that notes something in its forward passes for after the optimiser's step."""

    def forget_held(self) -> None:
        """Drop what was noted since the last step."""
        raise AssertionError("a part that holds something can forget it")


class Method(nn.Module):
    """A training method: everything the loop runs, and nothing about how it runs.

    The file a method stands in is its name on the command line.
    """

    student: Backbone
    """What takes the gradient steps."""
    views: Views
    """What the loader makes from one image."""
    compares_images: bool = True
    """Whether the loss of an image hangs on the others of its batch, so that parts of a batch are another loss."""
    needs_labels: bool = False
    """Whether `forward` takes the images' labels, (B,) int64, as a third argument."""
    duration: Duration = Duration()
    """Of this run; `begin` sets it."""

    @property
    def exported(self) -> Backbone:
        """What is exported and evaluated: the student, where a method does not say otherwise."""
        return self.student

    def begin(self, duration: Duration) -> None:
        """Learn how long the run is, before its first step.

        Raises ConfigError for a batch that the method cannot use.
        """
        self.duration = duration

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """A scalar "loss" with gradient, and named detached scalars to log.

        views: one (B, 3, H, W) tensor in [0, 1] a view; progress: in [0, 1), the share of all steps already done.
        """
        raise AssertionError("a method defines forward")

    def before_step(self, progress: float) -> None:
        """Change gradients of the whole batch, before they are clipped; None keeps a parameter as it is."""

    def after_step(self, progress: float) -> None:
        """Update what follows the optimiser, such as a momentum encoder."""

    def skip_step(self) -> None:
        """Forget what the forward passes noted for `after_step`, which a step that is left out does not come to."""
        for part in self.modules():
            if isinstance(part, Holding):
                part.forget_held()

    def step(self, progress: float) -> int:
        """Optimiser steps already done."""
        return round(progress * self.duration.num_steps)

    def epoch(self, progress: float) -> float:
        """Epochs already done, parts of one included."""
        return self.step(progress) / self.duration.steps_per_epoch
