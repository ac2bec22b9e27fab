"""What is measured while a network trains: kNN accuracy where there are labels, and signs of collapse without any.

Both look at the network that the method exports, at features as the evaluators see them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.data.decode import BadImage
from fdkit.data.loader import BadImages, LoaderConfig, evaluation_batches
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.subset import Subset
from fdkit.data.views import Pixels, Sample, Views
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import knn
from fdkit.evaluation._reading import reader, resolve_reading
from fdkit.evaluation.features import extract_features
from fdkit.methods._method import Method
from fdkit.models.representation import alignment, channel_std, effective_rank, uniformity

IMAGES_BETWEEN_COLLAPSE_MEASUREMENTS = 20_000
BATCH_SIZE = 64


class MonitorConfig(Config):
    """What is measured during training and logged as monitor/NAME; it never changes the training."""

    every_epochs: float = Field(default=0, ge=0)
    """Epochs between two measurements of kNN accuracy, which needs labels; 0 turns it off."""
    data: str | None = None
    """Labelled images with train and test splits, for kNN; by default the training data itself."""
    num_classes: int | None = Field(default=None, ge=2)
    """kNN among the first this many classes alone, which is quicker; null: among all."""
    k: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the vote."""
    max_images: int = Field(default=10_000, ge=1)
    """At most this many images of each split are used for kNN, evenly spread over it."""
    collapse_every_epochs: float | None = Field(default=None, ge=0)
    """Epochs between two looks for a collapse, which needs no labels; 0 turns it off; null: 1, or the epochs that
    20,000 images make where that is more, so that it costs little."""
    collapse_max_images: int = Field(default=256, ge=2)
    """At most this many training images, evenly spread, are looked at for a collapse."""


class OnlineKNN:
    """A monitor for the training loop: kNN accuracy of what the method exports, on a fixed set of images."""

    name = "knn"

    def __init__(
        self,
        train: ImageSource,
        test: ImageSource,
        config: MonitorConfig,
        *,
        every_steps: int,
        loader: LoaderConfig,
    ) -> None:
        self.every_steps = every_steps
        self.config = config
        self._train = _spread(train, config.max_images)
        self._test = _spread(test, config.max_images)
        self._loader = loader

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """Measure once; `knn_top1` is a fraction in [0, 1]."""
        backbone = method.exported
        device = next(backbone.parameters()).device
        train, test = (
            extract_features(backbone, source, loader=self._loader, device=device)
            for source in (self._train, self._test)
        )
        vote = knn.KNNConfig(
            k=(min(self.config.k, len(train.labels)),), temperature=(self.config.temperature,)
        )
        return {"knn_top1": float(knn.evaluate(train, test, vote)["top1"])}


class Collapse:
    """A monitor for the training loop: whether features of different images still differ, without labels.

    It looks at two of the method's own views of each image, the same ones every time. Unreadable images are left out;
    training names them.
    """

    name = "collapse"

    def __init__(
        self, source: ImageSource, *, max_images: int, every_steps: int, loader: LoaderConfig
    ) -> None:
        self.every_steps = every_steps
        self._source = _spread(source, max_images)
        self._loader = loader

    @torch.no_grad()
    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """Measure once. Raises NumericsError for features that are not finite, DataError without readable images.

        channel_std_ratio: in [0, 1], the channels' standard deviation over images as a share of 1 / sqrt(C), the most
        there can be; 0 is a collapse. effective_rank: directions the features take up (RankMe), 1 is a collapse.
        alignment: in [0, 4], how far two views of an image are apart. uniformity: in [-8, 0], lower is more evenly
        spread. But for alignment, all are of the first view.
        """
        first, second = self._features(method)
        if not (first.isfinite().all() and second.isfinite().all()):
            raise NumericsError(
                f"the network's features of training images are not finite at step {step}",
                "a lower --optim.lr, a longer --optim.warmup-epochs or --train.precision fp32 may help",
            )
        return {
            "channel_std_ratio": float(channel_std(first)) * first.shape[1] ** 0.5,
            "effective_rank": float(effective_rank(first)),
            "alignment": float(alignment(first, second)),
            "uniformity": float(uniformity(first)),
        }

    def _features(self, method: Method) -> tuple[Tensor, Tensor]:
        """(N, C) features of the first and of the second view, on the CPU."""
        backbone = method.exported.eval()
        read = reader(backbone, resolve_reading(backbone, "auto"))
        found = [
            [read(view)[0].float().cpu() for view in views]
            for views in self._views(method, next(backbone.parameters()).device)
        ]
        if sum(len(first) for first, _ in found) < 2:
            raise DataError(
                f"fewer than 2 images of {self._source.name} could be read",
                "look at the unreadable images named in the log, or leave this out: --monitor.every-epochs 0",
            )
        first, second = (torch.cat(parts) for parts in zip(*found, strict=True))
        return first, second

    def _views(self, method: Method, device: torch.device) -> Iterator[list[Tensor]]:
        """Two (B, 3, H, W) views of the images, batch by batch."""
        views = _Pair(method.views)
        batches = evaluation_batches(
            self._source, views, self._loader, batch_size=BATCH_SIZE, bad_images=_Unnamed(self._source, 1.0)
        )
        for batch in batches:
            crops = [crop.to(device) for crop in batch.crops]
            yield views.finish(crops, [drawn.to(device) for drawn in batch.colour])


