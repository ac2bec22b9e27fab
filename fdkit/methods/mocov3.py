"""MoCo v3: contrastive learning of two views against a slow copy of the network, without labels or queue.

The student, a projector and a predictor make a query of each view; a momentum copy of student and projector makes a
key of each. A query must pick the key of its own image's other view among those of the whole batch, all ranks'.
The copy moves towards the student at every optimiser step, ever more slowly. Positions are fixed and the patch
projection stays as it was drawn, which is what keeps vision transformers stable here.
Source: Chen, Xie, He 2021 (arXiv 2104.02057); what the paper leaves open follows facebookresearch/moco-v3 at c349e6e.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import TwoViews, TwoViewsConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Preprocessing, pool
from fdkit.models.batch_norm import synchronise_batch_norm
from fdkit.models.collectives import gather_rows, rank
from fdkit.models.heads import mlp_head
from fdkit.models.libraries import build_timm
from fdkit.models.momentum import MomentumSchedule, follow, momentum_at, momentum_copy
from fdkit.models.vit import fix_position, patch_projection, xavier_initialise


class MoCoV3Config(Config):
    """MoCo v3; the defaults are those of vision transformers."""

    architecture: str = "vit_small_patch16_224"
    """timm name of the student; it starts from random weights, at the size of the views."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the timm model, such as embed_dim, depth, patch_size; num_heads is 12 for vit_small unless given."""
    position: Literal["sincos", "learned", "none"] = "sincos"
    """Positions of a vision transformer: fixed 2-D sine-cosine, learned, or none; "none" for other networks."""
    pooling: Literal["cls", "patches"] = "cls"
    """What the projector reads: the class token, or the mean of the patch tokens, after the final norm."""
    freeze_patch_projection: bool = True
    """Keep the patch projection of a vision transformer at its random start; false for other networks."""
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    """image_size / short side when the trained network is evaluated; 1 for images that are as small as the input."""
    hidden_dim: int = Field(default=4096, ge=1)
    """Width of the hidden layers of projector and predictor."""
    output_dim: int = Field(default=256, ge=2)
    """Width of the queries and keys."""
    num_projector_layers: int = Field(default=3, ge=1)
    """Layers of the projector: 3 for vision transformers, 2 for ResNets."""
    num_predictor_layers: int = Field(default=2, ge=1)
    """Layers of the predictor."""
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

    seed: of the initial weights, which are drawn without touching the global generator.
    Batch norms are synchronised already, whether or not a process group runs: do not convert them again.

    With gradient accumulation the momentum encoder moves once an optimiser step, before the first keys that follow
    `after_step`, but each part's negatives are its own images only: the batch that counts for the loss is the part.
    """

    def __init__(self, views: Views, config: MoCoV3Config, *, seed: int) -> None:
        super().__init__()
        self.views = views
        self.config = config
        if views.num_views != 2:
            raise ConfigError(f"MoCo v3 compares 2 views of an image; the views make {views.num_views}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build_student(config, image_size=views.image_size)
            self.projector = mlp_head(
                self.student.embed_dim,
                config.output_dim,
                hidden_dim=config.hidden_dim,
                num_layers=config.num_projector_layers,
            )
            self.predictor = mlp_head(
                config.output_dim,
                config.output_dim,
                hidden_dim=config.hidden_dim,
                num_layers=config.num_predictor_layers,
                last_norm=config.predictor_last_norm,
            )
        self.momentum_student = momentum_copy(self.student)
        self.momentum_projector = momentum_copy(self.projector)
        self._is_momentum_due = True

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: two (B, 3, H, W) tensors in [0, 1]; progress: share of all optimiser steps done, as steps / total.
        loss: sum over both directions of 2 * temperature * cross-entropy.
        positive_similarity: mean cosine of a query and its key; top1: share of queries nearest to their own key.
        feature_std: of the student's features, since queries would hide a collapse behind their batch norm.
        """
        is_learning = self.training and torch.is_grad_enabled()
        pooling = self.config.pooling
        features = [pool(self.student(view), pooling) for view in views]  # batch norms see one view at a time
        queries = [self.predictor(self.projector(rows)) for rows in features]
        with torch.no_grad():
            if is_learning:
                self._move_momentum_encoder(progress)
            keys = [self.momentum_projector(pool(self.momentum_student(view), pooling)) for view in views]
            gathered = gather_rows(torch.stack(keys, dim=1))  # (N, 2, d)
        first_label = rank() * len(queries[0])
        contrasts = [
            contrast(rows, gathered[:, other], temperature=self.config.temperature, first_label=first_label)
            for rows, other in ((queries[0], 1), (queries[1], 0))
        ]
        return {
            "loss": contrasts[0].loss + contrasts[1].loss,
            "positive_similarity": (contrasts[0].positive_similarity + contrasts[1].positive_similarity) / 2,
            "top1": (contrasts[0].top1 + contrasts[1].top1) / 2,
            "feature_std": (feature_std(features[0]) + feature_std(features[1])) / 2,
        }

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


