"""SimCLR: contrastive learning of two views within one batch, without labels, momentum or queue.

Every view of every image is an anchor. Among the 2N - 1 other views of the batch, all ranks', it must pick the other
view of its own image; the rest are wrong answers, those of the same augmentation too. Nothing is held constant: the
gradient flows through both sides of every comparison. A large batch, strong colour changes and a projector that is
thrown away afterwards are what make it work.
Source: Chen et al. 2020 (arXiv 2002.05709); what the paper leaves open follows google-research/simclr at 383d414, and
at be133b3, its first release, where the two differ.
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
from fdkit.methods._contrast import Contrast
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.collectives import gather_rows_with_gradient, rank
from fdkit.models.heads import mlp_head
from fdkit.models.representation import channel_std, unit_rows

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {
        "architecture": "resnet50",
        "pooling": "patches",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    },
    "views": {
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "blur_probability": (0.5, 0.5),
        "solarize_probability": (0.0, 0.0),
        "interpolation": "bicubic",
    },
}


class SimCLRConfig(Config):
    """SimCLR; the defaults are those of the paper."""

    num_projector_layers: int = Field(default=2, ge=1)
    """Layers of the projector: 2 in the paper, 3 in SimCLR v2."""
    hidden_dim: int | None = Field(default=None, ge=1)
    """Width of the projector's hidden layers; null: that of the feature, as published."""
    output_dim: int = Field(default=128, ge=2)
    """Width of the vectors that are compared."""
    temperature: float = Field(default=0.1, gt=0)
    """Divides the cosines before the softmax: 0.1 for ImageNet, 0.5 for CIFAR-10."""


class SimCLR(Method):
    """Every view against all other views of the batch.

    seed: of the projector's initial weights, which are drawn without touching the global generator.
    Both views go through the network as one batch, so that batch norms see 2N images of all ranks, as published.
    With gradient accumulation an image meets those of its own part only: the batch that counts is the part.
    """

    def __init__(
        self,
        student: Backbone,
        views: Views,
        config: SimCLRConfig,
        *,
        pooling: Pooling = "patches",
        seed: int,
    ) -> None:
        super().__init__()
        if views.num_views != 2:
            raise ConfigError(f"SimCLR compares 2 views of an image; the views make {views.num_views}")
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = build_projector(student.embed_dim, config)

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for a single image, which has nothing to differ from."""
        check_batch_norm(self, duration)
        super().begin(duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1].
        loss: as `normalised_cross_entropy` says. positive_similarity: mean cosine of the two views of an image; top1:
        share of views nearest to their own image's other view; feature_std: of the network's own features.
        """
        features = self.student.pooled(torch.cat(views), self.pooling)  # (2B, C)
        first, second = self.projector(features).chunk(2)
        contrast = normalised_cross_entropy(first, second, temperature=self.config.temperature)
        return {
            "loss": contrast.loss,
            "positive_similarity": contrast.positive_similarity,
            "top1": contrast.top1,
            "feature_std": channel_std(features),
        }


def build_projector(width: int, config: SimCLRConfig) -> nn.Sequential:
    """Linear layers without bias, each with a batch norm, the last with a scale alone; (B, width) to (B, output_dim).

    Matrices start from a normal distribution of std 0.01.
    """
    hidden = [config.hidden_dim or width] * (config.num_projector_layers - 1)
    projector = mlp_head([width, *hidden, config.output_dim], last_norm="scale")
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    return projector


def normalised_cross_entropy(first: Tensor, second: Tensor, *, temperature: float) -> Contrast:
    """How well each of two views (B, d) of this rank's B images finds the other, by cosine, among those of all ranks.

    The candidates of an anchor are the 2N - 1 other views of the N images. The loss is the mean over first views of
    -log softmax(cosines / temperature)[own other view], plus the same of second views: twice the paper's equation 1
    averaged over 2N anchors, as the official objective.py has it.
    """
    with torch.autocast(first.device.type, enabled=False):
        rows = torch.stack([unit_rows(first), unit_rows(second)])  # (2, B, d)
        everyone = gather_rows_with_gradient(rows.transpose(0, 1)).transpose(0, 1)  # (2, N, d)
        labels = rank() * len(first) + torch.arange(len(first), device=first.device)
        contrasts = [
            _direction(rows[view], everyone[1 - view], everyone[view], labels, temperature)
            for view in range(2)
        ]
    one, other = contrasts
    return Contrast(
        one.loss + other.loss,
        (one.positive_similarity + other.positive_similarity) / 2,
        (one.top1 + other.top1) / 2,
    )


def _direction(anchors: Tensor, others: Tensor, same: Tensor, labels: Tensor, temperature: float) -> Contrast:
    """Anchors (B, d) against all views of the other kind (N, d) and of their own, without themselves."""
    cosines = anchors @ torch.cat([others, same]).T  # (B, 2N)
    columns = torch.arange(cosines.shape[1], device=cosines.device)
    itself = columns == (labels + len(others))[:, None]  # not one_hot, which reads the labels
    cosines = cosines.masked_fill(itself, -torch.inf)
    loss = F.cross_entropy(cosines / temperature, labels)
    cosines = cosines.detach()
    positive_similarity = cosines.gather(1, labels[:, None]).mean()
    return Contrast(loss, positive_similarity, (cosines.argmax(dim=1) == labels).float().mean())


def build(config: SimCLRConfig, views: TwoViewsConfig, network: NetworkConfig, *, seed: int) -> SimCLR:
    """SimCLR on two equally augmented views of each image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(network, image_size=views.image_size)
    return SimCLR(student, TwoViews(views), config, pooling=network.pooling, seed=seed)
