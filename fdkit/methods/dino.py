"""DINO: self-distillation without labels, from a slow teacher that sees two large crops to a student that sees all.

Each image is cut into two large crops and several small ones. The student, seeing one crop, predicts what the teacher
says of a large other one, as a distribution over many prototypes; so small parts learn to speak of the whole. The
teacher is a momentum copy of the student. Its scores are centred and sharpened, which keeps both from saying the same
of every image. The teacher is what is exported.
Source: Caron et al. 2021 (arXiv 2104.14294); what the paper leaves open follows facebookresearch/dino at 7c446df.
"""

from typing import Any

import torch
from torch import Tensor

from fdkit.data.views import MultiCrop, MultiCropConfig
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig
from fdkit.methods._self_distillation import (
    NUM_GLOBAL,
    Centre,
    SelfDistillationConfig,
    batches_by_size,
    build_head,
    build_multi_size,
    centred_targets,
    cross_entropy_of_pairs,
    keep_prototypes,
    refuse_resizing,
    target_statistics,
    teacher_of,
    temperature_for,
)
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.momentum import follow, momentum_at
from fdkit.models.representation import channel_std

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"drop_path": 0.1, "initialisation": "dino", "interpolation": "bicubic"},
    "views": {"min_scale": 0.4, "interpolation": "bicubic"},
}


class DINOConfig(SelfDistillationConfig):
    """DINO; the defaults are those of its code, for any network."""


class DINO(Method):
    """A student's distributions of all crops against a teacher's of the two large ones.

    student: takes images of all sizes of the views as they are.
    seed: of the head's initial weights, which are drawn without touching the global generator.
    Batch norms are synchronised already; those of the networks see all crops of one size together, those of the heads
    all crops.
    """

    def __init__(
        self, student: Backbone, views: MultiCrop, config: DINOConfig, *, pooling: Pooling = "cls", seed: int
    ) -> None:
        super().__init__()
        refuse_resizing(student, views)
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = build_head(student.embed_dim, config)
        self.teacher = teacher_of(self.student)
        self.teacher_head = teacher_of(self.head)
        self.centre = Centre(config.output_dim, momentum=config.centre_momentum)
        self.compares_images = config.head_norm

    @property
    def exported(self) -> Backbone:
        """The teacher, which is better than the student throughout training (Caron et al. 2021, section 5.2)."""
        return self.teacher

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for batch norms that would see a single image."""
        super().begin(duration)
        check_batch_norm(self, duration)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: the two large ones (B, 3, S, S), then the small ones (B, 3, s, s), in [0, 1]; progress: share of all
        optimiser steps done, as steps / total.
        loss: mean over pairs of a teacher's view and another view of the student's of their cross-entropy, which is
        target_entropy + divergence. In a collapse the divergence goes to 0, and the entropy to 0 or to ln K.
        prototypes_used: 1 where all images share one prototype, K where they use all alike.
        feature_std: of the student's features of the large views.
        """
        features = self._pooled(self.student, views)  # (V * B, C), view by view
        scores = self.head(features)
        with torch.no_grad():
            teacher_scores = self.teacher_head(self._pooled(self.teacher, views[:NUM_GLOBAL]))
            targets = centred_targets(teacher_scores, self.centre.value, self._teacher_temperature(progress))
        loss = cross_entropy_of_pairs(
            scores, targets, num_views=len(views), temperature=self.config.student_temperature
        )
        if self.training and torch.is_grad_enabled():
            self.centre.add(teacher_scores)
        entropy, prototypes_used = target_statistics(targets)
        return {
            "loss": loss,
            "target_entropy": entropy,
            "divergence": loss.detach() - entropy,
            "prototypes_used": prototypes_used,
            "feature_std": channel_std(features[: len(targets)]),
        }

    def before_step(self, progress: float) -> None:
        """Keep the prototypes as they are in the first epochs."""
        if self.epoch(progress) < self.config.freeze_last_layer_epochs:
            keep_prototypes([self.head])

    def after_step(self, progress: float) -> None:
        """Move the centre by this step's scores, and the teacher towards the student."""
        self.centre.update()
        momentum = momentum_at(progress, self.config.momentum, "cosine")
        follow(self.teacher, self.student, momentum)
        follow(self.teacher_head, self.head, momentum)

    def _pooled(self, network: Backbone, views: list[Tensor]) -> Tensor:
        """(V * B, C): features of the views, one pass a size."""
        return torch.cat([network.pooled(batch, self.pooling) for batch in batches_by_size(views)])

    def _teacher_temperature(self, progress: float) -> Tensor:
        return temperature_for(self.centre, self.config, self.epoch(progress))


def build(config: DINOConfig, views: MultiCropConfig, network: NetworkConfig, *, seed: int) -> DINO:
    """DINO on its crops; a ResNet starts as torchvision's does."""
    crops = MultiCrop(views)
    student = build_multi_size(network, crops, seed=seed)
    return DINO(student, crops, config, pooling=network.pooling, seed=seed)
