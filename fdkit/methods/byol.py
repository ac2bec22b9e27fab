"""BYOL: predict a slow copy's view of an image from one's own view of it, without wrong answers to compare with.

The student, a projector and a predictor see one view of an image; a target network, which follows student and
projector as a moving average, sees the other. The prediction shall point where the target's projection points. No
other image enters the loss: the predictor, the slow target and the batch norms keep all outputs from becoming one.
Source: Grill et al. 2020 (arXiv 2006.07733); what the paper leaves open follows google-deepmind/deepmind-research at
f5de0ed, folder byol.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import TwoViews, TwoViewsConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods._resnet import with_full_residuals
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.batch_norm import each_apart
from fdkit.models.heads import mlp_head
from fdkit.models.momentum import MomentumSchedule, follow, momentum_at
from fdkit.models.representation import channel_std, unit_rows

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"architecture": "resnet50", "pooling": "patches"},
    "views": {"interpolation": "bicubic"},
}


class BYOLConfig(Config):
    """BYOL; the defaults are those of 300 epochs."""

    hidden_dim: int = Field(default=4096, ge=1)
    """Width of the hidden layers of projector and predictor."""
    output_dim: int = Field(default=256, ge=2)
    """Width of the projections and of their predictions."""
    num_projector_layers: int = Field(default=2, ge=1)
    """Layers of the projector; the predictor has 2."""
    momentum: float = Field(default=0.99, ge=0, le=1)
    """Share of itself the target keeps at an optimiser step, at the start; 0.996 for 1000 epochs."""
    momentum_schedule: MomentumSchedule = "cosine"
    """How momentum goes on: rising to 1 along half a cosine, or constant."""


class BYOL(Method):
    """Predictions of a student's projections of one view against a target's projections of the other, both ways.

    target: a network like the student, of other random weights, as published: target and student do not start equal.
    seed: of the heads' initial weights, which are drawn without touching the global generator.

    A batch norm sees one view at a time. The target's stay in training mode, with statistics of their own.
    """

    def __init__(
        self,
        student: Backbone,
        views: Views,
        config: BYOLConfig,
        *,
        target: Backbone,
        pooling: Pooling = "patches",
        seed: int,
    ) -> None:
        super().__init__()
        if views.num_views != 2:
            raise ConfigError(f"BYOL compares 2 views of an image; the views make {views.num_views}")
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        projector_widths = [
            student.embed_dim,
            *[config.hidden_dim] * (config.num_projector_layers - 1),
            config.output_dim,
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = build_head(projector_widths)
            self.predictor = build_head([config.output_dim, config.hidden_dim, config.output_dim])
            target_projector = build_head(projector_widths)
        self.target_student = target.requires_grad_(False)
        self.target_projector = target_projector.requires_grad_(False)

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for a batch of a single image, which batch norms cannot use."""
        check_batch_norm(self, duration)
        super().begin(duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1].
        loss: sum over both directions of the mean squared distance of unit vectors, 2 - 2 cosine; in [0, 8], about 4
        at first (Grill et al. 2020, equation 2). positive_similarity: mean cosine of a prediction and its target.
        projection_std, feature_std: of the student's projections and of its network's own features, scaled to length
        1; they fall to 0 in a collapse.
        """
        features = [self.student.pooled(view, self.pooling) for view in views]
        projections = each_apart(self.projector, features)
        predictions = each_apart(self.predictor, projections)
        with torch.no_grad():
            seen = [self.target_student.pooled(view, self.pooling) for view in views]
            targets = each_apart(self.target_projector, seen)
        distances = [
            squared_distance(predictions[0], targets[1]),
            squared_distance(predictions[1], targets[0]),
        ]
        loss = distances[0] + distances[1]
        return {
            "loss": loss,
            "positive_similarity": 1 - loss.detach() / 4,
            "projection_std": (channel_std(projections[0]) + channel_std(projections[1])) / 2,
            "feature_std": (channel_std(features[0]) + channel_std(features[1])) / 2,
        }

    def after_step(self, progress: float) -> None:
        """Move the target towards the student as the optimiser has just left it.

        progress: before that step, so that the first move has the first momentum.
        """
        momentum = momentum_at(progress, self.config.momentum, self.config.momentum_schedule)
        follow(self.target_student, self.student, momentum)
        follow(self.target_projector, self.projector, momentum)


def squared_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows (B, d), scaled to length 1, of the squared distance between prediction and target; in [0, 4]."""
    return (unit_rows(predictions) - unit_rows(targets)).square().sum(dim=1).mean()


def build_head(widths: list[int]) -> nn.Sequential:
    """Linear layers, hidden ones with bias and batch norm, the last with neither; (B, widths[0]) to (B, widths[-1]).

    Matrices start from a normal distribution of std 1 / sqrt(inputs) cut at two of it, biases from 0: Haiku's.
    """
    head = mlp_head(widths, hidden_bias=True)
    for layer in head:
        if isinstance(layer, nn.Linear):
            std = 1 / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return head


def build(config: BYOLConfig, views: TwoViewsConfig, network: NetworkConfig, *, seed: int) -> BYOL:
    """BYOL on two unequally augmented views of each image; residual branches of a ResNet do not start at zero."""
    network = with_full_residuals(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(network, image_size=views.image_size)
        target = build_network(network, image_size=views.image_size)
    return BYOL(student, TwoViews(views), config, target=target, pooling=network.pooling, seed=seed)
