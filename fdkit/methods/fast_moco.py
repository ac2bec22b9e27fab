"""Fast-MoCo: MoCo with many positives an image, from combinations of the parts of each view.

The network sees each view in m x m tiles, one by one; the features of every n of them are combined into one, and each
combination predicts the other view: its target is that view as a whole, through a momentum encoder. A query must pick
its own image's target among those of the whole batch, all ranks'. Divide, encode, combine, contrast: the encoder's
work stays that of one view, and the positives of an image become 2 * C(m^2, n).
Source: Ci et al. 2022 (arXiv 2207.08220); what the paper leaves open follows orashi/Fast-MoCo at d4fef97.
"""

from itertools import combinations
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import TwoViews, TwoViewsConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._contrast import info_nce
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.collectives import gather_rows, rank
from fdkit.models.heads import mlp_head
from fdkit.models.momentum import follow, momentum_copy
from fdkit.models.representation import channel_std

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"architecture": "resnet50", "pooling": "patches"},
    "views": {
        "min_scale": 0.2,
        "interpolation": "bicubic",
        "saturation": 0.4,
        "blur_probability": (0.5, 0.5),
        "solarize_probability": (0.0, 0.0),
    },
}


class FastMoCoConfig(Config):
    """Fast-MoCo; the defaults are those of the published ResNet-50."""

    num_divisions: int = Field(default=2, ge=1)
    """Tiles along each side of a view, m: the network encodes m x m of them, of views.image_size / m pixels."""
    num_combined: int = Field(default=2, ge=1)
    """Tiles whose features make one query, n: every n of the m x m do."""
    combination: Literal["mean", "weighted", "max"] = "mean"
    """How n features become one: their mean, gamma * first + (1 - gamma) * second of a pair, or the largest value of
    each channel."""
    gamma: float | None = Field(default=None, ge=0, le=1)
    """Weight of a pair's first tile in the combination weighted, tiles counted down the columns; null in others."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the two hidden layers of the projector."""
    output_dim: int = Field(default=2048, ge=2)
    """Width of the projector's output, of queries and of targets."""
    predictor_dim: int = Field(default=512, ge=1)
    """Width of the hidden layer of the predictor."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the cosines before the softmax."""
    target: Literal["independent", "copy", "shared"] = "independent"
    """What encodes the targets: a momentum encoder, which starts from random weights of its own, as the official code
    does, or as a copy of the network; or the network itself, without gradient and momentum, as SimSiam has it."""
    momentum: float | None = Field(default=0.99, ge=0, le=1)
    """Share of itself the momentum encoder keeps at an optimiser step; null for the target shared, which has none."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        num_tiles = self.num_divisions**2
        if self.num_combined > num_tiles:
            raise ConfigError(
                f"fast_moco.num_combined {self.num_combined}: {self.num_divisions} divisions a side make "
                f"{num_tiles} tiles",
                f"use --fast-moco.num-combined {num_tiles} or less",
            )
        if self.combination == "weighted" and self.num_combined != 2:
            raise ConfigError(
                f"fast_moco.combination weighted weighs 2 tiles, not {self.num_combined}",
                "use --fast-moco.num-combined 2, or the combination mean",
            )
        if (self.combination == "weighted") != (self.gamma is not None):
            raise ConfigError(
                f"fast_moco.combination {self.combination} and fast_moco.gamma {self.gamma} do not go together",
                "give --fast-moco.gamma with the combination weighted, and with no other",
            )
        if (self.target == "shared") != (self.momentum is None):
            raise ConfigError(
                f"fast_moco.target {self.target} and fast_moco.momentum {self.momentum} do not go together",
                "use --fast-moco.momentum null with the target shared, and a number with the others",
            )
        return self


class FastMoCo(Method):
    """Queries of combined tiles of one view against targets of the whole other view.

    student: takes images of the views' size and of a tile's. momentum_student: a network like it, where the targets
    come from a momentum encoder; None for the target shared.
    seed: of the heads' initial weights, which are drawn without touching the global generator.
    Batch norms are synchronised already. Those of the student see all tiles of a view together, those of the heads all
    its combinations, and those of the momentum encoder the whole view.
    """

    def __init__(
        self,
        student: Backbone,
        views: Views,
        config: FastMoCoConfig,
        *,
        momentum_student: Backbone | None,
        pooling: Pooling = "patches",
        seed: int,
    ) -> None:
        super().__init__()
        assert (momentum_student is None) == (config.momentum is None), (
            "one momentum encoder for one momentum"
        )
        if views.num_views != 2:
            raise ConfigError(f"Fast-MoCo compares 2 views of an image; the views make {views.num_views}")
        tile_size = tile_size_of(views.image_size, config.num_divisions)
        if tile_size not in (student.image_size, *student.sizes):
            raise ConfigError(
                f"the network would resize tiles of {tile_size} pixels; build it to take them as they are"
            )
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        self.subsets = list(combinations(range(config.num_divisions**2), config.num_combined))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = self._projector()
            self.predictor = mlp_head(
                [config.output_dim, config.predictor_dim, config.output_dim], hidden_bias=True, last_bias=True
            )
            own_projector = self._projector()
        self.momentum_student = momentum_student
        self.momentum_projector = None
        if momentum_student is not None:
            momentum_student.requires_grad_(False)
            is_copy = config.target == "copy"
            self.momentum_projector = momentum_copy(self.projector if is_copy else own_projector)
        self._is_momentum_due = True

    def _projector(self) -> nn.Sequential:
        """Three layers with biases, a batch norm with scale and shift after each."""
        hidden, out = self.config.hidden_dim, self.config.output_dim
        return mlp_head(
            [self.student.embed_dim, hidden, hidden, out],
            hidden_bias=True,
            last_bias=True,
            last_norm="affine",
        )

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for batch norms that would see a single image."""
        super().begin(duration)
        check_batch_norm(self, duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1], of the whole views; progress: share of all optimiser steps done.
        loss: mean over the combinations of both views of the cross-entropy, without a factor for the temperature.
        positive_similarity: mean cosine of a query and its target; top1: share of queries nearest to their target.
        feature_std: of the features of single tiles, since queries would hide a collapse behind their batch norms.
        """
        is_learning = self.training and torch.is_grad_enabled()
        features = [
            self.student.pooled(divide(view, self.config.num_divisions), self.pooling) for view in views
        ]
        queries = [self.predictor(self.projector(self._combine(rows))) for rows in features]
        with torch.no_grad():
            if is_learning:
                self._move_momentum_encoder()
            gathered = gather_rows(torch.stack([self._target(view) for view in views], dim=1))  # (N, 2, d)
        first_label = rank() * len(views[0])
        contrasts = [
            info_nce(rows, gathered[:, other], temperature=self.config.temperature, first_label=first_label)
            for combined, other in ((queries[0], 1), (queries[1], 0))
            for rows in combined.chunk(len(self.subsets))
        ]
        return {
            "loss": torch.stack([contrast.loss for contrast in contrasts]).mean(),
            "positive_similarity": torch.stack(
                [contrast.positive_similarity for contrast in contrasts]
            ).mean(),
            "top1": torch.stack([contrast.top1 for contrast in contrasts]).mean(),
            "feature_std": (channel_std(features[0]) + channel_std(features[1])) / 2,
        }

    def after_step(self, progress: float) -> None:
        """Let the next forward pass move the momentum encoder: the student has changed."""
        self._is_momentum_due = True

    def _combine(self, features: Tensor) -> Tensor:
        """One row for every subset and image, (S * B, C), subset by subset, of features of tiles (T * B, C)."""
        tiles = features.unflatten(0, (self.config.num_divisions**2, -1))
        return torch.cat([self._combine_subset([tiles[i] for i in subset]) for subset in self.subsets])

    def _combine_subset(self, tiles: list[Tensor]) -> Tensor:
        """One feature (B, C) of some tiles' features (B, C)."""
        if self.config.gamma is not None:
            return self.config.gamma * tiles[0] + (1 - self.config.gamma) * tiles[1]
        stacked = torch.stack(tiles)
        return stacked.amax(dim=0) if self.config.combination == "max" else stacked.mean(dim=0)

    def _target(self, view: Tensor) -> Tensor:
        """What the other view's queries look for, (B, d): the whole view, encoded and projected."""
        if self.momentum_student is None or self.momentum_projector is None:
            return self.projector(self.student.pooled(view, self.pooling))
        return self.momentum_projector(self.momentum_student.pooled(view, self.pooling))

    def _move_momentum_encoder(self) -> None:
        """Follow the student, unless done since the last optimiser step."""
        if not self._is_momentum_due or self.momentum_student is None or self.momentum_projector is None:
            return
        assert self.config.momentum is not None
        follow(self.momentum_student, self.student, self.config.momentum)
        follow(self.momentum_projector, self.projector, self.config.momentum)
        self._is_momentum_due = False


