"""What the training loop knows about a training method."""

from torch import Tensor, nn

from fdkit.data.views import Views
from fdkit.models.backbone import Backbone


class Method(nn.Module):
    """A training method: everything the loop runs, and nothing about how it runs.

    The file a method stands in is its name on the command line.
    """

    student: Backbone
    """What is exported and evaluated."""
    views: Views
    """What the loader makes from one image."""

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """A scalar "loss" with gradient, and named detached scalars to log.

        views: one (B, 3, H, W) tensor in [0, 1] a view; progress: in [0, 1), the share of all steps already done.
        """
        raise AssertionError("a method defines forward")

    def after_step(self, progress: float) -> None:
        """Update what follows the optimiser, such as a momentum encoder."""
