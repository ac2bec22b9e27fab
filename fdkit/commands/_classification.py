"""Labelled images for a classifier, and what it says of those it has not seen."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdkit.commands._command import write_result
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.subset import Subset
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation._draws import validation_split
from fdkit.evaluation._metrics import (
    accuracies,
    expected_calibration_error,
    hits_to_text,
    negative_log_likelihood,
    per_class_accuracy,
    rank_of_label,
)
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation.features import Features, encode_source, evaluating, evaluation_crop
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import save_backbone

CLASS_FOLDERS = (
    "put the images of each class in a folder of its own: DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg"
)


class Images(NamedTuple):
    """What a classifier is trained, watched and tested on; labels of all count in `classes`."""

    train: ImageSource
    validation: ImageSource | None
    test: ImageSource
    classes: tuple[str, ...]


def open_images(
    data: str, *, split: str | None, ratio: float, validates: bool, test_split: str, seed: int
) -> Images:
    """The images of `data`: validation is its split of that name, or this ratio of every class of train.

    validates: whether there is to be a validation at all; without one, all of train is trained on.
    Raises DataError without labels, with one class, and for classes that train lacks; ConfigError if validation would
    read the test images.
    """
    train = open_source(data, "train")
    classes = _classes(train)
    test = _in_classes(open_source(data, test_split), train, classes)
    if not validates:
        return Images(train, None, test, classes)
    if split is not None:
        validation = _in_classes(open_source(data, split), train, classes)
        if validation.fingerprint == test.fingerprint:
            raise ConfigError(
                f"validation_split {split} holds the test images of {data}, which are read once, at the end",
                "leave it out: a part of train is held out then, or name other images with --test-split",
            )
        return Images(train, validation, test, classes)
    assert train.labels is not None, "_classes has looked at them"
    kept, held_out = validation_split(torch.from_numpy(train.labels), ratio, seed=seed)
    if len(held_out) == 0:
        raise DataError(
            f"no class of {train.name} has two images: nothing can be held out for validation",
            "add images, or use --validate-every-epochs 0",
        )
    return Images(Subset(train, kept.numpy()), Subset(train, held_out.numpy()), test, classes)


def _classes(train: ImageSource) -> tuple[str, ...]:
    """Names of the classes; at least two of them have images."""
    if train.labels is None:
        raise DataError(f"{train.name} has no labels, and fine-tuning needs them", CLASS_FOLDERS)
    present = np.unique(train.labels)
    if len(present) < 2:
        raise DataError(
            f"{train.name} has {len(present)} class in its training images, and there is nothing to tell apart",
            CLASS_FOLDERS,
        )
    return tuple(train.classes) or tuple(str(label) for label in range(int(present[-1]) + 1))


def _in_classes(source: ImageSource, train: ImageSource, classes: tuple[str, ...]) -> ImageSource:
    """The source, whose labels must count in `classes`, every one of which train has images of."""
    if source.labels is None:
        raise DataError(f"the images of {source.name} to measure on have no labels", CLASS_FOLDERS)
    assert train.labels is not None, "the caller has looked at them"
    there = np.unique(source.labels)
    names = tuple(source.classes) or tuple(str(label) for label in range(int(there[-1]) + 1))
    trained = {classes[label] for label in np.unique(train.labels)}
    if unknown := [names[label] for label in there if names[label] not in trained]:
        raise DataError(
            f"{source.name} has classes without training images: {', '.join(unknown)}",
            "name the class folders of train and test alike",
        )
    assert names[: len(classes)] == classes[: len(names)], "splits of one source number their classes alike"
    return source


def class_logits(
    backbone: Backbone, source: ImageSource, loader: LoaderConfig, *, batch_size: int = 64
) -> Features:
    """Logits (N, K) of the classifier's own evaluation crop of every readable image, in float32 arithmetic."""
    device = backbone.mean.device
    with evaluating(backbone):
        return encode_source(
            backbone.logits,
            source,
            evaluation_crop(backbone.preprocessing),
            batch_size=batch_size,
            loader=loader,
            device=device,
        )


def measure(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """What a classifier's logits (N, K) are worth, of labels (N,).

    "top1", "top1_interval" (95 %, bootstrap over images), "top5" (of 5 classes or more), "per_class" (class name ->
    fraction, None without images), "loss" (mean negative log-likelihood, nats), "calibration_error" (15 bins),
    "num_images" and "hits" (which images were right, see `hits_to_text`).
    """
    ranks = rank_of_label(logits, labels)
    return {
        **accuracies(ranks, len(classes)),
        "top1_interval": list(bootstrap_interval(ranks == 0)),
        "per_class": dict(zip(classes, per_class_accuracy(ranks == 0, labels, len(classes)), strict=True)),
        "loss": negative_log_likelihood(logits, labels),
        "calibration_error": expected_calibration_error(logits.double().softmax(dim=1), labels),
        "num_images": len(labels),
        "hits": hits_to_text(ranks == 0),
    }


class Validation:
    """A monitor for the training loop: how well what the method exports names the classes of held-out images.

    best: folder for the weights of the highest accuracy so far, the earliest of equal ones, with validation.json beside
    them; None keeps none.
    """

    name = "validation"

    def __init__(
        self,
        source: ImageSource,
        classes: tuple[str, ...],
        *,
        every_steps: int,
        loader: LoaderConfig,
        best: Path | None = None,
    ) -> None:
        self.every_steps = every_steps
        self._source = source
        self._classes = classes
        self._loader = loader
        self._best = best

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """validation_top1 in [0, 1] and validation_loss in nats; nothing before the first step."""
        if step == 0:
            return {}
        logits = class_logits(method.exported, self._source, self._loader)
        found = measure(logits.values, logits.labels, self._classes)
        if self._best is not None and found["top1"] > self._best_before(step):
            save_backbone(method.exported, self._best)
            write_result(self._best / "validation.json", {"step": step, **found})
        return {"validation_top1": found["top1"], "validation_loss": found["loss"]}

    def _best_before(self, step: int) -> float:
        """The highest accuracy so far; what a run that is resumed wrote later than this does not count."""
        assert self._best is not None, "asked for where the best is kept"
        path = self._best / "validation.json"
        found = json.loads(path.read_text()) if path.is_file() else {"step": step, "top1": -1.0}
        return float(found["top1"]) if found["step"] < step else -1.0
