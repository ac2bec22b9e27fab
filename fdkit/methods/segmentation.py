"""Semantic segmentation: a head on a backbone's maps learns the class of every pixel, the backbone frozen or not.

A linear head reads the last layer, or the last few, and shows what the features hold by themselves; UPerNet reads four
levels and is how published comparisons on ADE20K are made. The loss is cross-entropy over the pixels that count, at
the resolution of the mask.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers import DropPath
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.segmentation import IGNORED
from fdkit.data.segmentation_views import SegmentationCrop
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method
from fdkit.models.backbone import Backbone
from fdkit.models.batch_norm import synchronise_batch_norm
from fdkit.models.collectives import mean_over_ranks
from fdkit.models.layers import layer_positions, list_layers
from fdkit.models.segmentation_heads import (
    AUXILIARY_LEVEL,
    NUM_LEVELS,
    FCNHead,
    LinearHead,
    UPerNet,
    build_pyramid,
    has_stages,
    pyramid_layers,
    resize,
    token_map,
)

AUXILIARY_CHANNELS = 256
DROP_PATHS = ("drop_path1", "drop_path2", "drop_path")
"""Where timm's blocks keep their stochastic depth."""


class SegmentationConfig(Config):
    """What is trained, and the head that says classes."""

    freeze: bool = True
    """Keep the backbone as it is and train the head alone."""
    head: Literal["linear", "upernet"] = "linear"
    """A batch norm and a linear classifier at every place, or UPerNet: pooled context and a pyramid of four levels."""
    num_layers: int = Field(default=1, ge=1)
    """Last layers (stages of Swin, ConvNeXt, ResNet) whose tokens the linear head reads, concatenated."""
    layers: tuple[int, ...] | None = None
    """Layers that the head reads, from 0, or from the end if negative; left out, the last ones for the linear head,
    and for UPerNet four evenly spaced blocks or the last four stages."""
    channels: int = Field(default=512, ge=1)
    """Channels of UPerNet's pyramid."""
    auxiliary_weight: float = Field(default=0.4, ge=0)
    """Weight of the loss of UPerNet's auxiliary head, which only training has; 0 leaves it out."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the channels in front of UPerNet's classifiers that training drops."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the last block of a transformer that is trained too, growing linearly from 0."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        defaults = {name: field.default for name, field in SegmentationConfig.model_fields.items()}
        without = ("num_layers",) if self.head == "upernet" else ("channels", "auxiliary_weight", "dropout")
        for name in without:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"segmentation.{name} {getattr(self, name)} has no effect on the head {self.head}",
                    f"leave it out, or use --segmentation.head {'linear' if self.head == 'upernet' else 'upernet'}",
                )
        if self.layers is not None and self.num_layers != 1:
            raise ConfigError(
                f"segmentation.num_layers {self.num_layers} and layers {list(self.layers)} exclude each other",
                "name the layers alone",
            )
        if self.freeze and self.drop_path > 0:
            raise ConfigError(
                f"segmentation.drop_path {self.drop_path} has no effect on a frozen backbone",
                "leave it out, or use --segmentation.freeze false",
            )
        return self


class Segmentation(Method):
    """A head, or a head and its backbone, in training.

    Every image counts by its pixels: the loss of a batch is the mean over all pixels that count, 0 if none does.
    Source: linear: Oquab et al. 2023 (DINOv2), section 7.4; upernet: Xiao et al. 2018, with the auxiliary head and
    the levels of BEiT (Bao et al. 2021) and Swin (Liu et al. 2021).
    """

    views: SegmentationCrop

    def __init__(
        self,
        student: Backbone,
        views: SegmentationCrop,
        config: SegmentationConfig,
        *,
        num_classes: int,
        seed: int = 0,
    ) -> None:
        """student: changed in place, in what trains. seed: of the head's weights; the global generator is untouched.

        Raises ConfigError for a network whose layers are not known, are too few, or do not fit what is asked.
        """
        super().__init__()
        self.student = student
        self.views = views
        self.config = config
        self.layers = _layers(student, config)
        # A final norm fits the last stage alone, and a pyramid reads the layers as they are.
        last = len(list_layers(student.network)) - 1
        fits = not has_stages(student.network) or self.layers == [last]
        self.norm = config.head == "linear" and fits
        widths = [list_layers(student.network)[number].width for number in self.layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pyramid, self.head, self.auxiliary = _build_head(student, config, widths, num_classes)
        student.requires_grad_(not config.freeze)
        if not config.freeze:
            _set_drop_path(student.network, config.drop_path)
            synchronise_batch_norm(student)
            self._freeze_unread()

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for single images, which a batch norm after pooling to one place cannot normalise."""
        super().begin(duration)
        if self.config.head == "upernet":
            check_batch_norm(self, duration)

    def train(self, mode: bool = True) -> Self:
        """A frozen backbone stays in eval, whatever the mode of the method."""
        super().train(mode)
        if self.config.freeze:
            self.student.eval()
        return self

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, the share of pixels that are right, and of UPerNet the loss of its auxiliary head.

        views: images (B, 3, H, W) in [0, 1] and their classes (B, H, W) int64, IGNORED where nothing counts;
        progress is not used.
        """
        images, masks = views
        levels = self._levels(images)
        scores = resize(self.head(levels).float(), masks.shape[-2:])
        loss = pixel_loss(scores, masks)
        scalars = {"pixel_accuracy": pixel_accuracy(scores.detach(), masks)}
        if self.auxiliary is not None:
            found = self.auxiliary(levels[AUXILIARY_LEVEL]).float()
            auxiliary_loss = pixel_loss(resize(found, masks.shape[-2:]), masks)
            loss = loss + self.config.auxiliary_weight * auxiliary_loss
            scalars["auxiliary_loss"] = auxiliary_loss.detach()
        return {"loss": loss, **scalars}

    def scores(self, images: Tensor) -> Tensor:
        """Scores (B, K, h, w) of classes, at the grid of the finest level, of images (B, 3, H, W) in [0, 1]."""
        scores: Tensor = self.head(self._levels(images))
        return scores

    def _levels(self, images: Tensor) -> list[Tensor]:
        """The maps the head reads, the finest first."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
            tokens = self.student.encode_layers(images, self.layers, norm=self.norm)
        maps = [token_map(one) for one in tokens]
        return maps if self.pyramid is None else self.pyramid(maps)

    def _freeze_unread(self) -> None:
        """Stops the training of what no level hangs on, such as a final norm; ranks would wait for its gradient."""
        student = self.student.eval()
        blank = student.mean.new_zeros(1, 3, student.image_size, student.image_size)
        found = student.encode_layers(blank, self.layers, norm=self.norm)
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        total = torch.stack([one.patches.sum() for one in found]).sum()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True
        ):
            parameter.requires_grad_(gradient is not None)


