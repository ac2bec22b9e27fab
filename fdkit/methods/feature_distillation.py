"""Feature distillation: a student learns a frozen teacher's final token map, whitened.

Both see the same view. The teacher's tokens, after its own final norm, are whitened by a LayerNorm without weights, so
that one learning rate serves every teacher. A linear map brings the student's tokens to the teacher's width; it is
dropped afterwards. The loss is smooth-L1 over every token, the class token among them.
Several teachers each have a linear map and a whitening of their own; the loss is their weighted mean.
Source: Wei et al. 2022 (arXiv 2205.14141), section 3; details the paper leaves open follow the released code.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import Views
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.methods._several_teachers import dropped_mean, normalised_weights, weighted_sum
from fdkit.methods._teacher_cache import CachedTargets, Target
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.distillation_target import Whitening, paired_tokens, whiten
from fdkit.models.stochastic_depth import add_stochastic_depth
from fdkit.teachers.teacher import Teacher, short_names


class FeatureDistillationConfig(Config):
    """What the student imitates, and how the difference is measured."""

    target: Literal["feature_map", "pooled", "logits"] = "feature_map"
    """Every final token (the class token too, where both networks have one), the mean of the patch tokens, or the
    output of the teacher's own head."""
    layer: int | None = None
    """Block of the teacher whose tokens are imitated (a stage of Swin, ConvNeXt, ResNet), from 0, or from the end if
    negative; left out, the end of the network."""
    norm: bool = True
    """Whether these tokens first go through the teacher's own final norm; a stage before the last needs false."""
    whitening: Whitening = "layernorm"
    """Per vector to mean 0 and variance 1; per channel over batch and tokens to the same; per vector to length 1; or
    the target as it is."""
    beta: float = Field(default=2.0, gt=0)
    """Where the loss turns from squared to absolute, in units of the whitened target."""
    teacher_drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the teacher's last block, growing linearly from 0 at the first; the paper finds 0 best."""
    teacher_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """How much each of several teachers counts in the loss, relative to their sum; left out, all count the same."""
    teacher_dropping: float = Field(default=0.0, ge=0, lt=1)
    """Probability that one of several teachers is left out for an image; the one imitated worst always counts."""

    @property
    def reads_end(self) -> bool:
        """Whether the target is what the teacher says at its end, as every teacher can."""
        return self.layer is None and self.norm


class Imitation(NamedTuple):
    """What the student made of one teacher."""

    loss: Tensor
    """A scalar; (B,), one an image, where teachers may be dropped."""
    explained_variance: Tensor


