"""MoCo v3: contrastive learning of two views against a slow copy of the network, without labels or queue.

The student, a projector and a predictor make a query of each view; a momentum copy of student and projector makes a
key of each. A query must pick the key of its own image's other view among those of the whole batch, all ranks'.
The copy moves towards the student at every optimiser step, ever more slowly. Positions are fixed and the patch
projection stays as it was drawn, which is what keeps vision transformers stable here.
Source: Chen, Xie, He 2021 (arXiv 2104.02057); what the paper leaves open follows facebookresearch/moco-v3 at c349e6e.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fdkit.config import Config
from fdkit.data.views import TwoViews, TwoViewsConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._contrast import info_nce
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.batch_norm import each_apart
from fdkit.models.collectives import gather_rows, rank
from fdkit.models.heads import mlp_head
from fdkit.models.momentum import MomentumSchedule, follow, momentum_at, momentum_copy
from fdkit.models.representation import channel_std

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"position": "sincos", "initialisation": "xavier", "freeze_patch_projection": True}
}


class MoCoV3Config(Config):
    """MoCo v3; the defaults are those of vision transformers."""

    hidden_dim: int = Field(default=4096, ge=1)
    """Width of the hidden layers of projector and predictor."""
    output_dim: int = Field(default=256, ge=2)
    """Width of the queries and keys."""
    num_projector_layers: int = Field(default=3, ge=1)
    """Layers of the projector: 3 for vision transformers, 2 for ResNets."""
    num_predictor_layers: int = Field(default=2, ge=0)
    """Layers of the predictor; 0 compares the projector's output itself."""
    head_norm: bool = True
    """Batch norms in projector and predictor; false leaves all of them out."""
    predictor_last_norm: bool = True
    """Normalise the predictor's output by a batch norm: true for vision transformers, false for ResNets."""
    temperature: float = Field(default=0.2, gt=0)
    """Divides the cosines before the softmax: 0.2 for vision transformers, 1.0 for ResNets."""
    momentum: float = Field(default=0.99, ge=0, le=1)
    """Share of itself the momentum encoder keeps at an optimiser step, at the start of training."""
    momentum_schedule: MomentumSchedule = "cosine"
    """How momentum goes on: rising to 1 along half a cosine, or constant."""


class MoCoV3(Method):
    """Queries of a student against keys of its momentum copy, both ways between two views.

    seed: of the heads' initial weights, which are drawn without touching the global generator.
    Batch norms are synchronised already, whether or not a process group runs: do not convert them again.

    With gradient accumulation the momentum encoder moves once an optimiser step, before the first keys that follow
    `after_step`, but each part's negatives are its own images only: the batch that counts for the loss is the part.
    """

    def __init__(
        self, student: Backbone, views: Views, config: MoCoV3Config, *, pooling: Pooling = "cls", seed: int
    ) -> None:
        super().__init__()
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        if views.num_views != 2:
            raise ConfigError(f"MoCo v3 compares 2 views of an image; the views make {views.num_views}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = self._head(
                student.embed_dim, num_layers=config.num_projector_layers, last_norm=True
            )
            self.predictor = self._head(
                config.output_dim,
                num_layers=config.num_predictor_layers,
                last_norm=config.predictor_last_norm,
            )
        self.momentum_student = momentum_copy(self.student)
        self.momentum_projector = momentum_copy(self.projector)
        self._has_batch_norm = any(isinstance(part, _BatchNorm) for part in student.modules())
        self._is_momentum_due = True

    def _head(self, in_dim: int, *, num_layers: int, last_norm: bool) -> torch.nn.Module:
        """Linear layers without bias; the last batch norm has neither scale nor shift."""
        if num_layers == 0:
            return torch.nn.Identity()
        config = self.config
        return mlp_head(
            [in_dim, *[config.hidden_dim] * (num_layers - 1), config.output_dim],
            hidden_norm=config.head_norm,
            last_norm="plain" if config.head_norm and last_norm else "none",
        )

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for batch norms that would see a single image."""
        super().begin(duration)
        check_batch_norm(self, duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1]; progress: share of all optimiser steps done, as steps / total.
        loss: sum over both directions of 2 * temperature * cross-entropy, so that the gradient's size does not hang
        on the temperature (Chen et al. 2021, equation 1 and algorithm 1).
        positive_similarity: mean cosine of a query and its key; top1: share of queries nearest to their own key.
        feature_std: of the student's features, since queries would hide a collapse behind their batch norm.
        """
        is_learning = self.training and torch.is_grad_enabled()
        temperature = self.config.temperature
        features = self._features(self.student, views)
        queries = each_apart(self.predictor, each_apart(self.projector, features))
        with torch.no_grad():
            if is_learning:
                self._move_momentum_encoder(progress)
            keys = each_apart(self.momentum_projector, self._features(self.momentum_student, views))
            gathered = gather_rows(torch.stack(keys, dim=1))  # (N, 2, d)
        first_label = rank() * len(queries[0])
        contrasts = [
            info_nce(rows, gathered[:, other], temperature=temperature, first_label=first_label)
            for rows, other in ((queries[0], 1), (queries[1], 0))
        ]
        return {
            "loss": 2 * temperature * (contrasts[0].loss + contrasts[1].loss),
            "positive_similarity": (contrasts[0].positive_similarity + contrasts[1].positive_similarity) / 2,
            "top1": (contrasts[0].top1 + contrasts[1].top1) / 2,
            "feature_std": (channel_std(features[0]) + channel_std(features[1])) / 2,
        }

    def _features(self, network: Backbone, views: list[Tensor]) -> list[Tensor]:
        """(B, C) a view. A batch norm sees one view at a time; without any, both go at once, in larger products."""
        if self._has_batch_norm or network.num_parts > 1:
            return [network.pooled(view, self.pooling) for view in views]
        return list(network.pooled(torch.cat(views), self.pooling).chunk(len(views)))

    def after_step(self, progress: float) -> None:
        """Let the next forward pass move the momentum encoder: the student has changed."""
        self._is_momentum_due = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its momentum is another number at every step
    def _move_momentum_encoder(self, progress: float) -> None:
        """Follow the student, unless done since the last optimiser step."""
        if not self._is_momentum_due:
            return
        momentum = momentum_at(progress, self.config.momentum, self.config.momentum_schedule)
        follow(self.momentum_student, self.student, momentum)
        follow(self.momentum_projector, self.projector, momentum)
        self._is_momentum_due = False


def build(config: MoCoV3Config, views: TwoViewsConfig, network: NetworkConfig, *, seed: int) -> MoCoV3:
    """MoCo v3 on the two views of each image that BYOL uses; a ViT-S has 12 heads unless told otherwise."""
    if network.architecture.startswith("vit_small"):  # timm's has 6; weights fit both and mean something else
        args = {"num_heads": 12, **network.model_args}
        network = network.model_copy(update={"model_args": args})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(network, image_size=views.image_size)
    return MoCoV3(student, TwoViews(views), config, pooling=network.pooling, seed=seed)
