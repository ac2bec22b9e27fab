"""The online kNN monitor: how good the student's frozen features are while it trains."""

from pydantic import Field

from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.subset import Subset
from fdkit.evaluation import knn
from fdkit.evaluation.features import extract_features
from fdkit.methods._method import Method


class MonitorConfig(Config):
    """Online kNN accuracy of the student, logged as knn_top1; it never changes the training."""

    every_epochs: float = Field(default=0, ge=0)
    """Epochs between two measurements; 0 turns the monitor off."""
    data: str | None = None
    """Labelled images with train and test splits; by default the training data itself."""
    k: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the vote."""
    max_images: int = Field(default=10_000, ge=1)
    """At most this many images of each split are used, evenly spread over it."""


class OnlineKNN:
    """A monitor for the training loop: kNN accuracy of the method's student on a fixed set of images."""

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
        device = next(method.student.parameters()).device
        train, test = (
            extract_features(method.student, source, loader=self._loader, device=device)
            for source in (self._train, self._test)
        )
        vote = knn.KNNConfig(
            k=(min(self.config.k, len(train.labels)),), temperature=(self.config.temperature,)
        )
        return {"knn_top1": float(knn.evaluate(train, test, vote)["top1"])}


def build_monitor(
    config: MonitorConfig, data: str, *, steps_per_epoch: int, loader: LoaderConfig
) -> list[OnlineKNN]:
    """The monitors of a run: none, or the online kNN. Raises DataError if its images lack labels or splits."""
    if not config.every_epochs:
        return []
    train, test = (open_source(config.data or data, split) for split in ("train", "test"))
    every_steps = max(1, round(config.every_epochs * steps_per_epoch))
    return [OnlineKNN(train, test, config, every_steps=every_steps, loader=loader)]


def _spread(source: ImageSource, count: int) -> ImageSource:
    if len(source) <= count:
        return source
    return Subset(source, [round(i * len(source) / count) for i in range(count)])
