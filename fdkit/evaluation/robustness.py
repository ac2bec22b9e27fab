"""How much of a frozen model's accuracy is left on corrupted photographs, and on other test sets of its classes.

A classifier is fitted on the clean training images (or is the model's own head) and shown the test images under every
corruption and severity asked for; nothing is chosen by what it answers. Corrupted images are made while they are read.
The mean corruption error is the mean over the fifteen common corruptions of the mean over severities of 1 - accuracy.
AlexNet's errors, by which it is divided in the paper, hold for the published images alone: they are used for a whole
ImageNet-C folder and for nothing else.
Source: Hendrycks and Dietterich 2019 (ImageNet-C), section 4; Hendrycks et al. 2021 for ImageNet-A and -R, Wang et al.
2019 for -Sketch, Recht et al. 2019 for -V2.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.data.corrupted_source import CorruptedSource, spread_positions
from fdkit.data.corruptions import (
    COMMON,
    CORRUPTIONS,
    EXTRA,
    REFERENCE_SIDE,
    SEVERITIES,
    check_name,
    check_severity,
)
from fdkit.data.imagenet_variants import RenamedClasses, Variant, matched, open_variants
from fdkit.data.sources import ImageSource
from fdkit.data.subset import Subset
from fdkit.errors import ConfigError
from fdkit.evaluation._classifier import IMAGENET_CLASSES, Classifier, Kind, make_classifier
from fdkit.evaluation._metrics import Metrics, expected_calibration_error
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import labels_of

log = logging.getLogger("fdkit")

GROUPS = {"all": tuple(COMMON), "extra": tuple(EXTRA)}
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean error over the five severities of ImageNet-C. Source: google-research/augmix, imagenet.py."""