class FeatureDistillation(Method):
    """Student and projectors against frozen teachers.

    Teachers are no part of the parameters or the state. A student grid that differs from a teacher's is resampled to
    it, so that the target stays what the teacher said; registers take no part. Projectors of teachers after the first
    stand under `further_projectors`, so that the first one's has the name that a single teacher's has.
    """

    def __init__(
        self,
        teacher: Teacher | Sequence[Teacher],
        student: Backbone,
        views: Views,
        config: FeatureDistillationConfig,
        *,
        seed: int = 0,
        cached: CachedTargets | None = None,
    ) -> None:
        """seed: of the projector's initial weights, drawn without touching the global generator.

        cached: where targets are kept; the views are then `CachedViews`, and a teacher follows the images to their
        device when it is first needed there.
        """
        super().__init__()
        if views.num_views != 1:
            raise ConfigError(
                f"feature distillation shows both networks 1 view; the views make {views.num_views}"
            )
        teachers = list(teacher) if isinstance(teacher, Sequence) else [teacher]
        names = [one.name for one in teachers] if len(teachers) > 1 else []
        check_targets(config, names)
        if config.teacher_drop_path > 0:
            if cached is not None:
                raise ConfigError(
                    f"distillation.teacher_drop_path {config.teacher_drop_path:g} makes another target each time, "
                    "which a teacher cache would freeze",
                    "leave out one of the two",
                )
            teachers = [_with_stochastic_depth(one, config.teacher_drop_path) for one in teachers]
        self.teacher: Teacher
        self.further_teachers: Sequence[Teacher] | nn.ModuleList
        if cached is None:
            self.teacher, self.further_teachers = teachers[0], nn.ModuleList(teachers[1:])
        else:  # outside the module tree, so that no device holds what may never be run
            self.__dict__.update(teacher=teachers[0], further_teachers=teachers[1:])
        self.cached = cached
        self.student = student
        self.views = views
        self.config = config
        self.compares_images = config.whitening == "batch"
        self.teacher_weights = normalised_weights(config.teacher_weights, len(teachers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector, *more = [
                nn.Linear(student.embed_dim, _target_dim(one, config)) for one in self.teachers
            ]
        self.further_projectors = nn.ModuleList(more)

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Every teacher, in the order given."""
        return (self.teacher, *cast(Iterable[Teacher], self.further_teachers))

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and the share of the target's variance that the prediction explains (at most 1).

        Both are weighted means over several teachers; then "loss/NAME" and "explained_variance/NAME" are those of each
        teacher on all images. With a cache, "teacher_cache_read" is the share of targets read rather than computed.
        views: one (B, 3, H, W) tensor in [0, 1], and what a cache adds to it; progress is not used.
        """
        images, read = views[0], {}
        if self.cached is None:
            targets = [teacher_says(teacher, images, self.config) for teacher in self.teachers]
        else:
            targets, share = self._cached_targets(views)
            read = {"teacher_cache_read": share}
        tokens = self.student(images)
        projectors = (self.projector, *self.further_projectors)
        imitations = [
            self._imitate(projector, tokens, target)
            for projector, target in zip(projectors, targets, strict=True)
        ]
        return self._scalars(imitations) | read

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _cached_targets(self, views: list[Tensor]) -> tuple[list[Target], Tensor]:
        """Every teacher's target from its cache, and the share that was read."""
        assert self.cached is not None
        device, config = views[0].device, self.config
        say = [
            lambda images, teacher=teacher: compared(teacher_says(teacher.to(device), images, config), config)
            for teacher in self.teachers
        ]
        targets, share = self.cached(views, say)
        return targets, torch.full((), share, device=device)

    def _imitate(self, projector: nn.Module, tokens: Tokens, target: Target) -> Imitation:
        """How well the student says what one teacher says."""
        student, teacher = self._pair(tokens, target)
        prediction = projector(student)
        with torch.autocast(prediction.device.type, enabled=False):
            prediction, teacher = prediction.float(), whiten(teacher.float(), self._whitening)
            if self._drops_teachers:
                loss = F.smooth_l1_loss(prediction, teacher, beta=self.config.beta, reduction="none")
                loss = loss.flatten(1).mean(dim=1)
            else:
                loss = F.smooth_l1_loss(prediction, teacher, beta=self.config.beta)
            return Imitation(loss, explained_variance(prediction.detach(), teacher))

    def _pair(self, tokens: Tokens, target: Target) -> tuple[Tensor, Tensor]:
        """Student and teacher vectors that stand for the same thing: (B, ..., C_s) and (B, ..., C_t)."""
        if isinstance(target, Tokens) and self.config.target == "feature_map":
            return paired_tokens(tokens, target)
        vectors = compared(target, self.config)
        assert isinstance(vectors, Tensor)
        return tokens.patches.mean(dim=1), vectors

    @property
    def _whitening(self) -> Whitening:
        """What is still to be done to a target: a cache whitens before it stores, but for whitening over a batch."""
        whitening = self.config.whitening
        return whitening if self.cached is None or whitening == "batch" else "none"

    @property
    def _drops_teachers(self) -> bool:
        return self.training and self.config.teacher_dropping > 0

    def _scalars(self, imitations: list[Imitation]) -> dict[str, Tensor]:
        losses = [one.loss for one in imitations]
        explained = [one.explained_variance for one in imitations]
        if self._drops_teachers:
            loss = dropped_mean(torch.stack(losses), self.teacher_weights, self.config.teacher_dropping)
        else:
            loss = weighted_sum(losses, self.teacher_weights)
        scalars = {"loss": loss, "explained_variance": weighted_sum(explained, self.teacher_weights)}
        if len(imitations) > 1:
            names = short_names([teacher.name for teacher in self.teachers])
            for name, one in zip(names, imitations, strict=True):
                scalars[f"loss/{name}"] = one.loss.detach().mean()
                scalars[f"explained_variance/{name}"] = one.explained_variance
        return scalars


def teacher_says(teacher: Teacher, images: Tensor, config: FeatureDistillationConfig) -> Target:
    """What a teacher says of images (B, 3, H, W) in [0, 1]: tokens, or logits (B, K); no gradient."""
    if config.target == "logits":
        with torch.no_grad():
            return teacher.backbone.logits(images)
    if config.reads_end:
        return teacher.encode(images)
    return teacher.encode(images, layer=config.layer, norm=config.norm)


def compared(target: Target, config: FeatureDistillationConfig) -> Target:
    """The part of it that the loss compares: tokens, or one vector (B, C) an image."""
    if isinstance(target, Tokens) and config.target != "feature_map":
        return target.patches.mean(dim=1)
    return target


def check_targets(config: FeatureDistillationConfig, names: Sequence[str]) -> None:
    """Raises ConfigError for a setting without effect, or that does not fit teachers of these names."""
    if config.target == "logits" and not config.reads_end:
        option = "norm false" if config.layer is None else f"layer {config.layer}"
        raise ConfigError(
            f"distillation.{option} has no effect on the target logits, the output of the teacher's own head",
            "use the target feature_map or pooled",
        )
    if len(names) < 2 and (config.teacher_weights is not None or config.teacher_dropping > 0):
        option = "teacher_dropping" if config.teacher_weights is None else "teacher_weights"
        raise ConfigError(
            f"distillation.{option} has no effect on one teacher",
            "name several: --teacher clip_vitb,dino_vitb",
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError(
            f"teacher {twice[0]} is named twice", "give it a larger distillation.teacher_weights"
        )
    weights = config.teacher_weights
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"distillation.teacher_weights has {len(weights)} numbers for {len(names)} teachers ({', '.join(names)})",
            "give one number a teacher, in their order, or leave it out",
        )


def explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - squared error over the target's variance around its mean per channel; a scalar, at most 1.

    0 is what predicting each channel's mean over this batch gives. prediction, target: (..., C).
    """
    target = target.flatten(0, -2)
    error = (prediction.flatten(0, -2) - target).square().sum()
    return 1 - error / (target - target.mean(dim=0)).square().sum().clamp_min(torch.finfo(target.dtype).tiny)


def _with_stochastic_depth(teacher: Teacher, rate: float) -> Teacher:
    """A copy of the teacher whose blocks drop branches."""
    teacher = copy.deepcopy(teacher)
    add_stochastic_depth(teacher.backbone.network, rate)
    return teacher


def _target_dim(teacher: Teacher, config: FeatureDistillationConfig) -> int:
    """Width of the target; ConfigError if the teacher has no head or layer whose output could be it."""
    if config.target != "logits":
        return teacher.embed_dim if config.reads_end else teacher.layer_dim(config.layer, norm=config.norm)
    backbone = teacher.backbone
    blank = backbone.mean.new_zeros(1, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        return int(backbone.logits(blank).shape[-1])
