"""EsViT: DINO on networks whose final map has few regions, with a second task that compares regions.

As in DINO, a student predicts what a slow teacher says of another crop of the same image, as a distribution over
prototypes. The view task does so for the mean of the final map. The region task does so for each region of the
student's map, by a head of its own: its target is the teacher's region that resembles it most, by the cosine of the
networks' own features. Without it, the multi-stage networks lose the correspondence of parts that a ViT learns.
Source: Li et al. 2022 (arXiv 2106.09785); what the paper leaves open follows microsoft/esvit at 2d6becd.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.data.views import MultiCrop, MultiCropConfig
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig
from fdkit.methods._self_distillation import (
    NUM_GLOBAL,
    Centre,
    SelfDistillationConfig,
    Targets,
    batches_by_size,
    build_head,
    build_multi_size,
    centred_targets,
    cross_entropy_of_pairs,
    keep_prototypes,
    refuse_resizing,
    summed_cross_entropy,
    target_statistics,
    teacher_of,
    temperature_for,
)
from fdkit.models.backbone import Backbone, Pooling, pool
from fdkit.models.heads import DINOHead
from fdkit.models.momentum import follow, momentum_at
from fdkit.models.representation import channel_std

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": {"layer_norm_eps": 1e-6},
        "pooling": "patches",
        "drop_path": 0.1,
        "interpolation": "bicubic",
    },
    "views": {"min_scale": 0.4, "interpolation": "bicubic"},
}
BLOCK_NUMBERS = 2**24
"""Numbers of the targets that are gathered at once: 64 MiB in float32."""


class EsViTConfig(SelfDistillationConfig):
    """EsViT; the defaults are those of its published Swin-T."""

    region_loss: bool = True
    """Compare regions as well as views, by a second head; each task then counts half."""
    view_only_epochs: int = Field(default=0, ge=0)
    """Epochs at the beginning that compare views alone: 200 of 300 in most released models, 0 in Swin-T and Swin-S."""
    norm_last_layer: bool = False
    """Keep all prototypes at length 1; false learns the length of each, which is better and less stable."""
    teacher_temperature: float = Field(default=0.07, gt=0)
    """Divides the teacher's centred scores after the warm-up; above 0.07 most runs are unstable."""
    warmup_teacher_temperature_epochs: int = Field(default=30, ge=0)
    """Epochs in which the teacher's temperature goes linearly from one to the other, an epoch at a time."""


class Encoded(NamedTuple):
    """What a network makes of V views of B images."""

    features: Tensor
    """(V * B, C): one an image, view by view."""
    maps: list[Tensor]
    """One a view: (B, S, C), its regions row by row; S differs between sizes."""

    def regions(self) -> Tensor:
        """(R, C): every region, view by view and image by image."""
        return torch.cat([one.flatten(0, 1) for one in self.maps])