class RobustnessConfig(Config):
    """What the model is shown, and the classifier that names it."""

    classifier: Kind = "logistic"
    """What names the classes: a probe of the clean training features, chosen and fitted as the evaluator of that name
    does by default, or head, the model's own classifier."""
    corruptions: tuple[str, ...] = Field(("all",), min_length=1)
    """Corruptions by name, with commas or spaces between; all: the fifteen common ones; extra: the four others."""
    severities: tuple[int, ...] = Field(SEVERITIES, min_length=1)
    """Severities of every corruption, 1 to 5."""
    limit: int | None = Field(None, ge=1)
    """Most test images, an equal share of every class; none means all."""
    variant: tuple[str, ...] = ()
    """Folders of other test sets with the training classes, commas or spaces between: ImageNet-A, -R, -Sketch, -V2,
    -C, or class folders of your own."""
    corruption_size: int = Field(REFERENCE_SIDE, ge=1)
    """Short side in pixels that larger test images are reduced to before they are corrupted."""
    k: int = Field(20, ge=1)
    """Voting neighbours, of the classifier knn."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of their votes."""
    seed: int = Field(0, ge=0)
    """Seed of the corruptions."""

    @field_validator("corruptions", "variant", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        """One text with commas, or several, as the names in them."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple):
            return value
        return tuple(
            part for text in texts for part in (text.split(",") if isinstance(text, str) else [text])
        )

    @model_validator(mode="after")
    def _knows_its_corruptions(self) -> Self:
        for name in self.corruptions:
            if name not in GROUPS:
                check_name(name)
        for severity in self.severities:
            check_severity(severity)
        changed = [name for name in ("k", "temperature") if getattr(self, name) != _default(name)]
        if changed and self.classifier != "knn":
            raise ConfigError(
                f"{changed[0]} has no effect on the classifier {self.classifier}", "use --classifier knn"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Every corruption asked for once, in the order of the benchmark."""
        wanted = {one for name in self.corruptions for one in GROUPS.get(name, (name,))}
        return tuple(name for name in CORRUPTIONS if name in wanted)


def _default(name: str) -> Any:
    return RobustnessConfig.model_fields[name].default


class Seen(NamedTuple):
    """How a classifier did on one set of images."""

    hits: Tensor
    """(N,) bool."""
    calibration_error: float | None
    """None from neighbours' votes, which are no probabilities."""
    info: dict[str, Any]
    """Of the images."""

    @property
    def top1(self) -> float:
        """Fraction of hits."""
        return int(self.hits.sum()) / len(self.hits)

    def to_json(self) -> dict[str, Any]:
        """Accuracy, its 95 % interval over test images, and calibration."""
        interval = list(bootstrap_interval(self.hits))
        return {"top1": self.top1, "interval": interval, "ece": self.calibration_error}


def measure(subject: Subject, config: RobustnessConfig) -> Metrics:
    """Accuracy of a classifier on the clean test images, on corrupted ones, and on other test sets.

    Returns {"evaluator", "top1" (clean), "interval", "ece", "mean_corruption_error" (of the common corruptions asked
    for; None if there is none), "mean_corruption_error_interval", "relative_robustness" (corrupted accuracy over
    clean), "corruptions": {name: {"error", "relative_robustness", "is_common", "severities": {severity: {"top1",
    "interval", "ece"}}}}, "variants", "classifier" with what was chosen for it, "num_classes" it knows and
    "num_allowed" of the data, "settings", "test"}.
    Clean means reduced to the size of the corrupted images, and not corrupted. Features of every corruption are kept
    in the cache as others are. Raises DataError without labels or for a variant whose classes are not known.
    """
    labels_of(subject.source(subject.split))
    classifier = make_classifier(subject, config)
    variants = [one for folder in config.variant for one in open_variants(folder, classifier.classes)]
    images = matched(subject.source(subject.split), classifier.classes)
    clean = _look(classifier, images, config)
    seen = {
        name: {
            severity: _look(classifier, images, config, name, severity) for severity in _severities(config)
        }
        for name in config.names
    }
    numbers = {"evaluator": "robustness", **clean.to_json(), **summary(clean, seen)}
    _say(numbers)
    settings = config.model_dump(mode="json", include=set(RobustnessConfig.model_fields) - {"classifier"})
    return {
        **numbers,
        "variants": _variant_results(classifier, variants),
        **classifier.info,
        "num_allowed": len(images.own_classes),
        "settings": settings,
        "test": clean.info,
    }


def summary(clean: Seen, seen: dict[str, dict[int, Seen]]) -> dict[str, Any]:
    """The mean corruption error with its interval, and a table of every corruption."""
    table = {
        name: {
            "error": _mean_error(cells),
            "relative_robustness": _ratio(1 - _mean_error(cells), clean.top1),
            "is_common": name in COMMON,
            "severities": {str(severity): cell.to_json() for severity, cell in cells.items()},
        }
        for name, cells in seen.items()
    }
    common = [cells for name, cells in seen.items() if name in COMMON]
    if not common:
        return {"mean_corruption_error": None, "relative_robustness": None, "corruptions": table}
    # Of every image the mean over corruptions and severities, since these are shown the same images.
    per_image = torch.stack([cell.hits.double() for cells in common for cell in cells.values()]).mean(dim=0)
    low, high = bootstrap_interval(1 - per_image)
    error = sum(_mean_error(cells) for cells in common) / len(common)
    return {
        "mean_corruption_error": error,
        "mean_corruption_error_interval": [low, high],
        "relative_robustness": _ratio(1 - error, clean.top1),
        "corruptions": table,
    }


def _severities(config: RobustnessConfig) -> list[int]:
    return sorted(set(config.severities))


def _look(
    classifier: Classifier,
    images: RenamedClasses,
    config: RobustnessConfig,
    name: str = next(iter(COMMON)),
    severity: int = 0,
) -> Seen:
    """The test images, or a part of them, under one corruption; severity 0 is none."""
    shown: ImageSource = CorruptedSource(
        images, name, severity, seed=config.seed, short_side=config.corruption_size
    )
    if config.limit is not None:
        shown = Subset(shown, spread_positions(images.labels, config.limit))
    return _answered(classifier, shown, images.own_classes)


def _answered(classifier: Classifier, images: ImageSource, own_classes: Sequence[int]) -> Seen:
    features = classifier.read(images)
    labels = features.labels.cpu()
    allowed = torch.tensor(own_classes)
    answers = classifier.answer(features.values.cpu(), allowed)
    error = None
    if answers.probabilities is not None:
        error = expected_calibration_error(answers.probabilities, torch.searchsorted(allowed, labels))
    return Seen(answers.predicted == labels, error, features.info)


def _variant_results(classifier: Classifier, variants: list[Variant]) -> list[dict[str, Any]]:
    """A result a folder; the corruptions of one laid out as ImageNet-C are brought together."""
    results: list[dict[str, Any]] = []
    corrupted: dict[str, dict[int, Seen]] = {}
    for source, corruption, severity in variants:
        seen = _answered(classifier, source, source.own_classes)
        if corruption is not None and severity is not None:
            corrupted.setdefault(corruption, {})[severity] = seen
        results.append(
            {
                "variant": source.name,
                "corruption": corruption,
                "severity": severity,
                **seen.to_json(),
                "num_images": len(seen.hits),
                "num_classes": len(source.own_classes),
                "is_restricted": len(source.own_classes) < len(classifier.classes),
                "test": seen.info,
            }
        )
    if corrupted:
        results.append(_as_imagenet_c(corrupted, classifier))
    return results


def _as_imagenet_c(seen: dict[str, dict[int, Seen]], classifier: Classifier) -> dict[str, Any]:
    """Mean error, and the published mean corruption error where the folder is the whole of ImageNet-C."""
    errors = {name: _mean_error(cells) for name, cells in seen.items()}
    common = {name: error for name, error in errors.items() if name in COMMON}
    is_whole = len(classifier.classes) == IMAGENET_CLASSES and all(
        set(seen.get(name, ())) == {1, 2, 3, 4, 5} for name in COMMON
    )
    normalised = None
    if is_whole:
        normalised = sum(error / ALEXNET_ERROR[name] for name, error in common.items()) / len(common)
    return {
        "variant": "corrupted folders together",
        "errors": errors,
        "mean_corruption_error": sum(common.values()) / len(common) if common else None,
        "mean_corruption_error_over_alexnet": normalised,
    }


def _mean_error(cells: dict[int, Seen]) -> float:
    return 1 - sum(cell.top1 for cell in cells.values()) / len(cells)


def _ratio(corrupted: float, clean: float) -> float | None:
    return corrupted / clean if clean > 0 else None


def _say(numbers: Metrics) -> None:
    """A line a corruption, then the means, for people."""
    for name, row in numbers["corruptions"].items():
        cells = "  ".join(f"{s}: {100 * cell['top1']:.1f} %" for s, cell in row["severities"].items())
        log.info("%-18s %s", name, cells)
    if numbers["mean_corruption_error"] is not None:
        log.info(
            "clean accuracy %.1f %%, mean corruption error %.1f %%, accuracy kept %s",
            100 * numbers["top1"],
            100 * numbers["mean_corruption_error"],
            "unknown" if numbers["relative_robustness"] is None else f"{numbers['relative_robustness']:.3f}",
        )