def build(config: MoCoV3Config, views: TwoViewsConfig, *, seed: int) -> MoCoV3:
    """MoCo v3 on the two views of each image that BYOL uses."""
    return MoCoV3(TwoViews(views), config, seed=seed)


class Contrast(NamedTuple):
    """One direction of the contrast; three scalars."""

    loss: Tensor
    positive_similarity: Tensor
    top1: Tensor


def contrast(queries: Tensor, keys: Tensor, *, temperature: float, first_label: int = 0) -> Contrast:
    """How well each query (B, d) picks its key among all keys (N, d), by cosine.

    Row i belongs to key first_label + i. loss: 2 * temperature * InfoNCE, so that the gradient's size does not hang
    on the temperature; in float32 or finer even under autocast. Source: Chen et al. 2021, equation 1, algorithm 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        cosines = _unit_rows(queries) @ _unit_rows(keys).T  # (B, N)
        labels = torch.arange(first_label, first_label + len(queries), device=queries.device)
        loss = 2 * temperature * F.cross_entropy(cosines / temperature, labels)
    cosines = cosines.detach()
    positive_similarity = cosines.gather(1, labels[:, None]).mean()
    return Contrast(loss, positive_similarity, (cosines.argmax(dim=1) == labels).float().mean())


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over rows (B, d), scaled to length 1, averaged over the d components; a scalar.

    At most 1 / sqrt(d), for rows in all directions; 0 for equal rows, as in a collapse.
    Source: Chen and He 2021 (SimSiam), section 4.1.
    """
    return _unit_rows(features).std(dim=0, unbiased=False).mean()


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows (B, d) scaled to length 1, in float32 or finer."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def build_student(config: MoCoV3Config, *, image_size: int) -> Backbone:
    """The network MoCo v3 trains, initialised from the global generator; images are normalised as ImageNet's.

    Raises ConfigError if the configuration asks of the network what only a vision transformer has, or for another
    image size than the views'.
    """
    is_vit = config.architecture.startswith("vit_")
    args: dict[str, Any] = {"img_size": image_size}
    if config.architecture.startswith("vit_small"):
        args["num_heads"] = 12  # timm's has 6; weights fit both and mean something else
    if is_vit and config.position == "none":
        args["pos_embed"] = "none"
    args.update(config.model_args)
    if args["img_size"] != image_size:
        raise ConfigError(
            f"mocov3.model_args.img_size is {args['img_size']}, but the views are {image_size} pixels wide",
            "set views.image_size alone",
        )
    preprocessing = Preprocessing(
        IMAGENET_MEAN, IMAGENET_STD, image_size, config.crop_ratio, interpolation="bilinear"
    )
    student = build_timm(config.architecture, args, preprocessing=preprocessing)
    if is_vit:
        _prepare_vit(student.network, config)
    else:
        _refuse_vit_options(student, config)
    return synchronise_batch_norm(student)


def _prepare_vit(network: nn.Module, config: MoCoV3Config) -> None:
    """Initialise a vision transformer, fix its positions and freeze its patch projection, as configured."""
    xavier_initialise(network)
    if config.position == "sincos":
        fix_position(network, first="row")
    if not config.freeze_patch_projection:
        return
    projection = patch_projection(network)
    if projection is None:
        raise ConfigError(
            f"{config.architecture} has no single patch projection to freeze",
            "set mocov3.freeze_patch_projection to false",
        )
    projection.requires_grad_(False)


def _refuse_vit_options(student: Backbone, config: MoCoV3Config) -> None:
    """Raises ConfigError naming every option that means nothing for a network that is no vision transformer."""
    wrong = {
        "position: none": config.position != "none",
        "freeze_patch_projection: false": config.freeze_patch_projection,
        "pooling: patches": config.pooling == "cls" and student.num_prefix_tokens == 0,
    }
    if any(wrong.values()):
        needed = ", ".join(setting for setting, is_wrong in wrong.items() if is_wrong)
        raise ConfigError(
            f"mocov3.architecture {config.architecture} is no vision transformer; it needs {needed}",
            "the recipe pretrain/mocov3_r50 shows all settings of a ResNet-50",
        )
