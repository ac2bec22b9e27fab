"""Momentum contrast with a queue: what MoCo v1 and v2 have in common, which is all but a head and its numbers.

The student makes a query of one view; a slow copy of it makes the key of the other. A query must tell its own key
from the queue's, which are the keys of the last batches. Batch norms see queries and keys in different company
(shuffling), since statistics that only a query and its key share would give the key away.
Source: He et al. 2019 (MoCo, arXiv 1911.05722), algorithm 1 and section 3.3; Chen et al. 2020 (MoCo v2, arXiv
2003.04297); what they leave open follows facebookresearch/moco at 132aea9, moco/builder.py.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.data.views import TwoViews, TwoViewsConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._contrast import Contrast
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods._queue import Queue, check_queue
from fdkit.methods._resnet import with_full_residuals
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.collectives import gather_rows, rank, world_size
from fdkit.models.heads import mlp_head
from fdkit.models.momentum import follow, momentum_copy
from fdkit.models.representation import channel_std, unit_rows
from fdkit.models.split_batch_norm import deal, split_batch_norm, undo_deal


class MomentumContrastConfig(Config):
    """Momentum contrast with a queue; the defaults are those of MoCo v1."""

    SECTION: ClassVar[str]
    """Name of this configuration in a recipe, for messages."""

    num_projector_layers: int = Field(default=1, ge=1)
    """Layers of the projector: 1 in MoCo v1, 2 in MoCo v2; hidden ones are as wide as the feature, without norm."""
    output_dim: int = Field(default=128, ge=2)
    """Width of the queries and keys."""
    queue_size: int = Field(default=65536, ge=1)
    """Keys in the queue; a multiple of the batch size."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides the cosines before the softmax: 0.07 in MoCo v1, 0.2 in MoCo v2."""
    momentum: float = Field(default=0.999, ge=0, le=1)
    """Share of itself the momentum encoder keeps at an optimiser step."""
    num_splits: int = Field(default=8, ge=1)
    """Groups a batch is normalised in by batch norms, over all processes together; 8 as on the 8 GPUs of the paper.
    With 1, batch norms can give away which key is whose. Networks without batch norm are not split."""