def pixel_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of scores (B, K, H, W) over the pixels of masks (B, H, W) that count; 0 if none.

    Of several processes, each divides by the mean count of all, so that the mean of their losses is that over all
    pixels, wherever they lie.
    """
    total = F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum")
    return total / _mean_count(masks).to(total.dtype)


def pixel_accuracy(scores: Tensor, masks: Tensor) -> Tensor:
    """Share of the pixels of masks (B, H, W) that count whose class has the highest of the scores (B, K, H, W).

    Of several processes, the mean of what they get is the share of all pixels.
    """
    right = (scores.argmax(dim=1) == masks) & (masks != IGNORED)
    return right.sum() / _mean_count(masks)


def _mean_count(masks: Tensor) -> Tensor:
    """Pixels that count, float64, averaged over the processes; never 0, so that nothing is divided by it."""
    count = mean_over_ranks((masks != IGNORED).sum().double())
    return count.clamp_min(torch.finfo(torch.float32).tiny)


def _layers(student: Backbone, config: SegmentationConfig) -> list[int]:
    """The layers the head reads, counted from 0."""
    if config.layers is not None:
        layers = layer_positions(student.network, config.layers, norm=False)
        is_pyramid = config.head == "upernet"
        if is_pyramid and (len(layers) != NUM_LEVELS or layers != sorted(set(layers))):
            raise ConfigError(
                f"segmentation.layers {list(config.layers)}: upernet reads {NUM_LEVELS} layers, one behind the other",
                "leave them out for evenly spaced ones",
            )
        return layers
    if config.head == "upernet":
        return pyramid_layers(student.network)
    count = len(list_layers(student.network))
    if config.num_layers > count:
        raise ConfigError(
            f"segmentation.num_layers {config.num_layers}: the network has {count} layers",
            f"use --segmentation.num-layers {count} or less",
        )
    return list(range(count - config.num_layers, count))


def _build_head(
    student: Backbone, config: SegmentationConfig, widths: list[int], num_classes: int
) -> tuple[nn.Module | None, nn.Module, nn.Module | None]:
    """The pyramid, the head and the auxiliary head; None where there is none."""
    if config.head == "linear":
        return None, LinearHead(widths, num_classes), None
    pyramid = build_pyramid(student.network, widths)
    head = UPerNet(widths, num_classes, channels=config.channels, dropout=config.dropout)
    if config.auxiliary_weight == 0:
        return pyramid, head, None
    auxiliary = FCNHead(
        widths[AUXILIARY_LEVEL],
        num_classes,
        channels=min(AUXILIARY_CHANNELS, config.channels),
        dropout=config.dropout,
    )
    return pyramid, head, auxiliary


def _set_drop_path(network: nn.Module, rate: float) -> None:
    """Gives every block this stochastic depth in place of the one it was built with, from 0 at the first to `rate`.

    Raises ConfigError for a rate above 0 where no block has a place for it.
    """
    found = [
        (block, [name for name in DROP_PATHS if isinstance(getattr(block, name, None), nn.Module)])
        for block in network.modules()
    ]
    blocks = [(block, names) for block, names in found if names]
    if rate and not blocks:
        raise ConfigError(
            f"segmentation.drop_path {rate}: the blocks of {type(network).__name__} have no place for it",
            "leave it out",
        )
    for (block, names), drop_prob in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in names:
            setattr(block, name, DropPath(drop_prob) if drop_prob else nn.Identity())
