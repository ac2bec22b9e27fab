"""Supervised: fine-tune a whole network, or its end, to name the classes of labelled images.

A classifier on a pretrained network learns from labels that mixup, CutMix and label smoothing make soft, under random
erasing and stochastic depth; the loss is their cross-entropy. The same with random weights is training from scratch.
Source: Touvron et al. 2021 (DeiT, arXiv 2012.12877), section 6; He et al. 2021 (MAE), appendix A.1; Wei et al. 2022
(arXiv 2205.14141), released code.
"""

import logging
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import Views
from fdkit.errors import ConfigError
from fdkit.methods._erasing import erase
from fdkit.methods._method import Duration, Method
from fdkit.methods._mixing import draw_mixture, mix, soft_targets
from fdkit.methods._partial import freeze_all_but
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.momentum import follow, momentum_copy

log = logging.getLogger("fdkit")

EMA_SPANS = 3
"""A moving average is worth having after this many times the steps it averages over."""


class SupervisedConfig(Config):
    """The classifier, and how it is regularised; the defaults are what MAE and Feature Distillation share."""

    pooling: Pooling = "patches"
    """What a ViT's head sees: the mean of the patch tokens through a new norm, or the class token through the
    pretrained one; other networks pool as they do in timm."""
    per_block_bias: bool = True
    """Give each block its own copy of a position bias table that all share; without effect on other networks."""
    head_std: float = Field(0.02, ge=0)
    """Standard deviation of the new head's weights; its bias is 0."""
    head_scale: float = Field(0.001, ge=0)
    """What the new head's weights are multiplied by at the beginning."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    trained_blocks: float | None = Field(None, ge=0)
    """Blocks that train, counted from the last: 0 trains the head alone, 0.5 also the MLP of the last block; null: all
    blocks and the embedding."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup's Beta distribution; 0 turns it off."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix's Beta distribution; 0 turns it off."""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """Share of the batches that are mixed."""
    switch_probability: float = Field(0.5, ge=0, le=1)
    """Share of the mixed batches that take CutMix rather than mixup, where both are on."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of each label that is spread over all classes."""
    erase_probability: float = Field(0.25, ge=0, le=1)
    """Share of the images of which a box is replaced by noise."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Average the weights over steps with this decay, and evaluate and export the average; null: off."""


class Supervised(Method):
    """A classifier in training; see the module.

    student: gives logits (`logits_of`), one a class. With config.ema_decay, `exported` is the moving average of its
    weights; the raw ones are then among the run's heads.
    Raises ConfigError for blocks to train that are not there.
    """

    compares_images = False  # mixing pairs the images of a part, which stays the same loss on average
    needs_labels = True

    def __init__(
        self, student: Backbone, views: Views, config: SupervisedConfig, *, num_classes: int
    ) -> None:
        super().__init__()
        self.student = student
        self.views = views
        self.config = config
        self.num_classes = num_classes
        self._asleep: list[nn.Module] = []
        if config.trained_blocks is not None:
            self._asleep = freeze_all_but(student.network, config.trained_blocks)
        self.averaged = None if config.ema_decay is None else momentum_copy(student).eval()

    @property
    def exported(self) -> Backbone:
        """The moving average of the student where there is one, else the student."""
        return self.student if self.averaged is None else self.averaged

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for parts of one image, which mixing would mix with themselves."""
        super().begin(duration)
        config = self.config
        mixes = (config.mixup or config.cutmix) and config.mix_probability
        if mixes and duration.part_size * self.views.num_views < 2:
            raise ConfigError(
                f"supervised.mixup {config.mixup:g} and supervised.cutmix {config.cutmix:g} mix the images of a batch, "
                "and a process takes one at a time",
                "use a larger --train.batch-size, or --supervised.mixup 0 --supervised.cutmix 0",
            )
        if config.ema_decay is not None and duration.num_steps * (1 - config.ema_decay) < EMA_SPANS:
            log.warning(
                "supervised.ema_decay %g averages over %d steps, and the run has %d: the average stays near the start",
                config.ema_decay,
                round(1 / (1 - config.ema_decay)),
                duration.num_steps,
            )

    def train(self, mode: bool = True) -> Self:
        """Frozen parts and the moving average stay in eval."""
        super().train(mode)
        for module in self._asleep:
            module.training = False
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def forward(
        self, views: list[Tensor], progress: float, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What `classify` gives for erased images and a mixture drawn now.

        views: V tensors (B, 3, H, W) in [0, 1], trained on as a batch of V * B; labels: (B,); progress is not used.
        """
        assert labels is not None, "the loop hands over labels where needs_labels says so"
        return self.classify(*self._drawn(torch.cat(views), labels.repeat(len(views))))

    # A mixture's numbers would be constants to the compiler, new ones at every step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drawn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), erased and mixed, and their targets (B, K)."""
        config, statistics = self.config, self.student.statistics
        if config.erase_probability:
            images = erase(images, config.erase_probability, mean=statistics.mean, std=statistics.std)
        height, width = images.shape[-2:]
        mixture = draw_mixture(
            (height, width),
            mixup=config.mixup,
            cutmix=config.cutmix,
            probability=config.mix_probability,
            switch_probability=config.switch_probability,
        )
        targets = soft_targets(
            labels, self.num_classes, share=mixture.share, smoothing=config.label_smoothing
        )
        return images if mixture.share == 1 else mix(images, mixture), targets

    def classify(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss of images (B, 3, H, W) in [0, 1] whose classes have the probabilities targets (B, K).

        loss: cross-entropy averaged over images, float32; train_top1: share of the images whose highest logit is that
        of their likeliest class.
        """
        logits = self.student.logits(images).float()
        hits = logits.detach().argmax(dim=1) == targets.argmax(dim=1)
        return {"loss": F.cross_entropy(logits, targets), "train_top1": hits.float().mean()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the average: average = decay * average + (1 - decay) * student, batch-norm statistics included."""
        decay = self.config.ema_decay
        if self.averaged is None or decay is None:
            return
        follow(self.averaged, self.student, decay)
        for target, source in zip(self.averaged.buffers(), self.student.buffers(), strict=True):
            if target.is_floating_point():
                target.lerp_(source, 1 - decay)
            else:
                target.copy_(source)