def divide(images: Tensor, num_divisions: int) -> Tensor:
    """The tiles of images (B, 3, H, W), (m * m * B, 3, H / m, W / m): tile by tile, down each column of tiles.

    Of one tile, all images stand together. num_divisions: m, which divides H and W.
    """
    tiles = images.unflatten(2, (num_divisions, -1)).unflatten(4, (num_divisions, -1))  # (B, 3, m, h, m, w)
    return tiles.permute(4, 2, 0, 1, 3, 5).flatten(0, 2)


def tile_size_of(image_size: int, num_divisions: int) -> int:
    """Height and width of a tile, in pixels. Raises ConfigError if tiles of one size do not fill the view."""
    if image_size % num_divisions:
        near = max(1, round(image_size / num_divisions)) * num_divisions
        raise ConfigError(
            f"fast_moco.num_divisions {num_divisions} does not divide the {image_size} pixels of a view",
            f"use --views.image-size {near}",
        )
    return image_size // num_divisions


def build(config: FastMoCoConfig, views: TwoViewsConfig, network: NetworkConfig, *, seed: int) -> FastMoCo:
    """Fast-MoCo on the two views of each image that MoCo v2 uses.

    A tile is an image of its own: a vision transformer takes it as any small crop, with learned positions resampled to
    it and fixed ones made for it. The official code has no vision transformer, and leaves that open.
    """
    tile_size = tile_size_of(views.image_size, config.num_divisions)
    sizes = () if tile_size == views.image_size else (tile_size,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(network, image_size=views.image_size, sizes=sizes)
        momentum_student = None
        if config.target == "independent":
            momentum_student = build_network(network, image_size=views.image_size, sizes=sizes)
        elif config.target == "copy":
            momentum_student = momentum_copy(student)
    return FastMoCo(
        student,
        TwoViews(views),
        config,
        momentum_student=momentum_student,
        pooling=network.pooling,
        seed=seed,
    )