class MomentumContrast(Method):
    """Queries of a student against keys of its momentum copy and a queue of earlier keys.

    student: its batch norms are plain ones, not synchronised; they are split here.
    seed: of the projector and the first queue, which are drawn without touching the global generator.

    A batch is normalised in num_splits groups, wherever they lie: on 8 devices each is one group, on one device all 8
    are (32 images each for the published batch of 256), and both train alike. For the keys, images are dealt to the
    groups at random at every step. Running statistics, which the exported network uses, are those of the first group.

    The momentum copy moves, and the queue takes keys, once an optimiser step. With gradient accumulation all parts
    meet the same queue, so without batch norm the gradient is that of the whole batch.
    """

    def __init__(
        self,
        student: Backbone,
        views: Views,
        config: MomentumContrastConfig,
        *,
        pooling: Pooling = "patches",
        seed: int,
    ) -> None:
        super().__init__()
        if views.num_views != 2:
            raise ConfigError(f"MoCo compares 2 views of an image; the views make {views.num_views}")
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        self.has_batch_norm = split_batch_norm(student, config.num_splits)
        self.compares_images = self.has_batch_norm  # negatives come from the queue alone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = mlp_head(
                [*[student.embed_dim] * config.num_projector_layers, config.output_dim],
                hidden_bias=True,
                last_bias=True,
                hidden_norm=False,
            )
            self.queue = Queue(unit_rows(torch.randn(config.queue_size, config.output_dim)))
        self.momentum_student = momentum_copy(self.student)
        self.momentum_projector = momentum_copy(self.projector)
        self._is_momentum_due = True

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for a batch that divides neither the queue nor into the groups of the batch norms."""
        super().begin(duration)
        check_queue(self.config.queue_size, duration.batch_size, section=self.config.SECTION)
        if self.has_batch_norm:
            _check_splits(self.config, duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1], of queries and of keys; progress is not used.
        loss: cross-entropy of each query's own key among K + 1, the queue's K being the others.
        positive_similarity: mean cosine of a query and its key; top1: share of queries nearer to it than to the queue.
        feature_std: of the student's features.
        """
        query_images, key_images = views
        is_learning = self.training and torch.is_grad_enabled()
        features = self._features(self.student, query_images)
        queries = self.projector(features)
        with torch.no_grad():
            if is_learning:
                self._move_momentum_encoder()
            keys = self._keys(key_images)  # (N, d), of all ranks
            if is_learning:
                self.queue.hold(keys)
        first = rank() * len(queries)
        contrast = queue_contrast(
            queries,
            keys[first : first + len(queries)],
            self.queue.rows,
            temperature=self.config.temperature,
        )
        return {**contrast._asdict(), "feature_std": channel_std(features)}

    def after_step(self, progress: float) -> None:
        """Queue the keys of the step, and let the next forward pass move the momentum encoder."""
        self.queue.push_held()
        self._is_momentum_due = True

    def _features(self, backbone: Backbone, images: Tensor) -> Tensor:
        """(B, C) of images (B, 3, H, W), whose slices are the groups of the batch norms."""
        if not self.has_batch_norm:
            return backbone.pooled(images, self.pooling)
        dealt = deal(images, self.config.num_splits)
        return undo_deal(backbone.pooled(dealt, self.pooling), self.config.num_splits)

    def _keys(self, images: Tensor) -> Tensor:
        """Keys (N, d) of length 1 of all ranks' images, of which this rank holds (B, 3, H, W)."""
        if not self.training or not self.has_batch_norm:
            return gather_rows(self._encode_keys(images))
        count = len(images) * world_size()
        drawn = gather_rows(torch.randperm(count, device=images.device))
        order = drawn[:count]  # that of rank 0, on every rank
        mine = order.chunk(world_size())[rank()]
        shuffled = gather_rows(self._encode_keys(gather_rows(images)[mine]))
        return shuffled[order.argsort()]

    def _encode_keys(self, images: Tensor) -> Tensor:
        return unit_rows(self.momentum_projector(self._features(self.momentum_student, images)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # whether it is due changes within a step
    def _move_momentum_encoder(self) -> None:
        """Follow the student, unless done since the last optimiser step."""
        if not self._is_momentum_due:
            return
        follow(self.momentum_student, self.student, self.config.momentum)
        follow(self.momentum_projector, self.projector, self.config.momentum)
        self._is_momentum_due = False


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Contrast:
    """How well each query (B, d) tells its own key, of (B, d), from those of the queue (K, d), by cosine.

    queue: rows of length 1. The loss is the mean over rows of -log softmax([q k, q queue] / temperature)[0], in
    float32 or finer. Source: He et al. 2019, equation 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = unit_rows(queries), unit_rows(keys)
        positive = (queries * keys).sum(dim=1, keepdim=True)
        cosines = torch.cat([positive, queries @ queue.T], dim=1)  # (B, 1 + K)
        labels = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        loss = F.cross_entropy(cosines / temperature, labels)
    top1 = (cosines.detach().argmax(dim=1) == 0).float().mean()
    return Contrast(loss, positive.detach().mean(), top1)


def build_momentum_contrast(
    config: MomentumContrastConfig, views: TwoViewsConfig, network: NetworkConfig, *, seed: int
) -> MomentumContrast:
    """Momentum contrast on two views of each image; a ResNet starts as torchvision's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(with_full_residuals(network), image_size=views.image_size, synchronise=False)
    return MomentumContrast(student, TwoViews(views), config, pooling=network.pooling, seed=seed)


def _check_splits(config: MomentumContrastConfig, duration: Duration) -> None:
    """Raises ConfigError for groups that ranks cannot share equally, or of a single image."""
    splits, ranks, images = config.num_splits, duration.world_size, duration.part_size * duration.world_size
    if splits % ranks == 0 and images % splits == 0 and images // splits >= 2:
        return
    fitting = [n for n in range(ranks, images // 2 + 1, ranks) if images % n == 0]
    nearest = min(fitting, key=lambda n: abs(n - splits), default=None)
    raise ConfigError(
        f"{config.SECTION}.num_splits {splits}: {ranks} processes with {images} images in all cannot share as many "
        "groups of two or more images equally",
        f"use --{config.SECTION}.num-splits {nearest}" if nearest else "use a larger --train.batch-size",
    )
