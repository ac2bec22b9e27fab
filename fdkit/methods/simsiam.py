"""SimSiam: predict one view of an image from the other with one network, and do not follow the answer's gradient.

One network and one projector see both views; a predictor turns the projection of one into that of the other. The
projection that is predicted counts as a constant, and this alone keeps all outputs from becoming one: there is no
slow copy, no wrong answer and no large batch. It is BYOL without the moving average.
Source: Chen and He 2020 (arXiv 2011.10566); what the paper leaves open follows facebookresearch/simsiam at a7bc177.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import TwoViews, TwoViewsConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.batch_norm import each_apart
from fdkit.models.heads import mlp_head
from fdkit.models.representation import channel_std

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"architecture": "resnet50", "pooling": "patches"},
    "views": {
        "min_scale": 0.2,
        "saturation": 0.4,
        "blur_probability": (0.5, 0.5),
        "solarize_probability": (0.0, 0.0),
    },
}


class SimSiamConfig(Config):
    """SimSiam; the defaults are those of the paper."""

    num_projector_layers: int = Field(default=3, ge=1)
    """Layers of the projector, whose hidden ones are as wide as the feature: 3, or 2 for CIFAR-10."""
    output_dim: int = Field(default=2048, ge=2)
    """Width of the projections and of their predictions."""
    predictor_hidden_dim: int = Field(default=512, ge=1)
    """Width of the predictor's hidden layer, a quarter of output_dim in the paper: a bottleneck."""


class SimSiam(Method):
    """Predictions from one view against projections of the other, which count as constants, both ways.

    seed: of the heads' initial weights, which are drawn without touching the global generator.
    A batch norm sees one view at a time. The paper keeps the predictor's learning rate at its peak, which is the
    optimiser's part: `optim.constant_lr: [predictor]`.
    """

    def __init__(
        self,
        student: Backbone,
        views: Views,
        config: SimSiamConfig,
        *,
        pooling: Pooling = "patches",
        seed: int,
    ) -> None:
        super().__init__()
        if views.num_views != 2:
            raise ConfigError(f"SimSiam compares 2 views of an image; the views make {views.num_views}")
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = build_projector(student.embed_dim, config)
            self.predictor = mlp_head(
                [config.output_dim, config.predictor_hidden_dim, config.output_dim], last_bias=True
            )

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for a batch of a single image, which batch norms cannot use."""
        check_batch_norm(self, duration)
        super().begin(duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1].
        loss: mean over both directions of the negative cosine; in [-1, 1], about 0 at first (Chen and He 2020,
        equation 4). projection_std: of projections scaled to length 1, about 1 / sqrt(output_dim) when healthy
        (section 4.1); feature_std: of the network's own features likewise. Both fall to 0 in a collapse.
        """
        features = [self.student.pooled(view, self.pooling) for view in views]
        projections = each_apart(self.projector, features)
        predictions = each_apart(self.predictor, projections)
        cosines = [
            mean_cosine(predictions[0], projections[1].detach()),
            mean_cosine(predictions[1], projections[0].detach()),
        ]
        return {
            "loss": -(cosines[0] + cosines[1]) / 2,
            "projection_std": (channel_std(projections[0]) + channel_std(projections[1])) / 2,
            "feature_std": (channel_std(features[0]) + channel_std(features[1])) / 2,
        }


def mean_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows (B, d) of the cosine between prediction and target, in float32 or finer."""
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    return F.cosine_similarity(predictions.to(dtype), targets.to(dtype), dim=1).mean()


def build_projector(width: int, config: SimSiamConfig) -> nn.Sequential:
    """Linear layers, each with a batch norm, the last without scale and shift; (B, width) to (B, output_dim).

    The last layer has a bias that keeps its first value, as that of the official code: the norm behind it takes it
    away again, but a checkpoint holds it.
    """
    hidden = [width] * (config.num_projector_layers - 1)
    projector = mlp_head([width, *hidden, config.output_dim], last_bias=True, last_norm="plain")
    bias = projector[-2].bias
    assert isinstance(bias, nn.Parameter)
    bias.requires_grad_(False)
    return projector


def build(config: SimSiamConfig, views: TwoViewsConfig, network: NetworkConfig, *, seed: int) -> SimSiam:
    """SimSiam on two equally augmented views of each image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(network, image_size=views.image_size)
    return SimSiam(student, TwoViews(views), config, pooling=network.pooling, seed=seed)
