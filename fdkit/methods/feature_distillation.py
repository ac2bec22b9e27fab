"""Feature distillation: a student learns a frozen teacher's final token map, whitened.

Both see the same view. The teacher's tokens, after its own final norm, are whitened by a LayerNorm without weights, so
that one learning rate serves every teacher. A linear map brings the student's tokens to the teacher's width; it is
dropped afterwards. The loss is smooth-L1 over every token, the class token among them.
Source: Wei et al. 2022 (arXiv 2205.14141), section 3; details the paper leaves open follow the released code.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import Views
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.collectives import mean_over_ranks
from fdkit.models.stochastic_depth import add_stochastic_depth
from fdkit.teachers.teacher import Teacher

EPS = 1e-5


class FeatureDistillationConfig(Config):
    """What the student imitates, and how the difference is measured."""

    target: Literal["feature_map", "pooled", "logits"] = "feature_map"
    """Every final token (the class token too, where both networks have one), the mean of the patch tokens, or the
    output of the teacher's own head."""
    whitening: Literal["layernorm", "batch", "l2", "none"] = "layernorm"
    """Per vector to mean 0 and variance 1; per channel over batch and tokens to the same; per vector to length 1; or
    the target as it is."""
    beta: float = Field(default=2.0, gt=0)
    """Where the loss turns from squared to absolute, in units of the whitened target."""
    teacher_drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the teacher's last block, growing linearly from 0 at the first; the paper finds 0 best."""


class FeatureDistillation(Method):
    """Student and projector against a frozen teacher.

    The teacher is no part of the parameters or the state. A student grid that differs from the teacher's is resampled
    to it, so that the target stays what the teacher said; registers take no part.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Backbone,
        views: Views,
        config: FeatureDistillationConfig,
        *,
        seed: int = 0,
    ) -> None:
        """seed: of the projector's initial weights, drawn without touching the global generator."""
        super().__init__()
        if views.num_views != 1:
            raise ConfigError(
                f"feature distillation shows both networks 1 view; the views make {views.num_views}"
            )
        if config.teacher_drop_path > 0:
            teacher = copy.deepcopy(teacher)
            add_stochastic_depth(teacher.backbone.network, config.teacher_drop_path)
        self.teacher = teacher
        self.student = student
        self.views = views
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Linear(student.embed_dim, _target_dim(teacher, config))

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and the share of the target's variance that the prediction explains (at most 1).

        views: one (B, 3, H, W) tensor in [0, 1]; progress is not used.
        """
        (images,) = views
        student, teacher = self._pair(images)
        prediction = self.projector(student)
        with torch.autocast(images.device.type, enabled=False):
            prediction, target = prediction.float(), whiten(teacher.float(), self.config.whitening)
            loss = F.smooth_l1_loss(prediction, target, beta=self.config.beta)
            explained = explained_variance(prediction.detach(), target)
        return {"loss": loss, "explained_variance": explained}

    def _pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Student and teacher vectors that stand for the same thing: (..., C_s) and (..., C_t)."""
        if self.config.target == "logits":
            with torch.no_grad():
                logits = self.teacher.backbone.logits(images)
            return self.student(images).patches.mean(dim=1), logits
        target = self.teacher.encode(images)
        tokens = self.student(images)
        if self.config.target == "pooled":
            return tokens.patches.mean(dim=1), target.patches.mean(dim=1)
        return paired_tokens(tokens, target)


def paired_tokens(student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
    """The tokens of both that stand for the same place, (B, N, C_s) and (B, N, C_t).

    The class tokens come first if both have one; then the teacher's grid, to which the student's is resampled
    (bilinear, antialiased). Resampling the target instead would teach a blurred map.
    """
    patches = resample(student, teacher.grid)
    if student.prefix.shape[1] == 0 or teacher.prefix.shape[1] == 0:
        return patches, teacher.patches
    pairs = ((student.prefix, patches), (teacher.prefix, teacher.patches))
    first, second = (torch.cat([prefix[:, :1], rest.to(prefix.dtype)], dim=1) for prefix, rest in pairs)
    return first, second


def resample(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Patch tokens on another grid, (B, h*w, C), bilinear and antialiased; unchanged if it is the same grid."""
    if tokens.grid == grid:
        return tokens.patches
    maps = tokens.patches.transpose(1, 2).unflatten(2, tokens.grid).float()
    resized = F.interpolate(maps, size=grid, mode="bilinear", antialias=True)
    return resized.flatten(2).transpose(1, 2).to(tokens.patches.dtype)


def whiten(target: Tensor, whitening: Literal["layernorm", "batch", "l2", "none"]) -> Tensor:
    """The target (..., C) float32 on the scale the loss works in; nothing here is learned.

    layernorm: mean 0 and biased variance 1 (eps 1e-5) over the channels of each vector. batch: the same over all
    vectors for each channel, across ranks. l2: length 1 for each vector.
    """
    if whitening == "layernorm":
        return F.layer_norm(target, target.shape[-1:], eps=EPS)
    if whitening == "l2":
        return F.normalize(target, dim=-1)
    if whitening == "batch":
        rows = target.flatten(0, -2)
        mean = mean_over_ranks(rows.mean(dim=0))
        variance = mean_over_ranks((rows - mean).square().mean(dim=0))
        return (target - mean) * (variance + EPS).rsqrt()
    return target


def explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - squared error over the target's variance around its mean per channel; a scalar, at most 1.

    0 is what predicting each channel's mean over this batch gives. prediction, target: (..., C).
    """
    target = target.flatten(0, -2)
    error = (prediction.flatten(0, -2) - target).square().sum()
    return 1 - error / (target - target.mean(dim=0)).square().sum().clamp_min(torch.finfo(target.dtype).tiny)


def _target_dim(teacher: Teacher, config: FeatureDistillationConfig) -> int:
    """Width of the target; ConfigError if the teacher has no head whose output could be it."""
    if config.target != "logits":
        return teacher.embed_dim
    backbone = teacher.backbone
    blank = backbone.mean.new_zeros(1, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        return int(backbone.logits(blank).shape[-1])