class _Pair:
    """The first two of some views, or one view drawn twice."""

    num_views = 2

    def __init__(self, views: Views) -> None:
        self._views = views
        self._draws = 1 if views.num_views > 1 else 2
        self.image_size = views.image_size

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The views of each draw, end to end."""
        samples = [self._views(image, random) for _ in range(self._draws)]
        crops = [crop for sample in samples for crop in sample.crops]
        return Sample(crops, [colour for sample in samples for colour in sample.colour])

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """Two (B, 3, H, W), float32 in [0, 1]."""
        if self._draws == 1:
            return self._views.finish(crops, colour)[:2]
        halves = zip(_halves(crops), _halves(colour), strict=True)
        return [self._views.finish(*half)[0] for half in halves]


class _Unnamed(BadImages):
    """Unreadable images that are nobody's business here: training meets them too, names them and counts them."""

    def add(self, bad: Sequence[BadImage]) -> None:
        """Leave them out."""


def build_monitor(
    config: MonitorConfig,
    data: str,
    *,
    steps_per_epoch: int,
    loader: LoaderConfig,
    source: ImageSource | None = None,
) -> list[Any]:
    """The monitors of a run: a look for a collapse, online kNN, both or none.

    source: the training images, if they are open already; a single one cannot collapse and is not looked at.
    Raises DataError if the images for kNN lack labels or splits, ConfigError for more classes than they have.
    """
    monitors: list[Any] = []
    source = open_source(data, "train") if source is None else source
    epochs = config.collapse_every_epochs
    if epochs is None:
        epochs = max(1.0, IMAGES_BETWEEN_COLLAPSE_MEASUREMENTS / len(source))
    if epochs and len(source) > 1:
        every_steps = max(1, round(epochs * steps_per_epoch))
        monitors.append(
            Collapse(source, max_images=config.collapse_max_images, every_steps=every_steps, loader=loader)
        )
    if config.every_epochs:
        every_steps = max(1, round(config.every_epochs * steps_per_epoch))
        train, test = _labelled_splits(config, data)
        monitors.append(OnlineKNN(train, test, config, every_steps=every_steps, loader=loader))
    return monitors


def _labelled_splits(config: MonitorConfig, data: str) -> tuple[ImageSource, ImageSource]:
    """The images for kNN, of the classes asked for."""
    name = config.data or data
    asked = f"monitor.every_epochs {config.every_epochs:g} asks for kNN accuracy"
    remedy = (
        "name labelled images, DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, with --monitor.data DIR, "
        "or turn it off: --monitor.every-epochs 0"
    )
    splits = []
    for split in ("train", "test"):
        try:
            source = open_source(name, split)
        except DataError as error:
            raise DataError(f"{asked}, but {error.message}", remedy) from error
        if source.labels is None:
            raise DataError(f"{asked}, but the {split} images of {source.name} have no labels", remedy)
        splits.append(_first_classes(source, config.num_classes, split))
    return splits[0], splits[1]


def _first_classes(source: ImageSource, num_classes: int | None, split: str) -> ImageSource:
    """The images of the first classes, or the source itself."""
    if num_classes is None:
        return source
    assert source.labels is not None, "the caller checks the labels"
    there = len(source.classes)
    if num_classes > there:
        raise ConfigError(
            f"monitor.num_classes {num_classes} is more than the {there} classes of {source.name}",
            f"use at most --monitor.num-classes {there}",
        )
    chosen = np.flatnonzero(source.labels < num_classes)
    if len(chosen) == 0:
        raise DataError(f"no {split} image of {source.name} is of its first {num_classes} classes")
    return Subset(source, chosen)


def _spread(source: ImageSource, count: int) -> ImageSource:
    if len(source) <= count:
        return source
    return Subset(source, [round(i * len(source) / count) for i in range(count)])


def _halves(things: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    middle = len(things) // 2
    return things[:middle], things[middle:]