class EsViT(Method):
    """A student's distributions of all crops and their regions against a teacher's of the two large ones.

    student: takes images of all sizes of the views as they are. Any network with a final map will do: the regions are
    the patches of a Swin, a ViT or a ResNet after its final norm; pooling says what a view is.
    seed: of the heads' initial weights, which are drawn without touching the global generator.
    Batch norms are synchronised already; those of the networks see all crops of one size together, those of the heads
    all crops.
    """

    def __init__(
        self,
        student: Backbone,
        views: MultiCrop,
        config: EsViTConfig,
        *,
        pooling: Pooling = "patches",
        seed: int,
    ) -> None:
        super().__init__()
        refuse_resizing(student, views)
        if config.view_only_epochs and not config.region_loss:
            raise ConfigError(
                f"esvit.view_only_epochs {config.view_only_epochs} has no effect: no epoch compares regions",
                "leave it out, or use --esvit.region-loss",
            )
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = build_head(student.embed_dim, config)
            self.region_head = build_head(student.embed_dim, config) if config.region_loss else None
        self.teacher = teacher_of(self.student)
        self.teacher_head = teacher_of(self.head)
        self.centre = Centre(config.output_dim, momentum=config.centre_momentum)
        if self.region_head is not None:
            self.teacher_region_head = teacher_of(self.region_head)
            self.region_centre = Centre(config.output_dim, momentum=config.centre_momentum)
        self.compares_images = config.head_norm

    @property
    def exported(self) -> Backbone:
        """The teacher, as the published models are."""
        return self.teacher

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for batch norms that would see a single image, and regions that would never count."""
        super().begin(duration)
        check_batch_norm(self, duration)
        epochs = duration.num_steps / duration.steps_per_epoch
        if self.config.view_only_epochs >= epochs:
            raise ConfigError(
                f"esvit.view_only_epochs {self.config.view_only_epochs}: a run of {epochs:g} epochs ends before "
                "regions are compared",
                "use --esvit.view-only-epochs 0, or --esvit.no-region-loss for views alone",
            )

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: the two large ones (B, 3, S, S), then the small ones (B, 3, s, s), in [0, 1]; progress: share of all
        optimiser steps done, as steps / total.
        loss: (view_loss + region_loss) / 2, or view_loss where views alone are compared. Each is a mean over pairs of
        a teacher's view and another view of the student's; view_loss is target_entropy + divergence.
        prototypes_used: 1 where all images share one prototype, K where they use all alike.
        feature_std: of the student's features of the large views.
        """
        with torch.no_grad():
            taught = self._encode(self.teacher, views[:NUM_GLOBAL])
            teacher_scores = self.teacher_head(taught.features)
            targets = centred_targets(teacher_scores, self.centre.value, self._teacher_temperature(progress))
        if self.training and torch.is_grad_enabled():
            self.centre.add(teacher_scores)
        own = self._encode(self.student, views)
        view_loss = cross_entropy_of_pairs(
            self.head(own.features),
            targets,
            num_views=len(views),
            temperature=self.config.student_temperature,
        )
        entropy, prototypes_used = target_statistics(targets)
        scalars = {
            "view_loss": view_loss.detach(),
            "target_entropy": entropy,
            "divergence": view_loss.detach() - entropy,
            "prototypes_used": prototypes_used,
            "feature_std": channel_std(own.features[: len(targets)]),
        }
        if self.region_head is None:
            return {"loss": view_loss, **scalars}
        if not self._compares_regions(progress):
            # Data-parallel training waits for a gradient of every parameter, if one of zeros.
            unused = sum(
                parameter.sum() for parameter in self.region_head.parameters() if parameter.requires_grad
            )
            return {"loss": view_loss + 0 * unused, **scalars}
        region_loss = self._region_loss(self.region_head, own, taught, progress)
        return {"loss": (view_loss + region_loss) / 2, "region_loss": region_loss.detach(), **scalars}

    def before_step(self, progress: float) -> None:
        """Keep the prototypes as they are in the first epochs, and the head of regions while it has no task."""
        heads = [head for head in (self.head, self.region_head) if head is not None]
        if self.epoch(progress) < self.config.freeze_last_layer_epochs:
            keep_prototypes(heads)
        if self.region_head is not None and not self._compares_regions(progress):
            self.region_head.zero_grad(set_to_none=True)

    def after_step(self, progress: float) -> None:
        """Move the centres by this step's scores, and the teacher towards the student."""
        momentum = momentum_at(progress, self.config.momentum, "cosine")
        self.centre.update()
        follow(self.teacher, self.student, momentum)
        follow(self.teacher_head, self.head, momentum)
        if self.region_head is not None:
            self.region_centre.update()
            follow(self.teacher_region_head, self.region_head, momentum)

    def _region_loss(self, head: DINOHead, own: Encoded, taught: Encoded, progress: float) -> Tensor:
        with torch.no_grad():
            scores = self.teacher_region_head(taught.regions())
            targets = centred_targets(scores, self.region_centre.value, self._teacher_temperature(progress))
        if self.training and torch.is_grad_enabled():
            self.region_centre.add(scores)
        return region_cross_entropy(
            head(own.regions()),
            targets,
            region_matches(own.maps, taught.maps),
            temperature=self.config.student_temperature,
        )

    def _encode(self, network: Backbone, views: list[Tensor]) -> Encoded:
        """Features and maps of the views, one pass a size."""
        features, maps = [], []
        for batch in batches_by_size(views):
            tokens = network(batch)
            features.append(pool(tokens, self.pooling))
            maps += tokens.patches.split(len(views[0]))
        return Encoded(torch.cat(features), maps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # progress is another number at every step
    def _compares_regions(self, progress: float) -> bool:
        return self.epoch(progress) >= self.config.view_only_epochs

    def _teacher_temperature(self, progress: float) -> Tensor:
        return temperature_for(self.centre, self.config, self.epoch(progress))


def build(config: EsViTConfig, views: MultiCropConfig, network: NetworkConfig, *, seed: int) -> EsViT:
    """EsViT on DINO's crops; a ResNet starts as torchvision's does."""
    crops = MultiCrop(views)
    student = build_multi_size(network, crops, seed=seed)
    return EsViT(student, crops, config, pooling=network.pooling, seed=seed)


def region_matches(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[Tensor]:
    """Which teacher regions each student region is to predict; one (B, S, P) a student's view.

    students: maps (B, S, C) of all views; teachers: maps (B, T, C) of the first two, whose regions are counted view by
    view and image by image, from 0 to 2 * B * T - 1. P is 2, or 1 for the first two views, which do not meet
    themselves. A match is the region of largest cosine in the same image; of equals the first.
    Source: Li et al. 2022, equation 2 and section 3.2.
    """
    num_images, num_regions = teachers[0].shape[:2]
    first = num_regions * torch.arange(num_images, device=teachers[0].device)[:, None]
    unit = [_unit(regions) for regions in teachers]
    matches = []
    for view, regions in enumerate(students):
        rows = [
            _nearest(_unit(regions), unit[i]) + first + i * num_images * num_regions
            for i in range(NUM_GLOBAL)
            if i != view
        ]
        matches.append(torch.stack(rows, dim=-1))
    return matches


def region_cross_entropy(
    scores: Tensor, targets: Tensor, matches: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Mean over pairs of views, images and a student's regions of the cross-entropy with the matched target.

    scores: (R, K) of the student's regions, view by view and image by image; targets: (M, K), distributions of the
    teacher's; matches: rows of targets, (B, S, P) a view, as `region_matches` gives them. A scalar in float32 or finer.
    Source: Li et al. 2022, equation 2.
    """
    views = scores.split([match[..., 0].numel() for match in matches])
    terms = [
        summed_cross_entropy(view, _gathered(targets, match.flatten(0, 1)), temperature=temperature)
        / len(view)
        for view, match in zip(views, matches, strict=True)
    ]
    return torch.stack(terms).sum() / (NUM_GLOBAL * (len(matches) - 1))


def _gathered(targets: Tensor, rows: Tensor) -> Iterator[Targets]:
    """What consecutive rows of scores are to predict, block by block, so that few targets are copied at once."""
    for block in rows.split(max(1, BLOCK_NUMBERS // targets.shape[1])):
        yield Targets(targets[block].sum(dim=1), block.shape[1])


@torch.no_grad()
def _nearest(students: Tensor, teachers: Tensor) -> Tensor:
    """(B, S): the region of largest cosine among (B, T, C), of (B, S, C), all of length 1."""
    with torch.autocast(students.device.type, enabled=False):
        return (students @ teachers.transpose(1, 2)).argmax(dim=2)


def _unit(regions: Tensor) -> Tensor:
    """(B, S, C) at length 1, detached, in float32 or finer."""
    return F.normalize(regions.detach().to(torch.promote_types(regions.dtype, torch.float32)), dim=-1)
